"""Attention without patterns as one operator with a gradient.

One operator, so that `torch.compile` neither unrolls the tiles nor breaks its graph at them.
"""

from typing import Any

import torch
from torch import Tensor

from lorsa_lens.functional.active_rows import few_active_rows, mix_backward_of_rows
from lorsa_lens.functional.masks import AttentionMask
from lorsa_lens.functional.tiles import Tiling, mix_by_tiles, mix_by_tiles_backward


@torch.library.custom_op("lorsa_lens::mix", mutates_args=())
def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    alibi_slopes: Tensor | None,
    causal: bool,
    window: int | None,
    divisor: float,
    soft_cap: float | None,
    n_scores: int | None,
) -> Tensor:
    """`attend` with plain arguments: [batch, query, ov_head] pre-activations."""
    mask = AttentionMask(q.shape[1], k.shape[1], causal=causal, window=window, keep=keep)
    tiling = Tiling(mask, divisor, soft_cap, alibi_slopes, n_scores)
    return mix_by_tiles(q, k, v, tiling, _activations(q, v))


@mix.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _activations(q, v)


def _activations(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2] * v.shape[3])


@torch.library.custom_op("lorsa_lens::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    alibi_slopes: Tensor | None,
    causal: bool,
    window: int | None,
    divisor: float,
    soft_cap: float | None,
    n_scores: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `mix` for queries, keys and values."""
    mask = AttentionMask(q.shape[1], k.shape[1], causal=causal, window=window, keep=keep)
    tiling = Tiling(mask, divisor, soft_cap, alibi_slopes, n_scores)
    if q.device.type == "cpu":  # elsewhere, asking would have to wait for the device
        active = few_active_rows(grad, group=v.shape[3])
        if active is not None:
            return mix_backward_of_rows(grad, q, k, v, tiling, active)
    return mix_by_tiles_backward(grad, q, k, v, tiling)


@mix_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = mix_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 7)


mix.register_autograd(_gradients, setup_context=_keep)
