"""Attention tile by tile, forward and backward: no [head, query, key] tensor exists.

A tile is some queries of some heads of some texts, against the keys that they can see; its scores
fit a processor's cache, in a workspace that all tiles share. Keys of the future are never met. The
backward pass makes the pattern of each tile again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lorsa_lens.functional.masks import AttentionMask, alibi_bias
from lorsa_lens.functional.workspace import Workspace, at_a_time

QUERIES, QUERIES_BACKWARD = 64, 128
"""Queries of a tile: few, so that little of the future is met at the diagonal; more where each tile
adds to the gradients of keys and values."""

SCORES = 2**19
"""Scores of a tile: 2 MB in float32, what a processor's cache holds."""


class Tile(NamedTuple):
    """Some queries of some heads of some texts, and the keys that they can see."""

    heads: slice
    texts: slice
    queries: slice
    keys: slice


@dataclass
class Tiling:
    """How attention is cut into tiles, and how the scores of one are made.

    Args:
        mask: who sees whom.
        divisor: what products of queries and keys are divided by.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        alibi_slopes: Float[Tensor, " head"]; penalty per slot of distance.
        n_scores: scores of a tile. None: what suits the device.
    """

    mask: AttentionMask
    divisor: float
    soft_cap: float | None
    alibi_slopes: Tensor | None
    n_scores: int | None = None

    def sizes(self, k: Tensor, v: Tensor, n_queries: int) -> tuple[int, int]:
        """Queries and matrices of a tile of `n_queries` at most."""
        n_scores, n_keys = self._n_scores(k.device), max(1, self.mask.n_keys)
        n_queries = min(at_a_time(n_queries, k.device), self.mask.n_queries, n_scores // n_keys)
        return max(1, n_queries), self.n_matrices(max(1, n_queries), k, v)

    def n_matrices(self, n_queries: int, k: Tensor, v: Tensor) -> int:
        """Matrices (one head of one text each) to work on together, of so many queries each.

        Their keys and values are no larger than the scores of a tile may be.
        """
        of_a_matrix = max(1, self.mask.n_keys) * max(n_queries, k.shape[3], v.shape[3])
        return max(1, self._n_scores(k.device) // of_a_matrix)

    def _n_scores(self, device: torch.device) -> int:
        return self.n_scores or at_a_time(SCORES, device)

    def rows(self, n_queries: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that any of its queries can see."""
        for start in range(0, self.mask.n_queries, n_queries):
            stop = min(start + n_queries, self.mask.n_queries)
            yield slice(start, stop), slice(*self.mask.key_range(start, stop))

    def score(self, products: Tensor, tile: Tile) -> None:
        """Make scores of the products of queries and keys, in place.

        Args:
            products: Float[Tensor, "matrix query key"], divided already; heads before texts.
            tile: whose they are.
        """
        if self.soft_cap is not None:
            products.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        heads, texts, rows, keys = tile
        by_head = rearrange(products, "(h b) q k -> h b q k", h=heads.stop - heads.start)
        rows_keys = (rows.start, rows.stop), (keys.start, keys.stop)
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes[heads].to(products.dtype)
            distances = self.mask.distances(*rows_keys, products.device)
            by_head += alibi_bias(slopes, distances)[:, None]
        first = self.mask.first_hidden(*rows_keys)
        if first >= keys.stop:
            return
        if self.mask.window is None and self.mask.keep is None:
            by_head[..., first - keys.start :] += _future(
                rows.stop - rows.start, keys.stop - first, products.dtype, products.device
            )
            return
        visible = self.mask.visible((rows.start, rows.stop), (first, keys.stop), products.device)
        if visible is not None:
            visible = visible if visible.shape[0] == 1 else visible[texts]
            by_head[..., first - keys.start :].masked_fill_(~visible, -torch.inf)


@lru_cache(maxsize=8)
def _future(n_queries: int, n_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity for keys of the future, the first key being that after the first query."""
    bias = torch.full((n_queries, n_keys), -torch.inf, dtype=dtype, device=device)
    return bias.triu_()


class Tiles:
    """Queries, keys and values, and the patterns of their tiles.

    Args:
        q: Float[Tensor, "batch query head dim"].
        k: Float[Tensor, "batch key head dim"].
        v: Float[Tensor, "batch key head group"].
        tiling: how they are cut.
        n_queries: queries of a tile, at most.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, n_queries: int) -> None:
        self.q, self.k, self.v, self.tiling = q, k, v, tiling
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.n_queries, self.n_matrices = tiling.sizes(k, v, n_queries)
        self.scores, self.patterns = Workspace(q), Workspace(q, self.wide)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Heads and texts whose matrices are worked on together."""
        n_texts, n_heads = self.q.shape[0], self.q.shape[2]
        heads = max(1, self.n_matrices // max(1, n_texts))
        texts = min(max(1, n_texts), self.n_matrices)
        for head in range(0, n_heads, heads):
            for text in range(0, n_texts, texts):
                yield (
                    slice(head, min(head + heads, n_heads)),
                    slice(text, min(text + texts, n_texts)),
                )

    def pattern(self, q_rows: Tensor, k_seen: Tensor, tile: Tile) -> Tensor:
        """Float[Tensor, "matrix query key"] of a tile, in the workspace."""
        shape = (q_rows.shape[0], q_rows.shape[1], k_seen.shape[1])
        scores = self.scores(*shape)
        torch.baddbmm(
            scores, q_rows, k_seen.mT, beta=0.0, alpha=1 / self.tiling.divisor, out=scores
        )
        scores = scores.to(self.wide)
        self.tiling.score(scores, tile)
        pattern = torch.softmax(scores, dim=-1, out=self.patterns(*shape))
        blind = self.tiling.mask.keep is not None  # some queries may see no key
        return pattern.nan_to_num_(nan=0.0) if blind else pattern

    def through_softmax(self, grad: Tensor, pattern: Tensor) -> Tensor:
        """The gradient for products of queries and keys, in place of that for the pattern."""
        torch.ops.aten._softmax_backward_data.out(grad, pattern, -1, pattern.dtype, grad_input=grad)
        return grad.div_(self.tiling.divisor)


def _matrices(tensor: Tensor, heads: slice, texts: slice, workspace: Workspace) -> Tensor:
    """The matrices of some heads of some texts: [batch, pos, head, dim] to [matrix, pos, dim].

    A view if the strides allow it, else a copy in the workspace.
    """
    by_head = rearrange(tensor[texts, :, heads], "b s h d -> h b s d")
    n_heads, n_texts = by_head.shape[:2]
    if n_heads > 1 and n_texts > 1 and by_head.stride(0) != n_texts * by_head.stride(1):
        by_head = workspace(*by_head.shape).copy_(by_head)
    return by_head.flatten(0, 1)


def mix_by_tiles(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, out: Tensor) -> Tensor:
    """Pre-activations.

    Args:
        q: Float[Tensor, "batch query head dim"].
        k: Float[Tensor, "batch key head dim"].
        v: Float[Tensor, "batch key head group"].
        tiling: how they are cut.
        out: Float[Tensor, "batch query ov_head"]; where they go.
    """
    tiles = Tiles(q, k, v, tiling, QUERIES)
    by_head = rearrange(out, "b q (h g) -> b q h g", g=v.shape[3])
    mixes, copies = Workspace(v), [Workspace(t) for t in (q, k, v)]
    for heads, texts in tiles.chunks():
        q_all, k_all, v_all = (
            _matrices(t, heads, texts, copy) for t, copy in zip((q, k, v), copies, strict=True)
        )
        for rows, keys in tiling.rows(tiles.n_queries):
            tile = Tile(heads, texts, rows, keys)
            pattern = tiles.pattern(q_all[:, rows], k_all[:, keys], tile).to(v.dtype)
            seen = v_all[:, keys]
            if v.shape[3] == 1:  # one head a circuit: products with a vector
                mixed = pattern.mul_(seen.mT).sum(-1, keepdim=True)
            else:
                mixed = mixes(*pattern.shape[:2], v.shape[3])
                torch.bmm(pattern, seen, out=mixed)
            n_heads = heads.stop - heads.start
            by_head[texts, rows, heads] = rearrange(mixed, "(h b) q g -> b q h g", h=n_heads)
    return out


def mix_by_tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for queries, keys and values, given that for the pre-activations."""
    tiles = Tiles(q, k, v, tiling, QUERIES_BACKWARD)
    grad = rearrange(grad, "b q (h g) -> b q h g", g=v.shape[3])
    given = (q, k, v, grad)
    copies = [Workspace(t) for t in given]
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    sums = [Workspace(t, tiles.wide) for t in (q, k, v)]
    upstreams = Workspace(v)
    for heads, texts in tiles.chunks():
        q_all, k_all, v_all, up_all = (
            _matrices(t, heads, texts, copy) for t, copy in zip(given, copies, strict=True)
        )
        for_q, for_k, for_v = (
            room(*t.shape).zero_() for t, room in zip((q_all, k_all, v_all), sums, strict=True)
        )
        for rows, keys in tiling.rows(tiles.n_queries):
            q_rows, k_seen, up = q_all[:, rows], k_all[:, keys], up_all[:, rows]
            pattern = tiles.pattern(q_rows, k_seen, Tile(heads, texts, rows, keys))
            for_v[:, keys].baddbmm_(pattern.mT, up.to(tiles.wide))
            upstream = torch.bmm(up, v_all[:, keys].mT, out=upstreams(*pattern.shape))
            for_scores = tiles.through_softmax(upstream.to(tiles.wide), pattern)
            if tiling.soft_cap is not None:
                capped = torch.bmm(q_rows, k_seen.mT).to(tiles.wide)
                capped.div_(tiling.divisor * tiling.soft_cap).tanh_()
                for_scores.mul_(1 - capped.square_())
            for_q[:, rows].baddbmm_(for_scores, k_seen.to(tiles.wide))
            for_k[:, keys].baddbmm_(for_scores.mT, q_rows.to(tiles.wide))
        for whole, part in zip(grads, (for_q, for_k, for_v), strict=True):
            n_heads = heads.stop - heads.start
            whole[texts, :, heads] = rearrange(part, "(h b) s d -> b s h d", h=n_heads)
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v
