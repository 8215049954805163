"""How well a number per position tells some positions from all others."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def best_threshold(
    strength: Float[Tensor, " position"], positive: Bool[Tensor, " position"]
) -> float:
    """The threshold at or above 0 above which a strength detects best (largest F1).

    Between two values it lies half-way; infinite if nothing is positive.
    """
    order = strength.argsort(descending=True)
    values, hits = strength[order].double(), positive[order].cumsum(0).double()
    n_found = torch.arange(1, len(values) + 1, dtype=torch.float64)
    f1 = 2 * hits / (n_found + positive.sum())
    following = torch.cat((values[1:], values.new_zeros(1))).clamp(min=0)
    f1 = f1.masked_fill((values <= 0) | (values == following), 0.0)
    best = int(f1.argmax())
    if f1[best] == 0:
        return float("inf")
    return float((values[best] + following[best]) / 2)


def f1_score(found: Bool[Tensor, "*position"], positive: Bool[Tensor, "*position"]) -> float:
    """F1 of what was found; 0 where nothing was, or nothing was there."""
    hits = int((found & positive).sum())
    return 2 * hits / max(1, int(found.sum()) + int(positive.sum()))
