"""Scores, patterns, and the attention that needs neither of them whole.

`head` counts query-key circuits here; each mixes the values of its group of rank-1 heads.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorsa_lens.functional.masks import AttentionMask, alibi_bias

BLOCK_ELEMENTS = 2**22
"""Scores that `attend` holds at a time: 16 MB in float32."""


def attention_scores(
    q: Float[Tensor, "batch query head dim"],
    k: Float[Tensor, "batch key head dim"],
    mask: AttentionMask,
    *,
    divisor: float,
    soft_cap: float | None = None,
    alibi_slopes: Float[Tensor, " head"] | None = None,
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Scores of some queries against some keys, minus infinity where the mask hides a key.

    Half-precision inputs give float32 scores.

    Args:
        q: queries, those of the rows asked for.
        k: keys, those of the columns asked for.
        mask: who sees whom.
        divisor: what the products are divided by.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        alibi_slopes: penalty per slot of distance.
        queries: which rows of the whole these are. None: all.
        keys: which columns. None: all.
    """
    queries = queries or (0, mask.n_queries)
    keys = keys or (0, mask.n_keys)
    q_rows = rearrange(q, "b q h d -> b h q d") / divisor
    scores = q_rows @ rearrange(k, "b k h d -> b h d k")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        distances = mask.distances(queries, keys, q.device)
        scores = scores + alibi_bias(alibi_slopes.to(scores.dtype), distances)
    visible = mask.visible(queries, keys, q.device)
    if visible is not None:
        scores = scores.masked_fill_(~visible[:, None], -torch.inf)  # a tensor of our own
    return scores


def attention_pattern(
    scores: Float[Tensor, "batch head query key"], *, blind: bool = True
) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys.

    Args:
        scores: scores.
        blind: some queries may see no key (padding): these attend to nothing, zeros and no NaN.
    """
    pattern = torch.softmax(scores, dim=-1)
    return pattern.nan_to_num(nan=0.0) if blind else pattern


def mix_values(
    pattern: Float[Tensor, "batch head query key"], values: Float[Tensor, "batch key ov_head"]
) -> Float[Tensor, "batch query ov_head"]:
    """Pre-activations `z[q] = sum_k A[q, k] v[k]` of every rank-1 head."""
    grouped = rearrange(values, "b k (h g) -> b h k g", h=pattern.shape[1])
    return rearrange(pattern.to(values.dtype) @ grouped, "b h q g -> b q (h g)")


def attend(
    q: Float[Tensor, "batch query head dim"],
    k: Float[Tensor, "batch key head dim"],
    values: Float[Tensor, "batch key ov_head"],
    mask: AttentionMask,
    *,
    divisor: float,
    soft_cap: float | None = None,
    alibi_slopes: Float[Tensor, " head"] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Float[Tensor, "batch query ov_head"]:
    """What `mix_values(attention_pattern(attention_scores(...)), values)` gives, block by block.

    Blocks of queries meet only the keys that they can see, so that no [head, query, key] tensor
    exists: memory grows with the number of keys, not with its square. Where there are several
    blocks, the backward pass computes them again instead of storing them.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        values: values `x w_V + b_V` of every rank-1 head.
        mask: who sees whom.
        divisor: as in `attention_scores`.
        soft_cap: as in `attention_scores`.
        alibi_slopes: as in `attention_scores`.
        block_elements: scores held at a time.
    """

    def block(q_rows: Tensor, k_seen: Tensor, v_seen: Tensor, start: int, first: int) -> Tensor:
        scores = attention_scores(
            q_rows,
            k_seen,
            mask,
            divisor=divisor,
            soft_cap=soft_cap,
            alibi_slopes=alibi_slopes,
            queries=(start, start + q_rows.shape[1]),
            keys=(first, first + k_seen.shape[1]),
        )
        return mix_values(attention_pattern(scores, blind=mask.keep is not None), v_seen)

    batch, n_queries, n_heads, _ = q.shape
    rows = max(1, block_elements // max(1, batch * n_heads * mask.n_keys))
    if rows >= n_queries:
        return block(q, k, values, 0, 0)
    recompute = torch.is_grad_enabled()
    out = values.new_empty(batch, 0 if recompute else n_queries, values.shape[-1])
    blocks = []
    for start in range(0, n_queries, rows):
        stop = min(start + rows, n_queries)
        first, last = mask.key_range(start, stop)
        inputs = (q[:, start:stop], k[:, first:last], values[:, first:last], start, first)
        if recompute:
            blocks.append(checkpoint(block, *inputs, use_reentrant=False))
        else:
            out[:, start:stop] = block(*inputs)
    return torch.cat(blocks, dim=1) if recompute else out
