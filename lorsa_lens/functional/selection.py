"""Which heads stay at a token, judged by how much they would write.

No gradient flows through the writing norms: they decide what stays, not what it is worth.
"""

from typing import Any, cast

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lorsa_lens.functional.code import Code, compact
from lorsa_lens.functional.workspace import at_a_time

SCORES_HELD = 2**20
"""Scores that `select_topk` holds at a time."""

MEMBERS = 8
"""Heads of a set, of which `select_topk` looks at the largest first."""


def writing_norms(W_O: Float[Tensor, "ov_head d_model"]) -> Float[Tensor, " ov_head"]:
    """`||w_O||` of every head, outside the autograd graph."""
    norms: Tensor = torch.linalg.vector_norm(W_O.detach(), dim=-1)
    return norms


def select_topk(
    acts: Float[Tensor, "batch pos ov_head"],
    norms: Float[Tensor, " ov_head"],
    k: int,
    *,
    positive: bool = False,
) -> Code:
    """The `k` heads of each token that write most: the largest `|z| * ||w_O||`.

    Args:
        acts: pre-activations z.
        norms: writing norms.
        k: how many stay.
        positive: only positive z count, by `relu(z) * ||w_O||`.
    """
    flat = rearrange(acts.detach(), "b s h -> (b s) h")
    n_rows = max(1, at_a_time(SCORES_HELD, acts.device) // max(1, flat.shape[1]))
    parts = [_largest(part, norms, k, positive) for part in torch.split(flat, n_rows)]
    indices = rearrange(torch.cat(parts), "(b s) k -> b s k", b=acts.shape[0])
    values = cast(Tensor, _Chosen.apply(acts, indices))  # type: ignore[no-untyped-call]
    return Code(values.relu() if positive else values, indices)


class _Chosen(torch.autograd.Function):
    """Entries at indices that differ from each other; the gradient fills one tensor of zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, acts: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = acts.shape  # type: ignore[attr-defined]
        return acts.gather(-1, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,), (indices,) = grads, ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(-1, indices, grad), None


def _largest(
    acts: Float[Tensor, "token ov_head"], norms: Float[Tensor, " ov_head"], k: int, positive: bool
) -> Int[Tensor, "token slot"]:
    """The `k` heads of each token with the largest scores, in two exact stages.

    Heads are dealt out into sets; those that are searched for lie in the `k` sets with the largest
    maxima.
    """
    scores = acts * norms
    scores = scores.clamp_(min=0) if positive else scores.abs_()
    n_heads = scores.shape[1]
    n_sets = n_heads // MEMBERS
    if n_heads % MEMBERS or 2 * k * MEMBERS >= n_heads:
        return scores.topk(k, dim=-1, sorted=False).indices
    by_set = rearrange(scores, "t (member set) -> t member set", set=n_sets)
    sets = by_set.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = by_set.gather(2, repeat(sets, "t k -> t member k", member=MEMBERS))
    best = candidates.flatten(1).topk(k, dim=-1, sorted=False).indices
    return (best // k) * n_sets + sets.gather(1, best % k)


def batch_threshold(
    acts: Float[Tensor, "batch pos ov_head"], norms: Float[Tensor, " ov_head"], k: int
) -> Float[Tensor, ""]:
    """The score of the last head that stays when a batch keeps `k` heads per token on average.

    That is BatchTopK (arXiv 2412.06410) with scores `|z| * ||w_O||`.
    """
    scores = (acts.detach().abs() * norms).flatten()
    n_kept = min(k * acts.shape[0] * acts.shape[1], scores.numel())
    if n_kept == 0:
        return scores.new_zeros(())
    return scores.topk(n_kept, sorted=False).values.min()


def select_above(
    acts: Float[Tensor, "batch pos ov_head"],
    norms: Float[Tensor, " ov_head"],
    threshold: Float[Tensor, ""],
) -> Code:
    """Heads whose `|z| * ||w_O||` reaches a threshold common to all."""
    return compact(acts, acts.detach().abs() * norms >= threshold)


def select_positive(acts: Float[Tensor, "batch pos ov_head"]) -> Code:
    """Every head with positive z."""
    return compact(acts, acts > 0)


def select_jumprelu(
    acts: Float[Tensor, "batch pos ov_head"],
    norms: Float[Tensor, " ov_head"],
    thresholds: Float[Tensor, " ov_head"],
    bandwidth: float,
) -> Code:
    """Heads whose `z * ||w_O||` exceeds their own threshold (JumpReLU, arXiv 2407.14435).

    Args:
        acts: pre-activations z.
        norms: writing norms.
        thresholds: positive, in units of `z * ||w_O||`.
        bandwidth: width of the window around the threshold in which it receives gradient.
    """
    scores = acts.detach() * norms
    stays = scores > thresholds
    if torch.is_grad_enabled() and thresholds.requires_grad:
        # Heads just below their threshold stay with value 0, so that it receives their gradient.
        candidates = scores > thresholds.detach() - bandwidth / 2
    else:
        candidates = stays
    jumped = cast(Tensor, _JumpReLU.apply(acts, norms, thresholds, bandwidth))  # type: ignore[no-untyped-call]
    return compact(jumped, candidates)


class _JumpReLU(torch.autograd.Function):
    """`z * [z * norm > threshold]`, with the rectangle kernel's gradient for the threshold."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, acts: Tensor, norms: Tensor, thresholds: Tensor, bandwidth: float
    ) -> Tensor:
        scores = acts * norms
        ctx.save_for_backward(acts, norms, thresholds)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]
        return acts * (scores > thresholds)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor, None]:
        (grad,) = grads
        acts, norms, thresholds = ctx.saved_tensors
        scores = acts * norms
        near = (scores - thresholds).abs() < ctx.bandwidth / 2
        # d/d threshold of z H(z n - threshold) is -z delta(z n - threshold), and z = threshold / n
        # where the delta is.
        jump = thresholds / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        grad_thresholds = -(jump / ctx.bandwidth) * (grad * near).sum((0, 1))
        return grad * (scores > thresholds), None, grad_thresholds, None
