"""Gradients of attention where few queries of each head have any.

Of a sparse code only the chosen heads send a gradient back. Where each circuit serves few heads,
most of its queries then have none, and only the patterns of the others are made again.
"""

import torch
from einops import rearrange
from torch import Tensor

from lorsa_lens.functional.tiles import Tiling

FEW = 0.25
"""Share of active rows up to which only these are worked on."""

SAMPLED = 16
"""One query in so many is asked first whether the active ones are few."""


def few_active_rows(grad: Tensor, group: int) -> Tensor | None:
    """`active_rows` if they are few; None if they are not, which a sample of them mostly tells."""
    for part in (grad[:, ::SAMPLED], grad):
        active = active_rows(part, group)
        if active.sum() > FEW * active.numel():
            return None
    return active


def active_rows(grad: Tensor, group: int) -> Tensor:
    """Bool[Tensor, "batch query head"]: whether any rank-1 head of a circuit has a gradient.

    Args:
        grad: Float[Tensor, "batch query ov_head"].
        group: rank-1 heads of each circuit.
    """
    return rearrange(grad != 0, "b q (h g) -> b q h g", g=group).any(-1)


def mix_backward_of_rows(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `mix_by_tiles_backward` gives, from the active rows alone.

    Heads of texts are taken in the order of how many active rows they have, so that those worked on
    together have about equally many.
    """
    n_texts = q.shape[0]
    grad = rearrange(grad, "b q (h g) -> b q h g", g=v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, k, v))
    by_matrix = rearrange(active, "b q h -> (h b) q")
    counts, matrices = by_matrix.sum(-1).sort(descending=True)
    sizes, start = counts.tolist(), 0
    while start < len(sizes) and sizes[start] > 0:
        n_rows = sizes[start]
        chunk = matrices[start : start + tiling.n_matrices(n_rows, k, v)]
        start += len(chunk)
        head, text = chunk // n_texts, chunk % n_texts
        # Which rows: the active ones, then others, whose gradient is zero.
        rows = by_matrix[chunk].to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        rows = rows[:, :n_rows]
        at = text[:, None], rows, head[:, None]
        q_rows, up = q[at].to(wide), grad[at].to(wide)
        k_all, v_all = k[text, :, head].to(wide), v[text, :, head].to(wide)
        scores = torch.bmm(q_rows, k_all.mT).div_(tiling.divisor)
        slope = None
        if tiling.soft_cap is not None:
            scores.div_(tiling.soft_cap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(tiling.soft_cap)
        _hide(scores, tiling, head, text, rows)
        pattern = torch.softmax(scores, dim=-1).nan_to_num_(nan=0.0)
        upstream = torch.bmm(up, v_all.mT).mul_(pattern)
        upstream.addcmul_(pattern, upstream.sum(-1, keepdim=True), value=-1)
        for_products = upstream.div_(tiling.divisor)
        if slope is not None:
            for_products.mul_(slope)
        grad_q[at] = torch.bmm(for_products, k_all).to(q.dtype)
        grad_k[text, :, head] = torch.bmm(for_products.mT, q_rows).to(k.dtype)
        grad_v[text, :, head] = torch.bmm(pattern.mT, up).to(v.dtype)
    return grad_q, grad_k, grad_v


def _hide(scores: Tensor, tiling: Tiling, head: Tensor, text: Tensor, rows: Tensor) -> None:
    """Bias, and minus infinity where a query does not see a key, in place.

    Args:
        scores: Float[Tensor, "matrix row key"].
        tiling: the rules.
        head: Int[Tensor, " matrix"]; of which head each matrix is.
        text: Int[Tensor, " matrix"]; of which text.
        rows: Int[Tensor, "matrix row"]; which queries.
    """
    mask = tiling.mask
    distances = (rows + mask.offset)[..., None] - torch.arange(mask.n_keys, device=rows.device)
    if tiling.alibi_slopes is not None:
        slopes = tiling.alibi_slopes.to(scores.dtype)[head, None, None]
        scores.sub_(slopes * distances.clamp(min=0))
    if mask.causal:
        scores.masked_fill_(distances < 0, -torch.inf)
    if mask.window is not None:
        scores.masked_fill_(distances >= mask.window, -torch.inf)
    if mask.keep is not None:
        own = mask.keep.shape[1] > 1
        kept = mask.keep[text[:, None], rows] if own else mask.keep[text]
        scores.masked_fill_(~kept, -torch.inf)
