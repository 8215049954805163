"""Behaviours scored: how much of what heads fetch comes from the sources of each behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.analysis.behaviours.effects import Hits
from lorsa_lens.analysis.reading import read
from lorsa_lens.functional.attention import mix_values
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord


@dataclass(frozen=True)
class SourceMask:
    """The sources of one behaviour in some sequences, and those of its null."""

    true: Bool[Tensor, "batch query key"]
    null: Bool[Tensor, "batch query key"]

    def rows(self, rows: slice, device: torch.device) -> "SourceMask":
        """Those of some of the sequences."""
        return SourceMask(self.true[rows].to(device), self.null[rows].to(device))


@dataclass
class Tally:
    """Sums over queries that have a source, for each head."""

    n_heads: int
    weight: Float[Tensor, " head"] = field(init=False)
    """Energy at such queries (for patterns: their number)."""
    share: Float[Tensor, " head"] = field(init=False)
    """Share on the sources, times energy."""
    null: Float[Tensor, " head"] = field(init=False)
    """Share on the null's sources, times energy."""
    effect: Float[Tensor, " head"] = field(init=False)
    """Share on sources that have the effect, times energy."""
    n_queries: Int[Tensor, " head"] = field(init=False)
    """Such queries at which the head stays."""
    n_above: Int[Tensor, " head"] = field(init=False)
    n_below: Int[Tensor, " head"] = field(init=False)
    """Sequences in which the true share is above or below the null's."""

    def __post_init__(self) -> None:
        for name in ("weight", "share", "null", "effect"):
            setattr(self, name, torch.zeros(self.n_heads, dtype=torch.float64))
        for name in ("n_queries", "n_above", "n_below"):
            setattr(self, name, torch.zeros(self.n_heads, dtype=torch.long))

    def add(self, weight: Tensor, share: Tensor, null: Tensor, effect: Tensor) -> None:
        """Count some sequences [batch, query, head]; weights are 0 where there is no source."""
        weight, share, null, effect = (part.double() for part in (weight, share, null, effect))
        by_sequence = (weight * (share - null)).sum(1)
        self.weight += weight.sum((0, 1)).cpu()
        self.share += (weight * share).sum((0, 1)).cpu()
        self.null += (weight * null).sum((0, 1)).cpu()
        self.effect += (weight * effect).sum((0, 1)).cpu()
        self.n_queries += (weight > 0).sum((0, 1)).cpu()
        self.n_above += (by_sequence > 0).sum(0).cpu()
        self.n_below += (by_sequence < 0).sum(0).cpu()

    def mean(self, name: str) -> Float[Tensor, " head"]:
        """`share`, `null` or `effect` per unit of energy; 0 for a head that never stays there."""
        total: Tensor = getattr(self, name)
        return total / self.weight.clamp(min=1e-30)


class LorsaTallies(NamedTuple):
    """Tallies of a Lorsa, by behaviour."""

    circuits: dict[str, Tally]
    heads: dict[str, Tally]
    energy: Float[Tensor, " ov_head"]
    """Energy of each head at all queries."""


@torch.no_grad()
def tally_patterns(
    lorsa: Lorsa, record: AttentionRecord, masks: Mapping[str, SourceMask], *, batch_size: int = 16
) -> dict[str, Tally]:
    """Share of every query-key circuit's pattern on the sources, each query counting alike."""
    tallies = {name: Tally(lorsa.cfg.n_qk_heads) for name in masks}
    for start in range(0, record.x.shape[0], batch_size):
        rows = slice(start, start + batch_size)
        part = record.batch(rows).seen_by(lorsa)
        pattern = lorsa.pattern(part.x, range(lorsa.cfg.n_qk_heads), **part.context)
        for name, mask in masks.items():
            _tally_pattern(tallies[name], pattern, mask.rows(rows, pattern.device))
    return tallies


@torch.no_grad()
def tally_lorsa(
    lorsa: Lorsa,
    record: AttentionRecord,
    tokens: Int[Tensor, "batch pos"],
    masks: Mapping[str, SourceMask],
    hits: Mapping[str, Hits],
    *,
    batch_size: int = 16,
) -> LorsaTallies:
    """Share of every circuit's pattern, and of every head's z pattern, on the sources.

    Queries count by the head's energy `(z ||w_O||)^2` there.

    Args:
        lorsa: whose heads.
        record: what the layer received.
        tokens: the sequences.
        masks: sources by behaviour.
        hits: for behaviours with an effect, which heads have it on which tokens.
        batch_size: sequences at a time.
    """
    n_heads = lorsa.cfg.n_ov_heads
    tallies = LorsaTallies(
        {name: Tally(lorsa.cfg.n_qk_heads) for name in masks},
        {name: Tally(n_heads) for name in masks},
        torch.zeros(n_heads, dtype=torch.float64),
    )
    for start in range(0, record.x.shape[0], batch_size):
        rows = slice(start, start + batch_size)
        reading = read(lorsa, record.batch(rows).seen_by(lorsa))
        acts = to_dense(reading.code, n_heads)
        energy = (acts * writing_norms(lorsa.W_O)).square()
        tallies.energy.add_(energy.double().sum((0, 1)).cpu())
        pattern, values = reading.pattern, reading.values
        size = values.abs()
        magnitude = mix_values(pattern, size).clamp(min=1e-30)
        for name, mask in masks.items():
            mask = mask.rows(rows, pattern.device)
            _tally_pattern(tallies.circuits[name], pattern, mask)
            on_true = pattern * mask.true[:, None]
            share = mix_values(on_true, size) / magnitude
            null = mix_values(pattern * mask.null[:, None], size) / magnitude
            effect = share
            if name in hits:
                hit = hits[name].of(tokens[rows].to(values.device), values)
                effect = mix_values(on_true, size * hit) / magnitude
            weight = energy * mask.true.any(-1)[..., None]
            tallies.heads[name].add(weight, share, null, effect)
    return tallies


def _tally_pattern(tally: Tally, pattern: Tensor, mask: SourceMask) -> None:
    share, null = (
        rearrange((pattern * of[:, None]).sum(-1), "batch head query -> batch query head")
        for of in (mask.true, mask.null)
    )
    tally.add(mask.true.any(-1)[..., None].expand_as(share), share, null, share)
