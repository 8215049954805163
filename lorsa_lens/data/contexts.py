"""Contexts: sequences of one length for the language model, in an order that never changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

State = dict[str, Any]
"""A place in the data, as JSON can hold it."""

PADDING = -1
"""Document of a position that belongs to none."""


class Context(NamedTuple):
    """One sequence for the language model."""

    tokens: npt.NDArray[np.int64]
    """Token ids [pos]."""

    counted: npt.NDArray[np.bool_]
    """Whether a position counts in a loss [pos]; see `TokenBatch`."""

    document: npt.NDArray[np.int64]
    """`Document.number` of each position [pos], or `PADDING`."""


class TokenBatch(NamedTuple):
    """Sequences for the language model."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""

    counted: Bool[Tensor, "batch pos"]
    """Whether a position counts in a loss: not if it is padding or a special token. Special tokens
    are there for attention as any others."""

    document: Int[Tensor, "batch pos"]
    """`Document.number` of each position, or `PADDING`."""

    @classmethod
    def of(cls, contexts: Sequence[Context]) -> "TokenBatch":
        """Contexts as one batch."""
        return cls(*(torch.from_numpy(np.stack(part)) for part in zip(*contexts, strict=True)))


class Contexts(ABC, Iterator[Context]):
    """Contexts in a fixed order; going on from a loaded state gives exactly the next ones."""

    context_size: int
    """Positions per context."""

    padded: bool
    """Whether contexts may end in padding."""

    description: str
    """What the contexts are made of and how, for the manifest of a cache."""

    @abstractmethod
    def __next__(self) -> Context:
        """The next context."""

    @abstractmethod
    def state_dict(self) -> State:
        """The place after the last context given, as JSON can hold it."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Go to a place.

        Raises:
            ValueError: if the state is of contexts that were made in another way.
        """

    @abstractmethod
    def limit_vocabulary(self, d_vocab: int) -> None:
        """Refuse ids from `d_vocab` on, from now on."""

    def next_batch(self, batch_size: int) -> TokenBatch | None:
        """The next contexts: fewer than `batch_size` at the end, None after it."""
        taken = [context for _, context in zip(range(batch_size), self, strict=False)]
        return TokenBatch.of(taken) if taken else None

    def shuffled(self, buffer_size: int, seed: int) -> "Contexts":
        """The same contexts, in a random order within stretches of `buffer_size`."""
        from lorsa_lens.data.shuffling import ShuffledContexts

        return ShuffledContexts(self, buffer_size, seed)
