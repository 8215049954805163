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
    n_rotated = 2 * cos.shape[-1]
    pairs = "(pair two)" if adjacent_pairs else "(two pair)"
    first, second = rearrange(x[..., :n_rotated], f"b s h {pairs} -> two b s h pair", two=2)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    rotated = rearrange(
        torch.stack((first * cos - second * sin, second * cos + first * sin)),
        f"two b s h pair -> b s h {pairs}",
    )
    if n_rotated == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., n_rotated:]), dim=-1)
