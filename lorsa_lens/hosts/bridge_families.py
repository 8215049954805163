"""Which attention of a TransformerBridge is verified, and why all else is refused."""

from dataclasses import dataclass
from typing import Any, Literal

from lorsa_lens.hosts.base import UnsupportedAttentionError

JOINT = "JointQKVAttentionBridge"
JOINT_ROTARY = "JointQKVPositionEmbeddingsAttentionBridge"
ROTARY = "PositionEmbeddingsAttentionBridge"
DELEGATING = "AttentionBridge"

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary types of Hugging Face whose frequencies do not change with the length of the text."""


@dataclass(frozen=True)
class Family:
    """How the attention of one Hugging Face class, wrapped by TransformerLens, computes."""

    bridge: str
    """TransformerLens's class around it."""
    rotary: Literal["none", "module", "sinusoids", "native"] = "none"
    """Where its rotary positions are: nowhere, in the model's rotary module, ..."""
    window: Literal["none", "attention", "config", "local"] = "none"
    """What says that a window limits it, and how wide it is."""
    norm_first: bool = True
    """Whether `ln1` precedes attention."""


FAMILIES: dict[str, Family] = {
    "GPT2Attention": Family(JOINT),
    "GPTNeoXAttention": Family(JOINT_ROTARY, rotary="module"),
    "GPTJAttention": Family(DELEGATING, rotary="sinusoids"),
    "GPTNeoSelfAttention": Family(DELEGATING, window="local"),
    "OPTAttention": Family(DELEGATING),
    "LlamaAttention": Family(ROTARY, rotary="module"),
    "MistralAttention": Family(ROTARY, rotary="module", window="config"),
    "GemmaAttention": Family(ROTARY, rotary="module"),
    "Gemma2Attention": Family(ROTARY, rotary="module", window="attention"),
    "Gemma3Attention": Family(ROTARY, rotary="module", window="attention"),
    "Qwen2Attention": Family(ROTARY, rotary="module", window="attention"),
    "Qwen3Attention": Family(ROTARY, rotary="module", window="attention"),
    "Olmo2Attention": Family(ROTARY, rotary="module", norm_first=False),
    "PhiAttention": Family(ROTARY, rotary="module"),
    "Starcoder2Attention": Family(ROTARY, rotary="module", window="config"),
    "NativeAttention": Family(DELEGATING, rotary="native"),
}
"""Attention classes that are verified, by name."""

_REASONS: dict[str, str] = {
    "BloomAttention": "its output already contains the residual stream",
    "GraniteAttention": "the block scales its output before adding it to the residual stream",
    "GptOssAttention": "part of every softmax goes to a learned logit (attention sink)",
    "DeepseekV2Attention": "it is latent attention: keys and values are decompressed",
    "DeepseekV3Attention": "it is latent attention: keys and values are decompressed",
    "CohereAttention": "its queries and keys may pass a LayerNorm, which is no RMS norm",
    "OlmoAttention": "it may clamp queries, keys and values (clip_qkv)",
    "Phi3Attention": "its rotary frequencies may change with the length of the text (longrope)",
}
"""Why an attention class is not on the list, where there is more to say than 'not verified'."""


def unsupported(
    layer: int, reason: str, remedy: str = "choose another layer or model"
) -> UnsupportedAttentionError:
    """The error for a layer that a Lorsa cannot stand in for."""
    return UnsupportedAttentionError(
        f"layer {layer}: {reason}. A Lorsa cannot stand in for this attention truthfully: {remedy}"
    )


def family_of(attn: Any, layer: int) -> Family:
    """The family of a bridge's attention component.

    Raises:
        UnsupportedAttentionError: when the class it wraps is none of `FAMILIES`, or it wraps it
            in another way than the one that is verified.
    """
    name, bridge = type(attn.original_component).__name__, type(attn).__name__
    family = FAMILIES.get(name)
    if family is not None and family.bridge == bridge:
        return family
    reason = "lorsa_lens is not tested against it"
    if family is not None:
        reason = f"TransformerLens wraps it in a {bridge} here, not in a {family.bridge}"
    raise unsupported(
        layer,
        f"its attention is a {name}: {_REASONS.get(name, reason)}",
        f"choose a model with one of {', '.join(sorted(FAMILIES))}",
    )


def refuse_options(attn: Any, layer: int) -> None:
    """Refuse options of a verified class that an `AttentionSpec` has no field for.

    Raises:
        UnsupportedAttentionError: naming the option.
    """
    wrapped, cfg = attn.original_component, attn.config
    config = getattr(wrapped, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    gate = dict(attn.named_children()).get("gate")
    options: dict[str, Any] = {
        "attention sinks, a learned logit in every softmax (sinks)": _of(wrapped, "sinks"),
        "clamped queries, keys and values (clip_qkv)": _of(config, "clip_qkv"),
        "a gate on its output (gated_q_proj)": _of(cfg, "gated_q_proj") or gate,
        "keys scaled by a multiplier (key_multiplier)": _of(wrapped, "key_multiplier"),
        "queries scaled by position (llama_4_scaling_beta)": rope.get("llama_4_scaling_beta"),
        "LayerNorms of queries and keys (qk_layernorm)": _of(wrapped, "qk_layernorm"),
        "norms of queries and keys after rotation": _of(cfg, "qk_norm_after_rope"),
        "keys from another text (is_cross_attention)": _of(wrapped, "is_cross_attention"),
        "queries that see later keys (use_bidirectional_attention)": (
            type(wrapped).__name__ != "NativeAttention" and not is_causal(wrapped)
        ),
    }
    for option, value in options.items():
        if value is not None and value is not False:
            raise unsupported(layer, f"its attention, a {type(wrapped).__name__}, has {option}")


def is_causal(wrapped: Any) -> bool:
    """Whether a query of the wrapped attention sees no key after itself."""
    return bool(first_of(wrapped, "is_causal", "causal"))


def first_of(module: Any, *names: str) -> Any:
    """The first of these attributes that the module has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{type(module).__name__} has none of {', '.join(names)}")


def _of(module: Any, name: str) -> Any:
    return getattr(module, name, None)
