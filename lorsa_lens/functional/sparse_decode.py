"""Decoding a sparse code, and its gradients, with work for the heads that stay only.

Forward, each token is a bag of weighed rows of `W_O`. The gradient for `W_O` is the same product
the other way round: each head is a bag of weighed tokens. The gradient for the values is made of
the products of output gradients and rows of `W_O` at the code's indices, and no others.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

GATHERED = 2**20
"""Elements of rows of `W_O` that are gathered at a time where there are no sampled products."""


@torch.library.custom_op("lorsa_lens::decode_code", mutates_args=())
def decode_code(values: Tensor, indices: Tensor, W_O: Tensor) -> Tensor:
    """`sum_slot values[t, slot] W_O[indices[t, slot]]` of every token t.

    One operator for `torch.compile`, so that no graph breaks at it.

    Args:
        values: Float[Tensor, "token slot"].
        indices: Int[Tensor, "token slot"].
        W_O: Float[Tensor, "ov_head d_model"].
    """
    return F.embedding_bag(indices, W_O, per_sample_weights=values, mode="sum")


@decode_code.register_fake
def _(values: Tensor, _indices: Tensor, W_O: Tensor) -> Tensor:
    return W_O.new_empty(values.shape[0], W_O.shape[1])


@torch.library.custom_op("lorsa_lens::gradient_for_values", mutates_args=())
def gradient_for_values(grad: Tensor, indices: Tensor, W_O: Tensor) -> Tensor:
    """`grad[t] . W_O[indices[t, slot]]` for every token and slot."""
    n_tokens, n_slots = indices.shape
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    sampled = has_mkl and grad.dtype in (torch.float32, torch.float64)
    if grad.device.type == "cpu" and sampled:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            at = torch.sparse_csr_tensor(
                torch.arange(n_tokens + 1) * n_slots,
                indices.flatten(),
                grad.new_zeros(n_tokens * n_slots),
                size=(n_tokens, W_O.shape[0]),
                check_invariants=False,
            )
        products = torch.sparse.sampled_addmm(at, grad.contiguous(), W_O.t(), beta=0.0)
        values: Tensor = products.values()
        return values.view(n_tokens, n_slots)
    n_rows = max(1, GATHERED // max(1, n_slots * W_O.shape[1]))
    parts = zip(torch.split(grad, n_rows), torch.split(indices, n_rows), strict=True)
    return torch.cat([einsum(W_O[at], of, "t k m, t m -> t k") for of, at in parts])


@gradient_for_values.register_fake
def _(grad: Tensor, indices: Tensor, _W_O: Tensor) -> Tensor:
    return grad.new_empty(indices.shape)


@torch.library.custom_op("lorsa_lens::gradient_for_weights", mutates_args=())
def gradient_for_weights(grad: Tensor, values: Tensor, indices: Tensor, n_heads: int) -> Tensor:
    """`sum_t values[t, slot] grad[t]` of every head, over the tokens and slots that name it."""
    heads, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(heads, torch.arange(n_heads, device=heads.device))
    tokens = order // indices.shape[1]
    weights = values.flatten()[order]
    grad = grad.contiguous()
    return F.embedding_bag(tokens, grad, starts, per_sample_weights=weights, mode="sum")


@gradient_for_weights.register_fake
def _(grad: Tensor, _values: Tensor, _indices: Tensor, n_heads: int) -> Tensor:
    return grad.new_empty(n_heads, grad.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    values, indices, W_O = ctx.saved_tensors
    for_values, _, for_weights = ctx.needs_input_grad
    return (
        gradient_for_values(grad, indices, W_O) if for_values else None,
        None,
        gradient_for_weights(grad, values, indices, W_O.shape[0]) if for_weights else None,
    )


decode_code.register_autograd(_gradients, setup_context=_keep)
