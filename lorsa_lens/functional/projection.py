"""Queries, keys and values of all circuits from what the attention reads."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.functional.rotary import turn_
from lorsa_lens.functional.workspace import Workspace, blocks

SMALL_GROUP = 16
"""Rank-1 heads of a circuit below which its values are no product of their own."""

HELD = 2**20
"""Elements of heads worked on at a time: they are rotated while a processor's cache has them."""


def project_heads(
    x: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, "head d_model dim"],
    bias: Float[Tensor, "head dim"],
    angles: tuple[Float[Tensor, "#batch pos pair"], Float[Tensor, "#batch pos pair"]] | None = None,
    *,
    adjacent_pairs: bool = False,
    room: Workspace | None = None,
) -> Float[Tensor, "batch pos head dim"]:
    """`x W + b` of every head, rotated if there are angles.

    Each head is a product of its own and lies by itself, so that neither weights nor results nor
    gradients are ever laid out anew as a whole. Angles get no gradient.

    Args:
        x: what is read.
        weight: of each head.
        bias: of each head.
        angles: cosines and sines, as in `rotate`.
        adjacent_pairs: as in `rotate`.
        room: where the result goes, without gradients. None: memory of its own.
    """
    cos, sin = angles or (None, None)
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):  # it sees no own operators
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        heads: Tensor = project(x, weight, bias, cos, sin, adjacent_pairs)
    else:
        heads = _projected(x, weight, bias, cos, sin, adjacent_pairs, room)
    return rearrange(heads, "h b s d -> b s h d")


def project_values(
    x: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, "ov_head d_model"],
    bias: Float[Tensor, " ov_head"],
    group: int,
    room: Workspace | None = None,
) -> Float[Tensor, "batch pos head group"]:
    """Values of all rank-1 heads, by circuit.

    Large groups lie by themselves as queries and keys do; small ones are one product.

    Args:
        x: what is read.
        weight: reading vectors.
        bias: of each rank-1 head.
        group: rank-1 heads of each circuit.
        room: as in `project_heads`.
    """
    if group < SMALL_GROUP:
        return rearrange(F.linear(x, weight, bias), "b s (h g) -> b s h g", g=group)
    by_circuit = rearrange(weight, "(h g) m -> h m g", g=group)
    return project_heads(x, by_circuit, rearrange(bias, "(h g) -> h g", g=group), room=room)


def _projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    adjacent_pairs: bool,
    room: Workspace | None = None,
) -> Tensor:
    tokens = repeat(x, "b s m -> h (b s) m", h=weight.shape[0])  # a view if `x` is contiguous
    shape = weight.shape[0], *x.shape[:2], weight.shape[2]
    out: Tensor = x.new_empty(shape) if room is None else room(*shape)
    for heads in blocks(shape[0], out[:1].numel(), HELD, x.device):
        part = out[heads]
        torch.baddbmm(bias[heads, None], tokens[heads], weight[heads], out=part.flatten(1, 2))
        if cos is not None and sin is not None:
            turn_(part, cos, sin, adjacent_pairs)
    return out


@torch.library.custom_op("lorsa_lens::project", mutates_args=())
def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    adjacent_pairs: bool,
) -> Tensor:
    """`project_heads`, [head, batch, pos, dim]."""
    return _projected(x, weight, bias, cos, sin, adjacent_pairs)


@project.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(weight.shape[0], *x.shape[:2], weight.shape[2])


@torch.library.custom_op("lorsa_lens::project_backward", mutates_args=())
def project_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    adjacent_pairs: bool,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `project` for input, weight and bias; empty where not asked for."""
    flat = rearrange(x, "b s m -> (b s) m")
    grad_x = torch.zeros_like(flat) if for_x else flat.new_empty(0, flat.shape[1])
    grad_weight, grad_bias = _rooms(grad, weight, for_weights)
    transposed = weight.stride(1) == 1  # reading vectors: the gradient is laid out as they are
    room = Workspace(grad)
    for heads in blocks(grad.shape[0], grad[:1].numel(), HELD, x.device):
        part = grad[heads]
        if cos is not None and sin is not None:
            part = turn_(room(*part.shape).copy_(part), cos, -sin, adjacent_pairs)
        part = rearrange(part, "h b s d -> h (b s) d")
        if for_weights:
            tokens = repeat(flat, "t m -> h t m", h=part.shape[0])
            if transposed:
                torch.bmm(part.mT, tokens, out=grad_weight[heads].mT)
            else:
                torch.bmm(tokens.mT, part, out=grad_weight[heads])
            grad_bias[heads] = part.sum(1)
        if for_x:
            grad_x.addmm_(
                rearrange(part, "h t d -> t (h d)"), rearrange(weight[heads], "h m d -> (h d) m")
            )
    return grad_x, grad_weight, grad_bias


@project_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    _adjacent_pairs: bool,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape[0] * x.shape[1] if for_x else 0, x.shape[2])
    return grad_x, *_rooms(grad, weight, for_weights)


def _rooms(grad: Tensor, weight: Tensor, for_weights: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradients of weight and bias, the first laid out as the weight is."""
    if not for_weights:
        return weight.new_empty(0), weight.new_empty(0)
    return torch.empty_like(weight), weight.new_empty(grad.shape[0], grad.shape[3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, cos, sin, ctx.adjacent_pairs = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    for_x, *for_parameters = ctx.needs_input_grad[:3]
    for_weights = any(for_parameters)
    grad_x, grad_weight, grad_bias = project_backward(
        grad, x, weight, cos, sin, ctx.adjacent_pairs, for_x, for_weights
    )
    return (
        grad_x.view(x.shape) if for_x else None,
        grad_weight if for_weights else None,
        grad_bias if for_weights else None,
        None,
        None,
        None,
    )


project.register_autograd(_gradients, setup_context=_keep)
