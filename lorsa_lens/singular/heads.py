"""Circuits against lists of heads: precision, recall, and the published circuit for IOI."""

from collections.abc import Iterable
from typing import NamedTuple

Heads = frozenset[tuple[int, int]]

IOI_CIRCUIT: dict[str, Heads] = {
    "name mover": frozenset({(9, 9), (10, 0), (9, 6)}),
    "backup name mover": frozenset(
        {(9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)}
    ),
    "negative name mover": frozenset({(10, 7), (11, 10)}),
    "S-inhibition": frozenset({(7, 3), (7, 9), (8, 6), (8, 10)}),
    "induction": frozenset({(5, 5), (5, 8), (5, 9), (6, 9)}),
    "duplicate token": frozenset({(0, 1), (0, 10), (3, 0)}),
    "previous token": frozenset({(2, 2), (4, 11)}),
}
"""Heads (layer, head) of GPT-2 small that do indirect object identification, by their part.

Wang et al., arXiv 2211.00593, figure 2 (26 heads).
"""

IOI_HEADS: Heads = frozenset().union(*IOI_CIRCUIT.values())
"""All of them."""


class HeadMatch(NamedTuple):
    """How well heads found agree with heads known."""

    precision: float
    """Share of the heads found that are known; 0 if none was found."""
    recall: float
    """Share of the known heads that were found."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def match_heads(
    found: Iterable[tuple[int, int]], known: Iterable[tuple[int, int]] = IOI_HEADS
) -> HeadMatch:
    """Precision and recall of heads found, as of `circuit.heads`.

    Args:
        found: layers and heads.
        known: the heads to find. `IOI_HEADS` by default.

    Raises:
        ValueError: if `known` is empty.
    """
    found, known = set(found), set(known)
    if not known:
        raise ValueError("known is empty: give the heads that there are to find")
    both = len(found & known)
    return HeadMatch(both / len(found) if found else 0.0, both / len(known))
