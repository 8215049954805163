"""What scores would be by chance: other sources, and how likely a difference is without a cause."""

from functools import cache
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def shuffled_sources(
    sources: Bool[Tensor, "batch query key"], *, seed: int = 0
) -> Bool[Tensor, "batch query key"]:
    """Queries exchange the distances at which their sources lie, in pairs at like positions.

    So a null source is as far away as a true one, and only which token lies there differs. Sources
    that would lie before the sequence or after the query move to its ends.
    """
    batch, query = torch.nonzero(sources.any(-1), as_tuple=True)
    generator = torch.Generator().manual_seed(seed)
    ties = torch.rand(len(query), generator=generator).to(query.device)
    order = (query + ties).argsort()
    partner = torch.empty_like(order)
    n_paired = len(order) // 2 * 2
    partner[order[0:n_paired:2]] = order[1:n_paired:2]
    partner[order[1:n_paired:2]] = order[0:n_paired:2]
    partner[order[n_paired:]] = order[: len(order) - n_paired]
    lent = sources[batch[partner], query[partner]]
    moved = torch.zeros_like(sources)
    row, key = torch.nonzero(lent, as_tuple=True)
    key = key + query[row] - query[partner][row]
    key = torch.minimum(key.clamp(min=0), query[row])
    moved[batch[row], query[row], key] = True
    return moved


def random_sources(
    sources: Bool[Tensor, "batch query key"], *, seed: int = 0
) -> Bool[Tensor, "batch query key"]:
    """For each query as many keys as it has sources, drawn from those up to it."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(sources.shape, generator=generator).to(sources.device)
    draw = draw.masked_fill(~torch.ones_like(sources[0]).tril(), -1.0)
    rank = draw.argsort(-1, descending=True).argsort(-1)
    return rank < sources.sum(-1, keepdim=True)


def sign_test(
    n_above: Int[Tensor, " head"], n_below: Int[Tensor, " head"]
) -> Float[Tensor, " head"]:
    """One-sided p-values of the sign test: how likely so many differences are positive by chance.

    Args:
        n_above: sequences in which the true sources score higher than the null's.
        n_below: sequences in which they score lower; ties do not count.
    """
    pairs = zip(n_above.tolist(), n_below.tolist(), strict=True)
    return torch.tensor(
        [_tail(above, above + below) for above, below in pairs], dtype=torch.float64
    )


def holm(p_values: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """P-values corrected so that any false positive at all is as rare as they say (Holm, 1979)."""
    order = p_values.argsort()
    factors = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype)
    corrected = (p_values[order] * factors).clamp(max=1.0).cummax(0).values
    return torch.empty_like(p_values).index_copy_(0, order, corrected)


def _tail(n_above: int, n: int) -> float:
    """Chance of at least `n_above` heads in `n` throws of a coin."""
    return _tails(n)[n_above]


@cache
def _tails(n: int) -> list[float]:
    total, tails = 0, []
    for k in range(n, -1, -1):
        total += comb(n, k)
        tails.append(total / 2**n)
    return tails[::-1]
