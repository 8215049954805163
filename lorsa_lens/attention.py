"""The attention of a Lorsa: from the input to the activation of every head, before selection."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.functional.attention import (
    attend,
    attention_pattern,
    attention_scores,
    mix_values,
)
from lorsa_lens.functional.masks import AttentionMask, plain_alibi_slopes
from lorsa_lens.functional.norm import qk_rms_norm
from lorsa_lens.functional.rotary import plain_frequencies, rotary_angles, rotate
from lorsa_lens.parameters import LorsaParameters


class LorsaState(NamedTuple):
    """Keys and values of the tokens so far: what a Lorsa keeps in a KV cache."""

    k: Float[Tensor, "batch key n_qk_heads d_qk_head"]
    """Keys, rotated."""

    v: Float[Tensor, "batch key n_ov_heads"]
    """Values `x w_V + b_V`."""


class LorsaAttention(LorsaParameters):
    """The half of a Lorsa that looks: queries, keys and values, patterns, pre-activations."""

    def pattern(
        self, x: Float[Tensor, "batch pos d_model"], qk_heads: Sequence[int], **context: Any
    ) -> Float[Tensor, "batch qk_head query key"]:
        """Attention patterns of chosen query-key circuits; the others' are not formed.

        Args:
            x: as in `forward`.
            qk_heads: which circuits.
            **context: `qk_input`, `positions`, `keep`, as in `forward`.
        """
        (pattern,) = self.pattern_blocks(x, [qk_heads], **context)
        return pattern

    def pattern_blocks(
        self, x: Float[Tensor, "batch pos d_model"], blocks: Iterable[Sequence[int]], **context: Any
    ) -> Iterator[Float[Tensor, "batch qk_head query key"]]:
        """`pattern` of one block of circuits after another; only one is held at a time.

        Args:
            x: as in `forward`.
            blocks: which circuits, block by block; a circuit may come again.
            **context: `qk_input`, `positions`, `keep`, as in `forward`.
        """
        q, k, _, mask = self._project(x, **context)
        for qk_heads in blocks:
            yield attention_pattern(self._scores(q, k, mask, qk_heads))

    def z_pattern(
        self,
        x: Float[Tensor, "batch pos d_model"],
        ov_heads: Sequence[int],
        *,
        queries: Sequence[int] | None = None,
        **context: Any,
    ) -> Float[Tensor, "batch ov_head query key"]:
        """What each source token contributes to chosen heads: `A[q, k] v[k]`.

        Over the keys it sums to the head's pre-activation at the query.

        Args:
            x: as in `forward`.
            ov_heads: which rank-1 heads.
            queries: at which positions; the patterns at others are not formed. None: all.
            **context: `qk_input`, `positions`, `keep`, as in `forward`.
        """
        q, k, v, mask = self._project(x, **context)
        circuits = [head // self.cfg.group_size for head in ov_heads]
        if queries is None:
            scores = self._scores(q, k, mask, circuits)
        else:
            rows = [self._scores(q, k, mask, circuits, (at, at + 1)) for at in queries]
            scores = torch.cat(rows, dim=2)
        pattern = attention_pattern(scores).to(v.dtype)
        return einsum(pattern, v[..., list(ov_heads)], "b head q k, b k head -> b head q k")

    def queries_and_keys(
        self, x: Float[Tensor, "batch pos d_model"], **context: Any
    ) -> tuple[
        Float[Tensor, "batch pos n_qk_heads d_qk_head"],
        Float[Tensor, "batch pos n_qk_heads d_qk_head"],
    ]:
        """Queries and keys, normalized and rotated: their products are scores times the divisor.

        Args:
            x: as in `forward`.
            **context: `qk_input`, `positions`, as in `forward`.
        """
        q, k, _, _ = self._project(x, **context)
        return q, k

    def _project(
        self,
        x: Tensor,
        qk_input: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        past: LorsaState | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
        """Queries, keys and values with those of the past, and who sees whom."""
        cfg = self.cfg
        self._check_input("x", x)
        if qk_input is not None:
            self._check_input("qk_input", qk_input)
        n_past = 0 if past is None else past.k.shape[1]
        n_new = x.shape[1]
        source = x if qk_input is None else qk_input
        q = self._fire(self.hook_q, self._queries(source, self.W_Q, self.b_Q))
        k = self._fire(self.hook_k, self._queries(source, self.W_K, self.b_K))
        v = self._fire(self.hook_values, nn.functional.linear(x, self.W_V, self.b_V))
        if cfg.qk_norm is not None:
            q = qk_rms_norm(q, self.q_norm, eps=cfg.qk_norm_eps, over=cfg.qk_norm)
            k = qk_rms_norm(k, self.k_norm, eps=cfg.qk_norm_eps, over=cfg.qk_norm)
        if cfg.rotated_dim:
            if positions is None:
                positions = torch.arange(n_past, n_past + n_new, device=x.device)[None]
            cos, sin = self._angles(positions)
            q = rotate(q, cos, sin, adjacent_pairs=cfg.rotary_adjacent_pairs)
            k = rotate(k, cos, sin, adjacent_pairs=cfg.rotary_adjacent_pairs)
        q, k = self._fire(self.hook_rot_q, q), self._fire(self.hook_rot_k, k)
        if past is not None:
            k, v = torch.cat((past.k, k), dim=1), torch.cat((past.v, v), dim=1)
        mask = AttentionMask(
            n_new,
            n_past + n_new,
            causal=cfg.attention_dir == "causal",
            window=cfg.window_size,
            keep=keep,
        )
        return q, k, v, mask

    def _queries(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Queries or keys of all circuits by one matrix product."""
        flat = nn.functional.linear(
            x, rearrange(weight, "h m d -> (h d) m"), rearrange(bias, "h d -> (h d)")
        )
        return rearrange(flat, "b s (h d) -> b s h d", h=weight.shape[0])

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        frequencies = cfg.rotary_frequencies or plain_frequencies(cfg.rotated_dim, cfg.rotary_base)
        dtype = getattr(torch, cfg.rotary_dtype)
        return rotary_angles(positions, frequencies, scale=cfg.rotary_scale, dtype=dtype)

    def _slopes(self) -> Tensor | None:
        cfg = self.cfg
        if cfg.positional_embedding_type != "alibi":
            return None
        slopes = cfg.alibi_slopes or plain_alibi_slopes(cfg.n_qk_heads)
        return torch.tensor(slopes, device=self.W_Q.device, dtype=self.W_Q.dtype)

    def _scores(
        self,
        q: Tensor,
        k: Tensor,
        mask: AttentionMask,
        circuits: Sequence[int] | None = None,
        queries: tuple[int, int] | None = None,
    ) -> Tensor:
        """Scores of all circuits, or of chosen ones only; of all queries, or of a range."""
        slopes = self._slopes()
        if queries is not None:
            q = q[:, slice(*queries)]
        if circuits is not None:
            self._check_heads(circuits, self.cfg.n_qk_heads)
            chosen = list(circuits)
            q, k = q[:, :, chosen], k[:, :, chosen]
            slopes = None if slopes is None else slopes[chosen]
        return attention_scores(
            q,
            k,
            mask,
            divisor=self.cfg.score_divisor,
            soft_cap=self.cfg.attn_scores_soft_cap,
            alibi_slopes=slopes,
            queries=queries,
        )

    def _pre_activations(
        self,
        x: Tensor,
        qk_input: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        past: LorsaState | None = None,
    ) -> tuple[Tensor, LorsaState]:
        """Every head's z before selection: without patterns, unless one is looked at."""
        q, k, v, mask = self._project(x, qk_input, positions, keep, past)
        if self._watched(self.hook_attn_scores) or self._watched(self.hook_pattern):
            scores = self._fire(self.hook_attn_scores, self._scores(q, k, mask))
            pattern = self._fire(self.hook_pattern, attention_pattern(scores).to(v.dtype))
            acts_pre = mix_values(pattern, v)
        else:
            acts_pre = attend(
                q,
                k,
                v,
                mask,
                divisor=self.cfg.score_divisor,
                soft_cap=self.cfg.attn_scores_soft_cap,
                alibi_slopes=self._slopes(),
            )
        return self._fire(self.hook_acts_pre, acts_pre), LorsaState(k, v)
