"""How close the patterns of query-key circuits are to those of the layer's own heads.

The overlap of two patterns at a query is `sum_k min(A[q, k], B[q, k])`, the share of attention that
both give to the same keys: 1 minus their total variation. No more than `BLOCK_ELEMENTS` entries of
patterns of the circuits are held at a time.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.functional.code import Code
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

BLOCK_ELEMENTS = 2**22
"""Entries of patterns that are held at a time: 16 MB in float32."""


class PatternMatch:
    """Which attention head each query-key circuit looks most like.

    Args:
        lorsa: whose circuits.
        attention: the layer's own attention, as its exact lift.
    """

    def __init__(self, lorsa: Lorsa, attention: Lorsa) -> None:
        self.lorsa, self.attention = lorsa, attention
        self._overlap = torch.zeros(
            lorsa.cfg.n_qk_heads, attention.cfg.n_qk_heads, dtype=torch.float64
        )
        self._energy = torch.zeros(lorsa.cfg.n_qk_heads, dtype=torch.float64)

    def observe(self, record: AttentionRecord, energy: Float[Tensor, "batch pos circuit"]) -> None:
        """Compare all circuits with all heads.

        Args:
            record: what the layer received.
            energy: weight of each circuit at each query.
        """
        self._energy += energy.sum((0, 1))
        n_circuits, n_heads = self._overlap.shape
        for rows, size in _row_blocks(record):
            blocks = _chunks(range(n_circuits), size)
            heads = [[head] for _ in blocks for head in range(n_heads)]
            own = _patterns(self.attention, record.batch(rows), heads)
            weight = energy[rows]
            for circuits, pattern in _patterns(self.lorsa, record.batch(rows), blocks):
                for (head,), head_pattern in islice(own, n_heads):
                    both = _overlap(pattern, head_pattern)
                    added = einsum(both, weight[..., circuits], "b c q, b q c -> c")
                    self._overlap[circuits, head] += added

    @property
    def heads(self) -> tuple[int, ...]:
        """By circuit, the best matching head, for the queries observed."""
        return tuple(self._overlap.argmax(-1).tolist())

    @property
    def chance(self) -> float:
        """Mean overlap of a circuit, weighted by energy, with a head drawn at random."""
        return float(self._overlap.mean(-1).sum() / self._energy.sum())

    def overlap(
        self, record: AttentionRecord, energy: Float[Tensor, "batch pos circuit"]
    ) -> Float[Tensor, "batch pos"]:
        """Overlaps of all circuits with their best matching heads, summed with their weights."""
        best = self.heads
        total = torch.zeros(energy.shape[:2], dtype=torch.float64)
        for rows, size in _row_blocks(record):
            blocks = [
                block
                for head in sorted(set(best))
                for block in _chunks([c for c, match in enumerate(best) if match == head], size)
            ]
            own = _patterns(self.attention, record.batch(rows), [[best[c]] for c, *_ in blocks])
            for circuits, pattern in _patterns(self.lorsa, record.batch(rows), blocks):
                both = _overlap(pattern, next(own)[1])
                total[rows] += einsum(both, energy[rows][..., circuits], "b c q, b q c -> b q")
        return total


def circuit_energy(lorsa: Lorsa, code: Code) -> Float[Tensor, "batch pos circuit"]:
    """`sum_i (z^i |w_O^i|)^2` over the heads of each query-key circuit, in float64."""
    norms = writing_norms(lorsa.W_O)
    energy = (code.values * norms[code.indices]).double().square()
    sums = energy.new_zeros(*energy.shape[:2], lorsa.cfg.n_qk_heads)
    return sums.scatter_add_(-1, code.indices // lorsa.cfg.group_size, energy).cpu()


def _row_blocks(record: AttentionRecord) -> Iterator[tuple[slice, int]]:
    """So few sequences at a time that a pattern of each fits; and how many circuits then do."""
    batch, pos, _ = record.x.shape
    n_rows = max(1, BLOCK_ELEMENTS // pos**2)
    for start in range(0, batch, n_rows):
        n_taken = min(n_rows, batch - start)
        yield slice(start, start + n_rows), max(1, BLOCK_ELEMENTS // (n_taken * pos**2))


def _chunks(circuits: Sequence[int], size: int) -> list[list[int]]:
    return [list(circuits[start : start + size]) for start in range(0, len(circuits), size)]


def _patterns(
    lorsa: Lorsa, record: AttentionRecord, blocks: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], Float[Tensor, "batch circuit query key"]]]:
    """Patterns of one block of circuits after another."""
    part = record.seen_by(lorsa)
    return zip(blocks, lorsa.pattern_blocks(part.x, blocks, **part.context), strict=True)


def _overlap(pattern: Tensor, own: Tensor) -> Float[Tensor, "batch circuit query"]:
    return torch.minimum(pattern, own.to(pattern.device)).sum(-1).double().cpu()
