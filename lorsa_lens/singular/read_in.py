"""How the queries or the keys of a head read the residual stream of a prompt."""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.stream import Stream

Side = Literal["dest", "src"]
"""The destination of attention, whose query reads, or its sources, whose keys do."""


class ReadIn(NamedTuple):
    """How queries (or keys) read the stream, all that depends on the prompt frozen.

    The part of a query that a summand y of the stream has is `rot((y W) * factor)`.
    """

    W: Float[Tensor, "d_model d_head"]
    factor: Float[Tensor, " pos"]
    offset: Float[Tensor, "pos d_head"]
    """What biases of the head, and of the norm before it, give; not rotated yet."""
    shift: Float[Tensor, "pos d_head"]
    """What positions give that are added after the norm (shortformer); not rotated yet."""


def read_in(stream: Stream, reading: QKReading, side: Side) -> ReadIn:
    """How one side of a head reads the stream of a prompt."""
    head, layer = reading.head, stream.layers[reading.head.layer]
    norm, positions = layer.norm, layer.qk_positions
    W, b = (head.query if side == "dest" else head.key).effective
    qk_factor = reading.q_factor if side == "dest" else reading.k_factor
    gain, bias = norm.gain, norm.bias
    if head.input_norm is not None:
        gain = gain / head.input_norm.gain
        bias = (bias - head.input_norm.bias) / head.input_norm.gain
    shift = torch.zeros_like(layer.x) if positions is None else positions
    return ReadIn(
        W=replace(norm, gain=gain).into(W),
        factor=qk_factor / norm.scale,
        offset=qk_factor[:, None] * (bias @ W + b),
        shift=qk_factor[:, None] * (shift @ W),
    )
