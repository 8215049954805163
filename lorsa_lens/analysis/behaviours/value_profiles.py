"""How a quantity depends on a number from 0 to 99: ranges, bins, and a test that bins differ."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_NUMBER = 99
"""The largest value."""

HEADS_AT_A_TIME = 256
"""Heads whose ranges are compared at once."""


class Ranges(NamedTuple):
    """The range of values that explains most of each head's strength."""

    low: Int[Tensor, " head"]
    high: Int[Tensor, " head"]
    explained: Float[Tensor, " head"]


def best_range(strength: Float[Tensor, "sum head"], values: Int[Tensor, " sum"]) -> Ranges:
    """For each head the range within which it is stronger, by variance explained.

    Args:
        strength: of each head at each sum.
        values: an operand of each sum, 0 to 99.
    """
    n = len(values)
    counts = values.bincount(minlength=MAX_NUMBER + 1).double()
    centred = strength - strength.mean(0)
    by_value = torch.zeros(MAX_NUMBER + 1, strength.shape[1], dtype=strength.dtype)
    by_value.index_add_(0, values, centred)
    below = torch.nn.functional.pad(by_value.cumsum(0), (0, 0, 1, 0))
    n_below = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    low, high = torch.triu_indices(MAX_NUMBER + 1, MAX_NUMBER + 1).unbind(0)
    inside = n_below[high + 1] - n_below[low]
    proper = (inside > 0) & (inside < n)
    low, high, inside = low[proper], high[proper], inside[proper]
    factor = n / (inside * (n - inside))
    best = []
    for heads in torch.split(torch.arange(strength.shape[1]), HEADS_AT_A_TIME):
        sums = below[high + 1][:, heads] - below[low][:, heads]
        best.append((factor[:, None] * sums.clamp(min=0).square()).max(0))
    between = torch.cat([part.values for part in best])
    which = torch.cat([part.indices for part in best])
    total = centred.square().sum(0)
    return Ranges(low[which], high[which], _share(between, total))


def explained_by_bins(
    strength: Float[Tensor, "sum head"], bins: Int[Tensor, " sum"]
) -> Float[Tensor, " head"]:
    """Share of variance between ten bins: one-way eta squared."""
    member = _members(bins).to(strength)
    centred = strength - strength.mean(0)
    between = ((member @ centred).square() / member.sum(1, keepdim=True).clamp(min=1)).sum(0)
    return _share(between, centred.square().sum(0))


def kruskal_wallis(
    strength: Float[Tensor, "sum head"], bins: Int[Tensor, " sum"]
) -> Float[Tensor, " head"]:
    """P-values of the Kruskal-Wallis test that bins differ, corrected for ties; 1 for constants."""
    ranks = torch.stack([_mid_ranks(column) for column in strength.T], dim=1)
    member = _members(bins).to(ranks)
    sizes = member.sum(1)
    centred = ranks - ranks.mean(0)
    between = ((member @ centred).square() / sizes.clamp(min=1)[:, None]).sum(0)
    variance = centred.square().sum(0) / (len(ranks) - 1)
    statistic = torch.where(variance > 0, between / variance.clamp(min=1e-30), 0.0)
    half_freedom = torch.full_like(statistic, (int((sizes > 0).sum()) - 1) / 2)
    p_values: Tensor = torch.special.gammaincc(half_freedom, statistic / 2)
    return p_values


def _mid_ranks(values: Float[Tensor, " sum"]) -> Float[Tensor, " sum"]:
    """Ranks from 1, ties sharing their mean."""
    ordered = values.sort().values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to + 1).double() / 2


def _members(bins: Int[Tensor, " sum"]) -> Bool[Tensor, "bin sum"]:
    return bins[None, :] == torch.arange(10)[:, None]


def bin_means(
    strength: Float[Tensor, "sum head"], bins: Int[Tensor, " sum"]
) -> Float[Tensor, "bin head"]:
    """Mean strength in each bin; not a number where there is no sum."""
    member = _members(bins).to(strength)
    return (member @ strength) / member.sum(1, keepdim=True)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """A share of the whole; 0 where nothing varies."""
    return torch.where(total > 1e-24, part / total.clamp(min=1e-24), 0.0)
