"""Scores, patterns, and the attention that needs neither of them whole.

`head` counts query-key circuits here; each mixes the values of its group of rank-1 heads.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.functional.masks import AttentionMask, alibi_bias
from lorsa_lens.functional.pattern_free import mix


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
    v: Float[Tensor, "batch key head group"],
    mask: AttentionMask,
    *,
    divisor: float,
    soft_cap: float | None = None,
    alibi_slopes: Float[Tensor, " head"] | None = None,
    n_scores: int | None = None,
) -> Float[Tensor, "batch query ov_head"]:
    """What `mix_values(attention_pattern(attention_scores(...)), v)` gives, tile by tile.

    Queries meet only the keys that they can see, and no [head, query, key] tensor exists: memory
    grows with the number of keys, not with its square. The backward pass makes the patterns again
    instead of storing them, and only where there is a gradient. Slopes get none.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values `x w_V + b_V` of every rank-1 head, by circuit.
        mask: who sees whom.
        divisor: as in `attention_scores`.
        soft_cap: as in `attention_scores`.
        alibi_slopes: as in `attention_scores`.
        n_scores: scores held at a time. None: what suits the device.
    """
    out: Tensor = mix(
        q,
        k,
        v,
        mask.keep,
        alibi_slopes,
        mask.causal,
        mask.window,
        float(divisor),
        soft_cap,
        n_scores,
    )
    return out
