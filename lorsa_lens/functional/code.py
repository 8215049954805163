"""Sparse codes: which heads stay at a token and with what activation; and back to the stream."""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.functional.sparse_decode import decode_code


class Code(NamedTuple):
    """The heads that stay at each token.

    Where tokens keep different numbers of heads, the shorter lists are filled up with value 0.
    """

    values: Float[Tensor, "batch pos slot"]
    """Activations z of the heads that stay."""

    indices: Int[Tensor, "batch pos slot"]
    """Which heads they are."""


def to_dense(code: Code, n_ov_heads: int) -> Float[Tensor, "batch pos ov_head"]:
    """The code as one activation per head, 0 for every head that does not stay."""
    dense = code.values.new_zeros(*code.values.shape[:-1], n_ov_heads)
    return dense.scatter_add(-1, code.indices, code.values)


def decode(code: Code, W_O: Float[Tensor, "ov_head d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """`sum_i z^i w_O^i` over the heads of a code."""
    n_slots, n_ov_heads = code.values.shape[-1], W_O.shape[0]
    if 4 * n_slots >= n_ov_heads:  # hardly sparse: a dense product is faster
        return decode_dense(to_dense(code, n_ov_heads), W_O)
    flat: Tensor = decode_code(
        rearrange(code.values, "b s k -> (b s) k").to(W_O.dtype).contiguous(),
        rearrange(code.indices, "b s k -> (b s) k").contiguous(),
        W_O.contiguous(),
    )
    return rearrange(flat, "(b s) m -> b s m", b=code.values.shape[0])


def decode_dense(
    acts: Float[Tensor, "batch pos ov_head"], W_O: Float[Tensor, "ov_head d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """`sum_i z^i w_O^i` over all heads."""
    return einsum(acts, W_O, "batch pos ov_head, ov_head d_model -> batch pos d_model")


def compact(acts: Float[Tensor, "batch pos ov_head"], stays: Tensor) -> Code:
    """The code of the heads for which `stays` is true, in the order of their indices.

    Args:
        acts: activations.
        stays: Bool[Tensor, "batch pos ov_head"]; which of them belong to the code.
    """
    n_slots = max(1, int(stays.sum(-1).max())) if stays.numel() else 1
    order = stays.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    indices = order[..., :n_slots]
    values = acts.gather(-1, indices)
    return Code(values.masked_fill(~stays.gather(-1, indices), 0.0), indices)


def keep_all(acts: Float[Tensor, "batch pos ov_head"]) -> Code:
    """The code in which every head stays; its indices take no memory."""
    batch, pos, n_ov_heads = acts.shape
    indices = torch.arange(n_ov_heads, device=acts.device)
    return Code(acts, repeat(indices, "h -> b s h", b=batch, s=pos))
