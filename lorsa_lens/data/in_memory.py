"""Activations that fit into memory, gone through again and again."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lorsa_lens.data.activations import ActivationBatch
from lorsa_lens.data.contexts import State
from lorsa_lens.recording import AttentionRecord


class RecordedActivations:
    """Endless batches of records in memory, in a new random order each time through.

    For little text, which a run goes through many times: the language model reads it once.

    Args:
        records: by layer, from `record_attention`.
        tokens: the token ids they were recorded from.
        batch_size: sequences per batch; each time through, what is left at the end is dropped.
        counted: positions that count in the loss. None: all.
        seed: for the order.

    Raises:
        ValueError: if there are fewer sequences than a batch has.
    """

    def __init__(
        self,
        records: Mapping[int, AttentionRecord],
        tokens: Int[Tensor, "batch pos"],
        *,
        batch_size: int,
        counted: Bool[Tensor, "batch pos"] | None = None,
        seed: int = 0,
    ) -> None:
        if not 1 <= batch_size <= tokens.shape[0]:
            raise ValueError(
                f"batch_size = {batch_size} must be from 1 to {tokens.shape[0]}, the number of "
                "sequences"
            )
        self.records, self.tokens, self.batch_size, self.seed = records, tokens, batch_size, seed
        self.counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
        self._n_given = 0

    def state_dict(self) -> State:
        """The place after the last batch that was given out."""
        return {"n_given": self._n_given, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: State) -> None:
        """Go to a place.

        Raises:
            ValueError: if the state is of another order or batch size.
        """
        for name in ("batch_size", "seed"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"the state is of batches with {name} = {state.get(name)}, not "
                    f"{getattr(self, name)}"
                )
        self._n_given = int(state["n_given"])

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Batches from the place on, without end."""
        n_batches = self.tokens.shape[0] // self.batch_size
        while True:
            epoch, batch = divmod(self._n_given, n_batches)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.tokens.shape[0])
            start = batch * self.batch_size
            rows = torch.from_numpy(order[start : start + self.batch_size])
            self._n_given += 1
            tokens = self.tokens[rows]
            yield ActivationBatch(
                tokens=tokens,
                counted=self.counted[rows],
                document=torch.zeros_like(tokens),
                records={layer: record.batch(rows) for layer, record in self.records.items()},
                state=self.state_dict(),
            )
