"""The `config.json` of the Llamascopium layout: checked, understood, and written."""

import json
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lorsa_lens.config import LorsaConfig
from lorsa_lens.validation import Config, ConfigError

OWN_CONFIG = "lorsa_lens"
"""The key under which an export keeps our own configuration; others ignore it."""

WITHOUT_MEANING = frozenset(
    {
        "sae_type",
        OWN_CONFIG,
        "n_ctx",
        "dtype",
        "device",
        "use_triton_kernel",
        "sparsity_threshold_for_triton_spmm_kernel",
        "sae_pretrained_name_or_path",
        "strict_loading",
        "normalization_type",
    }
)
"""Keys that do not change what a Lorsa computes, or that are understood beside the fields."""


FLOATS = frozenset(
    {
        "expansion_factor",
        "jumprelu_threshold_window",
        "rotary_base",
        "rotary_base_local",
        "NTK_by_parts_factor",
        "NTK_by_parts_low_freq_factor",
        "NTK_by_parts_high_freq_factor",
        "attn_scale",
        "eps",
    }
)


@dataclass(frozen=True, kw_only=True)
class LlamascopiumConfig(Config):
    """The fields that mean something, with the defaults of that library."""

    d_model: int
    expansion_factor: float
    n_qk_heads: int
    d_qk_head: int
    hook_point_in: str
    hook_point_out: str
    use_decoder_bias: bool = True
    act_fn: Literal["relu", "jumprelu", "topk", "batchtopk"] = "relu"
    norm_activation: Literal["dataset-wise", "token-wise", "batch-wise", "inference"] = (
        "dataset-wise"
    )
    sparsity_include_decoder_norm: bool = True
    top_k: int = 50
    jumprelu_threshold_window: float = 2.0
    positional_embedding_type: Literal["rotary", "none"] = "rotary"
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_base_local: float | None = None
    rotary_adjacent_pairs: bool = True
    rotary_scale: int = 1
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_factor: float = 1.0
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 1.0
    old_context_len: int = 2048
    attn_type: Literal["global", "local"] = "global"
    window_size: int | None = None
    attn_scale: float | None = None
    use_post_qk_ln: bool = False
    eps: float = 1e-6

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "LlamascopiumConfig":
        """Understand a `config.json`.

        Keys that neither this nor the layout's own library knows are ignored with a warning.

        Raises:
            ConfigError: if it cannot be, or asks for what a Lorsa cannot do.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in FLOATS & known.keys():  # JSON writes 4 for 4.0
            if type(known[name]) is int:
                known[name] = float(known[name])
        unknown = [
            name
            for name, value in values.items()
            if name not in known and name not in WITHOUT_MEANING and value is not None
        ]
        if unknown:
            warnings.warn(
                "config.json of a Llamascopium Lorsa has keys that lorsa_lens does not know, "
                f"and ignores: {', '.join(sorted(unknown))}",
                stacklevel=3,
            )
        config = cls.from_dict(known)
        config._refuse(values.get("normalization_type"))
        return config

    def _refuse(self, normalization_type: Any) -> None:
        if self.norm_activation in ("token-wise", "batch-wise"):
            raise ConfigError(
                f"norm_activation = {self.norm_activation!r} divides by the norm of each token or "
                "batch, which a Lorsa does not: only 'dataset-wise' and 'inference' are read"
            )
        if self.act_fn == "batchtopk":
            raise ConfigError(
                "act_fn = 'batchtopk' selects among all tokens of a batch and stores no threshold, "
                "so what a token's code is depends on its batch: this is not read"
            )
        if self.positional_embedding_type == "rotary" and self.rotary_scale != 1:
            raise ConfigError(f"rotary_scale = {self.rotary_scale}: only 1 is read")
        if self.use_post_qk_ln and normalization_type != "RMS":
            raise ConfigError(
                f"normalization_type = {normalization_type!r} for queries and keys: only 'RMS'"
            )
        if self.attn_type == "local" and self.window_size is None:
            raise ConfigError("attn_type = 'local' needs a window_size")
        product = self.d_model * self.expansion_factor
        if not 0.5 < product < 2**53 or abs(product - round(product)) > 1e-6:
            raise ConfigError(
                f"d_model * expansion_factor = {product} must be a whole number of heads"
            )

    def to_lorsa_config(self) -> LorsaConfig:
        """The same Lorsa in our terms; scales of activations and precision are not part of it.

        Raises:
            ConfigError: if the hook points are none of an attention layer, or it cannot be.
        """
        layer, input_site, output_site = _sites(self.hook_point_in, self.hook_point_out)
        rotary = self.positional_embedding_type == "rotary"
        fields: dict[str, Any] = {
            "d_model": self.d_model,
            "n_qk_heads": self.n_qk_heads,
            "d_qk_head": self.d_qk_head,
            "n_ov_heads": round(self.d_model * self.expansion_factor),
            "act_fn": {"topk": "topk_relu"}.get(self.act_fn, self.act_fn),
            "k": self.top_k if self.act_fn == "topk" else None,
            "jumprelu_bandwidth": self.jumprelu_threshold_window,
            "positional_embedding_type": "rotary" if rotary else "standard",
            "attn_scale": self.attn_scale,
            "window_size": self.window_size if self.attn_type == "local" else None,
            "qk_norm": "head" if self.use_post_qk_ln else None,
            "qk_norm_eps": self.eps,
            "layer": layer,
            "input_site": input_site,
            "output_site": output_site,
        }
        if rotary:
            fields |= {
                "rotary_dim": self.rotary_dim,
                "rotary_base": self._base,
                "rotary_adjacent_pairs": self.rotary_adjacent_pairs,
                "rotary_frequencies": self._frequencies(),
                "rotary_dtype": "float64",
            }
        return LorsaConfig.from_dict(fields)

    @property
    def _base(self) -> float:
        if self.attn_type == "local" and self.rotary_base_local is not None:
            return self.rotary_base_local
        return self.rotary_base

    def _frequencies(self) -> tuple[float, ...]:
        """Radians per position of each pair, rounded where that library rounds to float32.

        With `use_NTK_by_parts_rope`, "NTK by parts" as in Llama 3.1 (YaRN, arXiv 2309.00071,
        section 3.2): long wavelengths are stretched by a factor, short ones stay, and those
        between are mixed.
        """
        if self.rotary_dim is None:
            raise ConfigError("rotary_dim is missing: rotary positions need it")
        if self.rotary_dim < 2 or self.rotary_dim > self.d_qk_head or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_dim = {self.rotary_dim} must be even, and between 2 and d_qk_head = "
                f"{self.d_qk_head}"
            )
        pair = torch.arange(self.rotary_dim // 2, dtype=torch.float32)
        if not self.use_NTK_by_parts_rope:
            periods = self._base ** (pair / (self.rotary_dim / 2))
            return tuple((1 / periods.double()).tolist())
        low, high = self.NTK_by_parts_low_freq_factor, self.NTK_by_parts_high_freq_factor
        frequencies = 1.0 / self._base ** (2 * pair / self.rotary_dim)
        turns = self.old_context_len / (2 * math.pi / frequencies)  # within the old context
        factor = self.NTK_by_parts_factor
        stretched = frequencies / factor
        share = (turns - low) / (high - low) if high != low else torch.ones_like(turns)
        mixed = (1 - share) * frequencies / factor + share * frequencies
        parts = torch.where(turns < low, stretched, torch.where(turns > high, frequencies, mixed))
        return tuple((1 / (1 / parts).double()).tolist())


def exported_config(cfg: LorsaConfig, n_ctx: Any) -> dict[str, Any]:
    """The `config.json` of a Lorsa in this layout.

    Raises:
        ConfigError: if the layout cannot say what the Lorsa computes.
    """
    _refuse_export(cfg)
    rotary, hook_point_in = cfg.rotated_dim > 0, cfg.hook_in
    if cfg.fold_ln is True:  # there, what attention receives is what the norm's hook point shows
        hook_point_in = f"blocks.{cfg.layer}.ln1.hook_normalized"
    return {
        "sae_type": "lorsa",
        "d_model": cfg.d_model,
        "expansion_factor": _expansion(cfg),
        "use_decoder_bias": True,
        "act_fn": {"topk_relu": "topk"}.get(cfg.act_fn, cfg.act_fn),
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "top_k": cfg.k or cfg.n_ov_heads,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": cfg.jumprelu_bandwidth,
        "hook_point_in": hook_point_in,
        "hook_point_out": cfg.hook_out,
        "n_qk_heads": cfg.n_qk_heads,
        "d_qk_head": cfg.d_qk_head,
        "positional_embedding_type": "rotary" if rotary else "none",
        "rotary_dim": cfg.rotated_dim or cfg.d_qk_head,
        "rotary_base": int(cfg.rotary_base) if cfg.rotary_base.is_integer() else cfg.rotary_base,
        "rotary_adjacent_pairs": cfg.rotary_adjacent_pairs,
        "rotary_scale": 1,
        "use_NTK_by_parts_rope": False,
        "NTK_by_parts_factor": 1.0,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 1.0,
        "old_context_len": 2048,
        "n_ctx": n_ctx,
        **_window(cfg),
        "attn_scale": cfg.score_divisor,
        "use_post_qk_ln": cfg.qk_norm is not None,
        "normalization_type": "RMS" if cfg.qk_norm is not None else None,
        "eps": cfg.qk_norm_eps,
        OWN_CONFIG: cfg.to_dict(),
    }


def understand(values: dict[str, Any]) -> tuple[LlamascopiumConfig, LorsaConfig]:
    """A `config.json` in that library's terms and in ours.

    Raises:
        ConfigError: if it cannot be, asks for what a Lorsa cannot do, or if what an export keeps
            of our own configuration does not say the same as the fields beside it.
    """
    theirs = LlamascopiumConfig.from_values(values)
    if OWN_CONFIG not in values:
        return theirs, theirs.to_lorsa_config()
    if not isinstance(values[OWN_CONFIG], dict):
        raise ConfigError(f"{OWN_CONFIG} = {values[OWN_CONFIG]!r} must be an object")
    cfg, n_ctx = LorsaConfig.from_dict(values[OWN_CONFIG]), values.get("n_ctx")
    if json.loads(json.dumps(exported_config(cfg, n_ctx))) != values:
        raise ConfigError(
            f"the field {OWN_CONFIG} contradicts the others: remove it to go by those"
        )
    return theirs, cfg


def _refuse_export(cfg: LorsaConfig) -> None:
    remedies = {
        "topk": "keeps negative activations: export split_signs(lorsa), which computes the same",
        "batchtopk": "has a threshold for |z|, which that layout has not",
    }
    if cfg.act_fn in remedies:
        raise ConfigError(f"act_fn = {cfg.act_fn!r} {remedies[cfg.act_fn]}")
    fits = {
        "positional_embedding_type": ("standard", "rotary"),
        "attention_dir": ("causal",),
        "attn_scores_soft_cap": (None,),
        "qk_norm": (None, "head"),
    }
    for name, values in fits.items():
        if getattr(cfg, name) not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise ConfigError(
                f"{name} = {getattr(cfg, name)!r}: the Llamascopium layout has {allowed} only"
            )


def _window(cfg: LorsaConfig) -> dict[str, Any]:
    """Only where there is one: older releases of that library do not know these keys."""
    if cfg.window_size is None:
        return {}
    return {"attn_type": "local", "window_size": cfg.window_size}


def _expansion(cfg: LorsaConfig) -> float:
    """The factor that gives the number of heads when it is multiplied out and cut off."""
    factor = cfg.n_ov_heads / cfg.d_model
    while int(cfg.d_model * factor) < cfg.n_ov_heads:
        factor = math.nextafter(factor, math.inf)
    return factor


def _sites(hook_in: str, hook_out: str) -> tuple[int, str, str]:
    """Layer, input site and output site that two hook points name."""
    inputs = {"ln1.hook_normalized": "ln1_normalized", "attn.hook_in": "attn_in"}
    outputs = {"hook_attn_out": "hook_attn_out", "attn.hook_out": "attn_out"}
    found_in = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", hook_in)
    found_out = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", hook_out)
    if found_in is None or found_in[2] not in inputs:
        raise ConfigError(
            f"hook_point_in = {hook_in!r} is not what attention reads: "
            "blocks.N.ln1.hook_normalized or blocks.N.attn.hook_in"
        )
    if found_out is None or found_out[2] not in outputs or found_out[1] != found_in[1]:
        raise ConfigError(
            f"hook_point_out = {hook_out!r} is not what attention writes at layer {found_in[1]}: "
            f"blocks.{found_in[1]}.hook_attn_out or blocks.{found_in[1]}.attn.hook_out"
        )
    return int(found_in[1]), inputs[found_in[2]], outputs[found_out[2]]
