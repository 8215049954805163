"""What reading attention takes in any host: layers, affine norms and rotary frequencies."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps
"""Relative rounding of frequencies and angles in a host that computes them in float32."""

FLOAT64_EPS = 1e-12
"""The same in float64, a few operations included."""


def affine_unless_identity(
    gain: Float[Tensor, " d_model"], bias: Float[Tensor, " d_model"] | None
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    """Detached copies of a norm's gain and bias (zeros for None); None for gain 1 and bias 0."""
    gain = gain.detach().clone()
    bias = torch.zeros_like(gain) if bias is None else bias.detach().clone()
    if bool((gain == 1).all()) and bool((bias == 0).all()):
        return None
    return gain, bias


def table_frequencies(
    sin: Float[Tensor, "position pair"], cos: Float[Tensor, "position pair"]
) -> Float[Tensor, " pair"]:
    """Radians per position, read from a host's table of sines and cosines.

    The angle at position 1 gives a frequency to the rounding of the table. The angles at
    positions 2, 4, 8, ... refine it: what is left of them, modulo a turn, is the error times the
    position. So the frequencies reproduce the whole table to its rounding.

    Args:
        sin: sines of at least two positions, from 0; frequencies are at most 1.
        cos: cosines.
    """
    angles = torch.atan2(sin.detach().double().cpu(), cos.detach().double().cpu())
    frequencies = angles[1]
    position = 2
    while position < len(angles):
        error = angles[position] - position * frequencies
        error = torch.remainder(error + math.pi, 2 * math.pi) - math.pi
        frequencies = frequencies + error / position
        position *= 2
    return frequencies


def frequencies_unless_plain(
    frequencies: Float[Tensor, " pair"], base: float, n_positions: int, eps: float
) -> tuple[float, ...] | None:
    """Rotary frequencies for a spec: None where they are the plain series of `base`.

    Args:
        frequencies: radians per position of each rotated pair.
        base: the base of the plain series `base ** (-i / n_pairs)`.
        n_positions: how many positions the host has.
        eps: how far the angle at the last position may be from that of the plain series, both
            relative to it and in radians: the rounding of the host.
    """
    frequencies = frequencies.detach().double().cpu()
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain = base**-exponents
    if torch.allclose(frequencies * n_positions, plain * n_positions, rtol=eps, atol=eps):
        return None
    return tuple(frequencies.tolist())


def check_layer(layer: int, n_layers: int) -> None:
    """Raise a ValueError unless a model of `n_layers` has a layer of that index."""
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer = {layer}: the model has layers 0 to {n_layers - 1}")
