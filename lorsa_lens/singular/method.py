"""How a firing is explained: what the three published methods have in common."""

from abc import ABC, abstractmethod
from typing import ClassVar

from lorsa_lens.singular.components import Firing
from lorsa_lens.singular.graph import Edge
from lorsa_lens.singular.stream import Stream


class Method(ABC):
    """Which firings are traced, and which upstream components explain one."""

    name: ClassVar[str]

    def fires(self, stream: Stream, firing: Firing) -> bool:
        """Whether a firing is strong enough to be traced further."""
        if firing.layer == 0 or firing.dest == 0 or firing.src > firing.dest:
            return False
        return self.strong(stream, firing)

    @abstractmethod
    def strong(self, stream: Stream, firing: Firing) -> bool:
        """Whether the attention weight reaches the method's threshold."""

    @abstractmethod
    def explain(self, stream: Stream, firing: Firing) -> list[Edge]:
        """Edges from upstream components to a firing; none where the method has no answer."""


def n_keys(stream: Stream, firing: Firing) -> int:
    """How many keys the query of a firing sees."""
    return int(stream.reading(firing.layer, firing.head).visible[firing.dest].sum())
