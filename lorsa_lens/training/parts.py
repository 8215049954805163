"""What training is given at each step: batches from a source, and of them a layer's parts."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from lorsa_lens.recording import AttentionRecord


class Part(NamedTuple):
    """A part of a batch: what one layer received and returned, and which tokens count."""

    record: AttentionRecord
    counted: Bool[Tensor, "batch pos"]


@runtime_checkable
class Batch(Protocol):
    """What a source of activations gives for one part of a step."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids."""
        ...

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that count."""
        ...

    @property
    def records(self) -> dict[int, AttentionRecord]:
        """By layer, what attention received and returned."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """The source's place after this batch, plain values."""
        ...


@runtime_checkable
class Source(Protocol):
    """Activations without end, from a place that can be set."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present place on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        ...
