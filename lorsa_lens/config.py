"""What a Lorsa is, as data: sizes, positions, selection, and where it belongs in a model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorsa_lens.validation import Config, ConfigError

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1
"""Version of the saved form (`config.json` beside `lorsa.safetensors`)."""

ActFn = Literal["topk", "topk_relu", "batchtopk", "jumprelu", "relu"]
PositionalEmbeddingType = Literal["standard", "rotary", "shortformer", "alibi"]
AttentionDir = Literal["causal", "bidirectional"]
QKNorm = Literal["head", "full"]
RotaryDtype = Literal["float32", "float64"]
InputSite = Literal["attn_in", "ln1_normalized"]
OutputSite = Literal["attn_out", "hook_attn_out"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Config):
    """How queries and keys become a pattern: everything about attention that is not a weight.

    The names are TransformerLens's. One spec describes an attention layer of a model and a Lorsa
    alike; `LorsaConfig` adds sizes and selection.

    Raises:
        ConfigError: at construction, when a field has a value of the wrong type, a number that is
            not positive and finite, or a name that is none of its choices.
    """

    positional_embedding_type: PositionalEmbeddingType = "standard"
    """Where positions enter: `standard` (in the input already, or nowhere), `rotary` (queries and
    keys are rotated), `shortformer` (added to the input of queries and keys only, so these read
    another input than the values), `alibi` (a bias on the scores)."""

    rotary_dim: int | None = None
    """Rotary: how many leading dimensions of each query and key are rotated. None: all."""

    rotary_base: float = 10000.0
    """Rotary: the base of the geometric series of frequencies. Unused once
    `rotary_frequencies` are given."""

    rotary_frequencies: tuple[float, ...] | None = None
    """Rotary: radians per position of each rotated pair, `rotary_dim / 2` of them. Every
    scaling (linear, NTK by parts, YaRN, ...) is a choice of these. None: the plain series
    `rotary_base ** (-2 i / rotary_dim)`."""

    rotary_scale: float = 1.0
    """Rotary: factor on the rotated dimensions of queries and keys (YaRN's attention factor)."""

    rotary_adjacent_pairs: bool = False
    """Rotary: which dimensions form a pair: (0, 1), (2, 3), ... (GPT-J) if true, else
    (0, rotary_dim / 2), ... (GPT-NeoX, Llama)."""

    rotary_dtype: RotaryDtype = "float32"
    """Rotary: precision of angles, sines and cosines. Most models use float32, whatever the
    precision of their weights."""

    alibi_slopes: tuple[float, ...] | None = None
    """ALiBi: the slope of each query-key head's penalty per position of distance. None: the
    geometric series of the ALiBi paper (arXiv 2108.12409)."""

    attn_scale: float | None = None
    """What scores are divided by. None: the square root of the query dimension."""

    attn_scores_soft_cap: float | None = None
    """Scores become `cap * tanh(scores / cap)` (Gemma 2). None: no cap."""

    window_size: int | None = None
    """Sliding window: a query sees itself and the `window_size - 1` positions before it. None:
    all positions before it."""

    attention_dir: AttentionDir = "causal"
    """`causal`, or `bidirectional` (BERT)."""

    qk_norm: QKNorm | None = None
    """RMS norm of queries and keys before rotation: of each head by itself (`head`: Qwen 3,
    Gemma 3), or of all heads together (`full`: OLMo 2)."""

    qk_norm_eps: float = 1e-6
    """Added to the mean square inside the RMS norm of queries and keys."""


@dataclass(frozen=True, kw_only=True)
class LorsaConfig(AttentionSpec):
    """Everything about a Lorsa but its weights. Immutable: `cfg.replace(k=32)` makes another.

    Raises:
        ConfigError: at construction, when a field's value or a combination of fields cannot be.

    Example:
        >>> cfg = LorsaConfig(d_model=64, n_qk_heads=4, d_qk_head=16, n_ov_heads=256, k=8)
        >>> cfg.group_size
        64
    """

    MAY_BE_ZERO = frozenset({"layer"})

    d_model: int
    """Width of the residual stream."""

    n_qk_heads: int
    """Query-key circuits, each with a pattern of its own."""

    d_qk_head: int
    """Dimension of a query and of a key."""

    n_ov_heads: int
    """Rank-1 output-value heads: a multiple of `n_qk_heads`. Consecutive groups of
    `n_ov_heads / n_qk_heads` share a query-key circuit."""

    k: int | None = None
    """Heads that stay per token (`topk`, `topk_relu`), on average (`batchtopk`). None: all."""

    act_fn: ActFn = "topk"
    """How heads are selected from their pre-activations z, weighed by the writing norm:
    `topk` keeps the k largest |z| * ||w_O|| of a token, `topk_relu` the k largest positive
    z * ||w_O||, `batchtopk` the largest |z| * ||w_O|| of the whole batch (k per token on average;
    outside training, those above a learned threshold), `jumprelu` those with z * ||w_O|| above a
    threshold learned for each head, `relu` every positive z (to be trained with an L1 penalty)."""

    jumprelu_bandwidth: float = 0.001
    """`jumprelu`: width of the window around the threshold in which it receives gradient
    (arXiv 2407.14435)."""

    jumprelu_init_threshold: float = 0.001
    """`jumprelu`: the threshold of every head before training."""

    layer: int | None = None
    """The layer of the model whose attention this Lorsa stands in for."""

    model_name: str | None = None
    """The model it was made from or trained on, for the record."""

    input_site: InputSite = "attn_in"
    """What the Lorsa reads: what the attention module receives (`attn_in`), or the normalized
    residual stream before the affine part of the norm (`ln1_normalized`: published Lorsas)."""

    output_site: OutputSite = "attn_out"
    """What the Lorsa replaces: what the attention module returns (`attn_out`), or what is added
    to the residual stream (`hook_attn_out`); these differ where a norm follows attention."""

    fold_ln: bool | None = None
    """Whether the norm before attention was folded into the weights of the model that the Lorsa
    was made from or trained on. None: unknown, not checked when spliced."""

    dtype: Dtype = "float32"
    """Precision of the weights."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, naming the field, the value and the remedy."""
        super().__post_init__()
        _check_heads(self)
        _check_positions(self)

    @property
    def group_size(self) -> int:
        """Output-value heads that share one query-key circuit."""
        return self.n_ov_heads // self.n_qk_heads

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a query that are rotated: 0 without rotary positions."""
        if self.positional_embedding_type != "rotary":
            return 0
        return self.d_qk_head if self.rotary_dim is None else self.rotary_dim

    @property
    def score_divisor(self) -> float:
        """What scores are divided by: `attn_scale`, or its default."""
        return math.sqrt(self.d_qk_head) if self.attn_scale is None else self.attn_scale

    @property
    def hook_in(self) -> str:
        """Name of the activation that the Lorsa reads, as `blocks.5.attn.hook_in`."""
        site = {"attn_in": "attn.hook_in", "ln1_normalized": "ln1.hook_normalized"}
        return self._hook_name(site[self.input_site])

    @property
    def hook_out(self) -> str:
        """Name of the activation that the Lorsa replaces, as `blocks.5.attn.hook_out`."""
        site = {"attn_out": "attn.hook_out", "hook_attn_out": "hook_attn_out"}
        return self._hook_name(site[self.output_site])

    def _hook_name(self, site: str) -> str:
        if self.layer is None:
            raise ConfigError("layer = None, so no activation has a name: give a layer")
        return f"blocks.{self.layer}.{site}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with the format's version."""
        return {"architecture": "lorsa", "format_version": FORMAT_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LorsaConfig":
        """Build from plain values, as `to_dict` gives them.

        Raises:
            ConfigError: for an unknown key (near matches are listed), a missing one, another
                architecture, or a format version that this release does not know.
        """
        values = dict(values)
        architecture = values.pop("architecture", "lorsa")
        if architecture != "lorsa":
            raise ConfigError(f"architecture = {architecture!r}: this reads 'lorsa' only")
        version = values.pop("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"format_version = {version!r}: this release of lorsa_lens reads up to "
                f"{FORMAT_VERSION}. Upgrade lorsa_lens to read it"
            )
        return super().from_dict(values)

    def to_json(self) -> str:
        """The text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> "LorsaConfig":
        """Read a `config.json`.

        Raises:
            ConfigError: when the file is no JSON object, or as `from_dict` does.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}, not a JSON object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_attention(cls, model: "nn.Module", layer: int, **changes: Any) -> "LorsaConfig":
        """The configuration of the Lorsa that equals an attention layer exactly.

        Everything positional and numerical is read from the model; there is one query-key circuit
        per attention head, one rank-1 head per dimension of a head's output, and all stay.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            layer: which layer.
            **changes: fields to set otherwise, such as `n_ov_heads=4096, k=64`.
        """
        from lorsa_lens.lift import exact_config

        return exact_config(model, layer).replace(**changes)


def _check_heads(cfg: LorsaConfig) -> None:
    """Combinations of sizes and selection."""
    if cfg.n_ov_heads % cfg.n_qk_heads:
        raise ConfigError(
            f"n_ov_heads = {cfg.n_ov_heads} must be a multiple of n_qk_heads = {cfg.n_qk_heads}: "
            f"for example {(cfg.group_size + 1) * cfg.n_qk_heads}"
        )
    if cfg.k is None and cfg.act_fn == "batchtopk":
        raise ConfigError("k = None with act_fn = 'batchtopk': give the mean number of heads")
    if cfg.k is not None and cfg.k > cfg.n_ov_heads:
        raise ConfigError(
            f"k = {cfg.k} exceeds n_ov_heads = {cfg.n_ov_heads}: keep at most all heads, "
            "or give k = None for all"
        )
    if cfg.k is not None and cfg.act_fn in ("jumprelu", "relu"):
        raise ConfigError(f"k = {cfg.k} has no meaning with act_fn = {cfg.act_fn!r}: give k = None")


def _check_positions(cfg: LorsaConfig) -> None:
    """Combinations of fields about positions."""
    needs = {"rotary_dim": "rotary", "rotary_frequencies": "rotary", "alibi_slopes": "alibi"}
    for name, kind in needs.items():
        if getattr(cfg, name) is not None and cfg.positional_embedding_type != kind:
            raise ConfigError(
                f"{name} needs positional_embedding_type = {kind!r}, "
                f"which is {cfg.positional_embedding_type!r}: give {name} = None"
            )
    if cfg.alibi_slopes is not None and len(cfg.alibi_slopes) != cfg.n_qk_heads:
        raise ConfigError(
            f"alibi_slopes has {len(cfg.alibi_slopes)} entries, but there are "
            f"n_qk_heads = {cfg.n_qk_heads}: give one slope for each, or None"
        )
    if cfg.positional_embedding_type != "rotary":
        return
    if cfg.rotated_dim % 2 or not 2 <= cfg.rotated_dim <= cfg.d_qk_head:
        raise ConfigError(
            f"rotary_dim = {cfg.rotated_dim} must be even, and between 2 and "
            f"d_qk_head = {cfg.d_qk_head}"
        )
    n_pairs = cfg.rotated_dim // 2
    if cfg.rotary_frequencies is not None and len(cfg.rotary_frequencies) != n_pairs:
        raise ConfigError(
            f"rotary_frequencies has {len(cfg.rotary_frequencies)} entries: give one for each of "
            f"the {n_pairs} rotated pairs"
        )
