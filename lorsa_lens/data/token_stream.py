"""Token ids alone, in batches, for training that runs the language model itself."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from lorsa_lens.data.contexts import Contexts, State
from lorsa_lens.recording import AttentionRecord


class TokenStreamBatch(NamedTuple):
    """Sequences for the language model, and the place after them."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""

    counted: Bool[Tensor, "batch pos"]
    """Whether a position counts in a loss: not if it is padding or a special token."""

    state: State
    """The place after this batch, for `load_state_dict`."""

    records: dict[int, AttentionRecord]
    """Empty: nothing was run."""


class TokenStream:
    """Batches of token ids, in the order of their contexts.

    Args:
        contexts: from `pack`.
        batch_size: contexts per batch.
    """

    def __init__(self, contexts: Contexts, *, batch_size: int) -> None:
        self.contexts, self.batch_size = contexts, batch_size

    def __iter__(self) -> Iterator[TokenStreamBatch]:
        """Batches from the place on."""
        while (batch := self.contexts.next_batch(self.batch_size)) is not None:
            yield TokenStreamBatch(batch.tokens, batch.counted, self.contexts.state_dict(), {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        self.contexts.load_state_dict(state)
