"""From the input of attention to the queries, or the keys, of one head."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.config import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Projection:
    """From the input of attention to queries (or keys), before rotation, in float64.

    With a norm of queries and keys, `x W + b` is divided by the root mean square of `x W_all +
    b_all` (this head's own, or all heads' together) and multiplied by `gain`.
    """

    W: Float[Tensor, "d_model d_head"]
    b: Float[Tensor, " d_head"]
    gain: Float[Tensor, " d_head"] | None = None
    W_all: Float[Tensor, "d_model d_all"] | None = None
    b_all: Float[Tensor, " d_all"] | None = None
    eps: float = 0.0

    @property
    def effective(self) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """Weights and bias with the gain in them: all that is linear."""
        if self.gain is None:
            return self.W, self.b
        return self.W * self.gain, self.b * self.gain

    def factor(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, " pos"]:
        """What the norm multiplies by at each position: one over the root mean square."""
        if self.W_all is None or self.b_all is None:
            return torch.ones_like(x[:, 0])
        mean_square = (x @ self.W_all + self.b_all).square().mean(-1)
        return torch.rsqrt(mean_square + self.eps)


def projection(
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
    gain: Float[Tensor, "head d_head"] | None,
    index: int,
    spec: AttentionSpec,
) -> Projection:
    """One head's projection, from the weights of all heads of its layer."""
    own_W, own_b = W[index].detach().double(), b[index].detach().double()
    if spec.qk_norm is None or gain is None:
        return Projection(W=own_W, b=own_b)
    W_all, b_all = own_W, own_b
    if spec.qk_norm == "full":
        W_all = rearrange(W.detach().double(), "h m d -> m (h d)")
        b_all = rearrange(b.detach().double(), "h d -> (h d)")
    return Projection(
        W=own_W,
        b=own_b,
        gain=gain[index].detach().double(),
        W_all=W_all,
        b_all=b_all,
        eps=spec.qk_norm_eps,
    )
