"""Rotary positions: frequencies, angles, and the rotation of queries and keys."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def plain_frequencies(rotary_dim: int, base: float) -> list[float]:
    """Radians per position of each rotated pair: `base ** (-2 i / rotary_dim)`.

    RoFormer, arXiv 2104.09864, equation 15.
    """
    return [base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]


def rotary_angles(
    positions: Int[Tensor, "batch pos"],
    frequencies: Sequence[float],
    *,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch pos pair"], Float[Tensor, "batch pos pair"]]:
    """Cosines and sines of every position's angles, times `scale`, in `dtype`."""
    frequency = torch.tensor(frequencies, dtype=dtype, device=positions.device)
    angles = positions[..., None].to(dtype) * frequency
    return angles.cos() * scale, angles.sin() * scale


def rotate(
    x: Float[Tensor, "batch pos head dim"],
    cos: Float[Tensor, "#batch pos pair"],
    sin: Float[Tensor, "#batch pos pair"],
    *,
    adjacent_pairs: bool,
) -> Float[Tensor, "batch pos head dim"]:
    """Rotate the leading `2 * pair` dimensions of queries or keys; the rest pass unchanged.

    Args:
        x: queries or keys.
        cos: cosines, from `rotary_angles`.
        sin: sines.
        adjacent_pairs: pairs are (0, 1), (2, 3), ... if true, else (0, pair), (1, pair + 1), ...
    """
    return turn_(x.clone(), cos[:, :, None], sin[:, :, None], adjacent_pairs)


def turn_(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """`rotate`, in place, with the head dimension wherever `cos` and `sin` have it."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    pairs = "(pair two)" if adjacent_pairs else "(two pair)"
    by_pair = rearrange(x[..., : 2 * cos.shape[-1]], f"... {pairs} -> two ... pair", two=2)
    first, second = by_pair[0], by_pair[1]
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)
    return x
