"""`QKHead`: the query-key form of one attention head, or of one query-key circuit of a Lorsa."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.config import AttentionSpec
from lorsa_lens.functional.masks import AttentionMask, plain_alibi_slopes
from lorsa_lens.hosts import AttentionWeights, InputNorm, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.basis import Basis, HeadBasis, head_basis
from lorsa_lens.singular.projection import Projection, projection
from lorsa_lens.singular.rotation import Rotation, rotation_of
from lorsa_lens.site import reads_normalized

Origin = Literal["attention", "lorsa"]


@dataclass(frozen=True, kw_only=True, eq=False)
class QKHead:
    """How one head turns what it reads into a pattern, and a basis for its scores.

    One class serves both levels: `from_attention` and `from_lorsa`. Everything is in float64.
    `reading(x)` applies it to a prompt.
    """

    origin: Origin
    layer: int
    index: int
    query: Projection
    key: Projection
    spec: AttentionSpec
    divisor: float
    """What scores are divided by."""
    alibi_slope: float | None = None
    input_norm: InputNorm | None = None
    """Affine part of the norm that is to be undone first: the head reads the normalized stream."""
    kind: Basis = "singular"
    seed: int = 0

    @classmethod
    def from_attention(
        cls, model: nn.Module, layer: int, head: int, *, basis: Basis = "singular", seed: int = 0
    ) -> "QKHead":
        """The form of an attention head of a host.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            layer: which layer.
            head: which head; with grouped-query attention, which query head.
            basis: `singular`, `rotated` (a Haar rotation of it, the null), or `identity`.
            seed: of the rotation.

        Raises:
            ValueError: if there is no such layer, head or basis.
            UnsupportedAttentionError: if the attention does what no `AttentionSpec` says.
        """
        weights = host_of(model).read_attention(layer)
        return cls.from_weights(weights, layer, head, basis=basis, seed=seed)

    @classmethod
    def from_weights(
        cls,
        weights: AttentionWeights,
        layer: int,
        head: int,
        *,
        basis: Basis = "singular",
        seed: int = 0,
    ) -> "QKHead":
        """The same, of a layer that was read before."""
        spec, (n_heads, _, d_head) = weights.spec, weights.W_Q.shape
        _check_index(head, n_heads, layer)
        return cls(
            origin="attention",
            layer=layer,
            index=head,
            query=projection(weights.W_Q, weights.b_Q, weights.q_norm, head, spec),
            key=projection(weights.W_K, weights.b_K, weights.k_norm, head, spec),
            spec=spec,
            divisor=float(spec.attn_scale or d_head**0.5),
            alibi_slope=_alibi_slope(spec, head, n_heads),
            kind=basis,
            seed=seed,
        )

    @classmethod
    def from_lorsa(
        cls,
        lorsa: Lorsa,
        qk_head: int,
        *,
        model: nn.Module | None = None,
        basis: Basis = "singular",
        seed: int = 0,
    ) -> "QKHead":
        """The form of a query-key circuit of a Lorsa.

        Args:
            lorsa: with its `cfg.layer`.
            qk_head: which circuit.
            model: the host, needed only for a Lorsa that reads the normalized stream of a model
                whose layer norms are not folded.
            basis: as in `from_attention`.
            seed: as in `from_attention`.

        Raises:
            ValueError: if there is no such circuit or basis, or the Lorsa has no layer.
        """
        cfg = lorsa.cfg
        if cfg.layer is None:
            raise ValueError("the Lorsa's cfg.layer is None: say which layer it belongs to")
        _check_index(qk_head, cfg.n_qk_heads, cfg.layer)
        norm = None
        if model is not None and reads_normalized(lorsa):
            norm = host_of(model).input_norm(cfg.layer)
        q_norm, k_norm = (lorsa.q_norm, lorsa.k_norm) if cfg.qk_norm else (None, None)
        return cls(
            origin="lorsa",
            layer=cfg.layer,
            index=qk_head,
            query=projection(lorsa.W_Q, lorsa.b_Q, q_norm, qk_head, cfg),
            key=projection(lorsa.W_K, lorsa.b_K, k_norm, qk_head, cfg),
            spec=cfg,
            divisor=float(cfg.score_divisor),
            alibi_slope=_alibi_slope(cfg, qk_head, cfg.n_qk_heads),
            input_norm=None if norm is None else InputNorm(norm.gain.double(), norm.bias.double()),
            kind=basis,
            seed=seed,
        )

    @property
    def name(self) -> str:
        """As `L5.3` for an attention head, `L5.qk3` for a circuit of a Lorsa."""
        return f"L{self.layer}.{'qk' if self.origin == 'lorsa' else ''}{self.index}"

    @cached_property
    def basis(self) -> HeadBasis:
        """The basis: vectors, singular values, `G_Q` and `G_K`. The gain of a QK norm is in it."""
        W_Q, W_K = self.query.effective[0], self.key.effective[0]
        return head_basis(W_Q, W_K, basis=self.kind, seed=self.seed)

    def reading(
        self,
        x: Float[Tensor, "pos d_model"],
        *,
        positions: Int[Tensor, " pos"] | None = None,
        keep: Bool[Tensor, "#query key"] | None = None,
    ) -> "QKReading":
        """Queries, keys and scores on one prompt.

        Args:
            x: what queries and keys read: the input of the attention module (with shortformer
                positions, positions added).
            positions: position of each token. None: 0, 1, 2, ...
            keep: keys that may be seen, where some may not.
        """
        return read_prompt(self, x, positions, keep)


@dataclass(frozen=True, kw_only=True, eq=False)
class QKReading:
    """A `QKHead` on one prompt. Queries and keys are biased, normalized and rotated."""

    head: QKHead
    q: Float[Tensor, "query d_head"]
    k: Float[Tensor, "key d_head"]
    q_factor: Float[Tensor, " query"]
    k_factor: Float[Tensor, " key"]
    positions: Int[Tensor, " pos"]
    rotation: Rotation
    visible: Bool[Tensor, "query key"]
    bias: Float[Tensor, "query key"]
    """ALiBi's bias on scores, else 0."""

    @cached_property
    def a(self) -> Float[Tensor, "query k"]:
        """Queries in the basis, `q G_Q`."""
        return self.q @ self.head.basis.G_Q

    @cached_property
    def b(self) -> Float[Tensor, "key k"]:
        """Keys in the basis, `G_K k`."""
        return self.k @ self.head.basis.G_K.mT

    @cached_property
    def raw(self) -> Float[Tensor, "query key"]:
        """`q k^T / attn_scale`, before cap, bias and mask."""
        return self.q @ self.k.mT / self.head.divisor

    def terms(self, dest: int, src: int) -> Float[Tensor, " k"]:
        """What each vector of the basis adds to the raw score; they sum to it."""
        return self.a[dest] * self.b[src] / self.head.divisor

    @property
    def residual(self) -> Float[Tensor, "query key"]:
        """The part of raw scores that no vector carries: 0 unless `W_Q` or `W_K` is deficient."""
        return self.raw - self.a @ self.b.mT / self.head.divisor

    def scores(self, raw: Float[Tensor, "query key"] | None = None) -> Float[Tensor, "query key"]:
        """Scores as the model has them: capped, with bias, minus infinity where hidden."""
        raw = self.raw if raw is None else raw
        cap = self.head.spec.attn_scores_soft_cap
        scores = raw if cap is None else cap * torch.tanh(raw / cap)
        return (scores + self.bias).masked_fill(~self.visible, -torch.inf)

    @cached_property
    def pattern(self) -> Float[Tensor, "query key"]:
        """Attention weights; zeros for a query that sees nothing."""
        return torch.softmax(self.scores(), dim=-1).nan_to_num(nan=0.0)


def _check_index(head: int, n_heads: int, layer: int) -> None:
    if not 0 <= head < n_heads:
        raise ValueError(f"head = {head}: layer {layer} has heads 0 to {n_heads - 1}")


def _alibi_slope(spec: AttentionSpec, head: int, n_heads: int) -> float | None:
    if spec.positional_embedding_type != "alibi":
        return None
    return (spec.alibi_slopes or plain_alibi_slopes(n_heads))[head]


def read_prompt(
    head: QKHead,
    x: Float[Tensor, "pos d_model"],
    positions: Int[Tensor, " pos"] | None,
    keep: Bool[Tensor, "#query key"] | None,
) -> QKReading:
    """`QKHead.reading`."""
    if x.ndim != 2 or x.shape[-1] != len(head.query.W):
        raise ValueError(
            f"x has shape {tuple(x.shape)}: {head.name} reads one prompt [pos, {len(head.query.W)}]"
        )
    x = x.detach().double()
    if head.input_norm is not None:
        x = (x - head.input_norm.bias) / head.input_norm.gain
    n_pos = len(x)
    if positions is None:
        positions = torch.arange(n_pos, device=x.device)
    rotation = rotation_of(head.spec, head.query.W.shape[-1], positions)
    sides = {}
    for name, side in (("q", head.query), ("k", head.key)):
        W, b = side.effective
        factor = side.factor(x)
        sides[name] = (rotation((x @ W + b) * factor[:, None]), factor)
    mask = AttentionMask(
        n_pos,
        n_pos,
        causal=head.spec.attention_dir == "causal",
        window=head.spec.window_size,
        keep=None if keep is None else keep[None],
    )
    whole = (0, n_pos)
    visible = mask.visible(whole, whole, x.device)
    distances = mask.distances(whole, whole, x.device).clamp(min=0)
    return QKReading(
        head=head,
        q=sides["q"][0],
        k=sides["k"][0],
        q_factor=sides["q"][1],
        k_factor=sides["k"][1],
        positions=positions,
        rotation=rotation,
        visible=torch.ones_like(distances, dtype=torch.bool) if visible is None else visible[0],
        bias=-(head.alibi_slope or 0.0) * distances.double(),
    )
