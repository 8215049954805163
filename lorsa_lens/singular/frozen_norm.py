"""Norms frozen on a prompt: with its scale held fixed, a norm is an affine map."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FrozenNorm:
    """`y = (r - mean(r) if centred) * gain / scale + bias`, exact on the prompt it was read on."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    scale: Float[Tensor, " pos"]
    """At each position; with `gain` it is determined up to a factor that they share."""

    def into(self, W: Float[Tensor, "d_model d_out"]) -> Float[Tensor, "d_model d_out"]:
        """What `W` reads of the stream itself: centring and gain folded into it."""
        W = self.gain[:, None] * W
        return W - W.mean(dim=0) if self.centred else W

    def share(
        self, y: Float[Tensor, "*rows at d_model"], at: Int[Tensor, " at"] | None = None
    ) -> Float[Tensor, "*rows at d_model"]:
        """The share of the output that a summand of the input has; shares and `bias` sum to it.

        Args:
            y: the summand.
            at: positions of its vectors. None: every position.
        """
        if self.centred:
            y = y - y.mean(dim=-1, keepdim=True)
        return y * self.gain / self._scale(at)

    def pull(
        self, c: Float[Tensor, "*rows at d_model"], at: Int[Tensor, " at"] | None = None
    ) -> Float[Tensor, "*rows at d_model"]:
        """What reads the input as `c` reads the output: the transpose of `share`."""
        c = c * self.gain / self._scale(at)
        return c - c.mean(dim=-1, keepdim=True) if self.centred else c

    def _scale(self, at: Tensor | None) -> Float[Tensor, "at 1"]:
        return (self.scale if at is None else self.scale[at])[:, None]


def no_norm(like: Float[Tensor, "pos d_model"]) -> FrozenNorm:
    """The norm that changes nothing."""
    return FrozenNorm(
        gain=torch.ones_like(like[0]),
        bias=torch.zeros_like(like[0]),
        centred=False,
        scale=torch.ones_like(like[:, 0]),
    )


@torch.no_grad()
def freeze(
    norm: Callable[[Tensor], Tensor],
    r: Float[Tensor, "pos d_model"],
    y: Float[Tensor, "pos d_model"],
) -> FrozenNorm:
    """Read a LayerNorm or RMSNorm, of whatever class, by what it does.

    Args:
        norm: the module; called on three vectors.
        r: what it received on the prompt, in float64.
        y: what it returned, in float64.

    Raises:
        ValueError: if it is neither of the two.
    """
    probe = _probe(r.shape[-1]).to(r)

    def call(vector: Tensor) -> Tensor:
        parameter_like = vector.to(next(iter(_tensors(norm)), vector))
        return norm(parameter_like[None, None])[0, 0].double()

    bias = call(torch.zeros_like(probe))
    of_probe = call(probe) - bias
    gain = of_probe / probe * probe.square().mean().sqrt()
    shifted = call(probe + 1) - bias
    centred = bool(torch.allclose(shifted, of_probe, rtol=1e-3, atol=1e-5))
    inner = (r - r.mean(-1, keepdim=True) if centred else r) * gain
    outer = y - bias
    scale = inner.square().sum(-1) / (inner * outer).sum(-1)
    frozen = FrozenNorm(gain=gain, bias=bias, centred=centred, scale=scale)
    error = (frozen.share(r) + bias - y).abs().max() / y.abs().max()
    if not bool(error < 1e-2):
        raise ValueError(
            f"a {type(norm).__name__} in the model is neither a LayerNorm nor an RMSNorm: with "
            "its scale frozen it is not linear, so nothing can be traced through it"
        )
    return frozen


def _probe(n: int) -> Float[Tensor, " n"]:
    """A vector of mean 0 without zeros."""
    probe = torch.ones(n, dtype=torch.float64)
    probe[1::2] = -1
    if n % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    return probe


def _tensors(norm: object) -> list[Tensor]:
    if not isinstance(norm, torch.nn.Module):
        return []
    return [*norm.parameters(), *norm.buffers()]
