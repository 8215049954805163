"""The attention of a Lorsa: from the input to the activation of every head, before selection."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.functional.attention import (
    attend,
    attention_pattern,
    attention_scores,
    mix_values,
)
from lorsa_lens.functional.masks import AttentionMask, plain_alibi_slopes
from lorsa_lens.functional.norm import qk_rms_norm
from lorsa_lens.functional.precision import product_dtype
from lorsa_lens.functional.projection import project_heads, project_values
from lorsa_lens.functional.rotary import plain_frequencies, rotary_angles, rotate
from lorsa_lens.functional.tiles import Tiling, mix_by_tiles
from lorsa_lens.functional.workspace import Workspace, blocks
from lorsa_lens.parameters import LorsaParameters

HELD = 2**20
"""Elements of queries, keys and values that exist together where nobody looks at them."""


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
        return einsum(pattern, _flat(v)[..., list(ov_heads)], "b head q k, b k head -> b head q k")

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
        """Queries, keys and values with those of the past, by circuit, and who sees whom."""
        source = self._source(x, qk_input)
        n_past = 0 if past is None else past.k.shape[1]
        n_new = x.shape[1]
        angles = self._angles_of_tokens(positions, n_past, n_new)
        q = self._looking(source, "Q", angles)
        k = self._looking(source, "K", angles)
        v = project_values(x, self.W_V, self.b_V, self.cfg.group_size)
        if self._watched(self.hook_values):
            v = self._by_circuit(self._fire(self.hook_values, _flat(v)))
        if past is not None:
            k = torch.cat((past.k, k), dim=1)
            v = torch.cat((self._by_circuit(past.v), v), dim=1)
        return q, k, v, self._mask(n_new, n_past + n_new, keep)

    def _source(self, x: Tensor, qk_input: Tensor | None) -> Tensor:
        """What queries and keys read."""
        self._check_input("x", x)
        if qk_input is None:
            return x
        self._check_input("qk_input", qk_input)
        return qk_input

    def _mask(self, n_queries: int, n_keys: int, keep: Tensor | None) -> AttentionMask:
        causal, window = self.cfg.attention_dir == "causal", self.cfg.window_size
        return AttentionMask(n_queries, n_keys, causal=causal, window=window, keep=keep)

    def _by_circuit(self, values: Tensor) -> Tensor:
        return rearrange(values, "b k (h g) -> b k h g", g=self.cfg.group_size)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        frequencies = cfg.rotary_frequencies or plain_frequencies(cfg.rotated_dim, cfg.rotary_base)
        dtype = getattr(torch, cfg.rotary_dtype)
        return rotary_angles(positions, frequencies, scale=cfg.rotary_scale, dtype=dtype)

    def _angles_of_tokens(
        self, positions: Tensor | None, n_past: int, n_new: int
    ) -> tuple[Tensor, Tensor] | None:
        """Angles at the new tokens' positions; None if nothing is rotated."""
        if not self.cfg.rotated_dim:
            return None
        if positions is None:
            positions = torch.arange(n_past, n_past + n_new, device=self.W_Q.device)[None]
        return self._angles(positions)

    def _looking(
        self,
        source: Tensor,
        side: Literal["Q", "K"],
        angles: tuple[Tensor, Tensor] | None,
        heads: slice = slice(None),
        room: Workspace | None = None,
    ) -> Tensor:
        """Queries or keys of some heads, normalized and rotated."""
        cfg = self.cfg
        weight, bias = getattr(self, f"W_{side}")[heads], getattr(self, f"b_{side}")[heads]
        weight, bias = weight.to(source.dtype), bias.to(source.dtype)
        before, after = (
            (self.hook_q, self.hook_rot_q) if side == "Q" else (self.hook_k, self.hook_rot_k)
        )
        adjacent_pairs = cfg.rotary_adjacent_pairs
        if cfg.qk_norm is None and not self._watched(before):
            turned = project_heads(
                source, weight, bias, angles, adjacent_pairs=adjacent_pairs, room=room
            )
            return self._fire(after, turned)
        t = self._fire(before, project_heads(source, weight, bias, room=room))
        if cfg.qk_norm is not None:
            gain = (self.q_norm if side == "Q" else self.k_norm)[heads]
            t = qk_rms_norm(t, gain, eps=cfg.qk_norm_eps, over=cfg.qk_norm)
        if angles is not None:
            t = rotate(t, *angles, adjacent_pairs=adjacent_pairs)
        return self._fire(after, t)

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

    def _pre_activations(self, x: Tensor, **context: Any) -> Tensor:
        """Every head's z before selection, in the leanest way that is not looked into."""
        if self._seen_by_nobody():
            return self._fire(self.hook_acts_pre, self._acts_by_heads(x, **context))
        return self._attended(*self._project(x, **context))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Every head's z before selection: without patterns, unless one is looked at."""
        if self._watched(self.hook_attn_scores) or self._watched(self.hook_pattern):
            scores = self._fire(self.hook_attn_scores, self._scores(q, k, mask))
            pattern = self._fire(self.hook_pattern, attention_pattern(scores).to(v.dtype))
            acts_pre = mix_values(pattern, _flat(v))
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
        return self._fire(self.hook_acts_pre, acts_pre)

    def _seen_by_nobody(self) -> bool:
        """Whether queries, keys, values and scores serve nothing but the activations."""
        on_the_way = (
            self.hook_q,
            self.hook_k,
            self.hook_values,
            self.hook_rot_q,
            self.hook_rot_k,
            self.hook_attn_scores,
            self.hook_pattern,
        )
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.cfg.qk_norm == "full"
            or any(map(self._watched, on_the_way))
        )

    def _acts_by_heads(
        self,
        x: Tensor,
        qk_input: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Activations of a few circuits' heads at a time; the rest's queries do not exist yet."""
        cfg, source = self.cfg, self._source(x, qk_input)
        batch, n_pos, _ = x.shape
        n_heads, group = self.W_Q.shape[0], cfg.group_size
        acts = x.new_empty(batch, n_pos, self.W_V.shape[0])
        angles, slopes = self._angles_of_tokens(positions, 0, n_pos), self._slopes()
        mask, dtype = self._mask(n_pos, n_pos, keep), product_dtype(x)
        x, source = x.to(dtype), source.to(dtype)
        rooms = [Workspace(x) for _ in range(3)]
        of_a_head = batch * n_pos * (2 * cfg.d_qk_head + group)
        for heads in blocks(n_heads, of_a_head, HELD, x.device):
            ov_heads = slice(heads.start * group, heads.stop * group)
            q = self._looking(source, "Q", angles, heads, rooms[0])
            k = self._looking(source, "K", angles, heads, rooms[1])
            weight, bias = self.W_V[ov_heads].to(dtype), self.b_V[ov_heads].to(dtype)
            v = project_values(x, weight, bias, group, rooms[2])
            slope = None if slopes is None else slopes[heads]
            tiling = Tiling(mask, cfg.score_divisor, cfg.attn_scores_soft_cap, slope)
            mix_by_tiles(q, k, v, tiling, acts[..., ov_heads])
        return acts


def _flat(v: Tensor) -> Tensor:
    """Values by rank-1 head, not by circuit."""
    return rearrange(v, "b k h g -> b k (h g)")
