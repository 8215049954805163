"""Seldom selected heads get an advantage in the selection, which is gone before training ends.

With top-K selection most heads of an overcomplete Lorsa are never chosen, so never trained. Each
head's scores are multiplied by `exp(u)`, where u rises while the head is chosen much more rarely
than the mean and falls otherwise: the "conscience" of competitive learning (DeSieno, 1988), as in
the loss-free balancing of experts (arXiv 2408.15664). The codes' values are not changed, and in the
last part of the run heads compete as they will at inference.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

RARE = 0.1
"""A head is favoured while it is chosen less often than this share of the mean head."""

MAX_ADVANTAGE = 2.0
"""Largest u: a factor of 7.4."""

FULL_UNTIL, GONE_FROM = 0.4, 0.6
"""Shares of the run between which the advantage falls linearly to 0."""


class SelectionBalance:
    """The advantages of the heads of one Lorsa.

    Args:
        n_ov_heads: how many heads.
        rate: how much u rises or falls per step. 0: there are no advantages.
        device: where they live.
    """

    def __init__(self, n_ov_heads: int, rate: float, device: torch.device) -> None:
        self.rate = rate
        self.advantage: Float[Tensor, " ov_head"] = torch.zeros(n_ov_heads, device=device)

    def score_factors(self, progress: float) -> Float[Tensor, " ov_head"] | None:
        """What the scores of the heads are multiplied by; None if they are left alone.

        Args:
            progress: share of the run that is done.
        """
        if self.rate == 0 or progress >= GONE_FROM:
            return None
        strength = min(1.0, (GONE_FROM - progress) / (GONE_FROM - FULL_UNTIL))
        return (strength * self.advantage).exp()

    def update(self, n_chosen: Int[Tensor, " ov_head"]) -> None:
        """Note how often each head was chosen in a step."""
        if self.rate:
            rare = n_chosen < RARE * n_chosen.double().mean()
            change = torch.where(rare, self.rate, -self.rate).to(self.advantage)
            self.advantage = (self.advantage + change).clamp_(0, MAX_ADVANTAGE)
