"""Read an attention layer out of a TransformerBridge: weights and positions.

A bridge's components sit inside Hugging Face's module tree and call its linear layers, so the
weights of those layers are the live ones, processed or not. What the components compute besides
depends on their class and on that of the attention they wrap (`bridge_families`); what is not
verified is refused.
"""

import math
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.config import AttentionSpec
from lorsa_lens.hosts.base import AttentionWeights
from lorsa_lens.hosts.bridge_families import (
    FIXED_ROPE_TYPES,
    JOINT,
    JOINT_ROTARY,
    Family,
    family_of,
    first_of,
    is_causal,
    refuse_options,
    unsupported,
)
from lorsa_lens.hosts.reading import (
    FLOAT32_EPS,
    affine_unless_identity,
    check_layer,
    frequencies_unless_plain,
    table_frequencies,
)

__all__ = ["input_norm", "read_attention", "unsupported"]


def read_attention(model: object, layer: int) -> AttentionWeights:
    """Read the attention of one layer of a TransformerBridge.

    Args:
        model: the host, with processed weights or without.
        layer: index of the block.

    Returns:
        Detached copies of the live weights, in the dtype and on the device of the model, and the
        `AttentionSpec` by which they act on the input that the attention module receives.

    Raises:
        ValueError: when there is no such layer.
        UnsupportedAttentionError: when the layer's attention is none of the verified classes, or
            does what no `AttentionSpec` can say.
    """
    attn = _attention(model, layer)
    family = family_of(attn, layer)
    refuse_options(attn, layer)
    wrapped = attn.original_component
    d_head = int(first_of(wrapped, "head_dim", "head_size", "d_head"))
    W_Q, b_Q = _projection(attn, "q", d_head, layer)
    n_heads, dtype = W_Q.shape[0], W_Q.dtype
    W_K, b_K = _projection(attn, "k", d_head, layer)
    W_V, b_V = _projection(attn, "v", d_head, layer)
    W_O, b_O = _linear(attn, "o", layer)
    norm, q_norm, k_norm = _qk_norm(attn, n_heads, d_head, layer)
    return AttentionWeights(
        spec=AttentionSpec(
            attn_scale=_scale(attn, family, d_head),
            attn_scores_soft_cap=_soft_cap(wrapped),
            window_size=_window(wrapped, family),
            attention_dir="causal" if is_causal(wrapped) else "bidirectional",
            **_positions(model, wrapped, family, d_head, layer),
            **norm,
        ),
        W_Q=W_Q,
        W_K=_for_every_head(W_K, n_heads).to(dtype),
        W_V=_for_every_head(W_V, n_heads).to(dtype),
        W_O=rearrange(W_O, "(head d_head) d_model -> head d_head d_model", d_head=d_head).to(dtype),
        b_Q=b_Q.to(dtype),
        b_K=_for_every_head(b_K, n_heads).to(dtype),
        b_V=_for_every_head(b_V, n_heads).to(dtype),
        b_O=b_O.to(dtype),
        q_norm=q_norm,
        k_norm=k_norm,
    )


def input_norm(
    model: object, layer: int
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    """The affine part of the norm whose output the attention of a layer receives.

    Args:
        model: the host.
        layer: index of the block.

    Returns:
        Gain (with the 1 that Gemma adds to it) and bias, detached copies. None where attention
        receives the normalized residual stream as it is (folded weights, gain 1 and bias 0) or no
        norm's output at all (OLMo 2 normalizes after attention).

    Raises:
        ValueError: when there is no such layer.
        UnsupportedAttentionError: when the layer's attention is none of the verified classes.
    """
    attn = _attention(model, layer)
    wrapped = attn.original_component
    first = family_of(attn, layer).norm_first and getattr(
        getattr(wrapped, "config", None), "do_layer_norm_before", True
    )
    component = dict(_block(model, layer).named_children()).get("ln1")
    norm: Any = getattr(component, "original_component", None)
    if not first or norm is None or getattr(norm, "weight", None) is None:
        return None
    if isinstance(norm, nn.LayerNorm):
        return affine_unless_identity(norm.weight, norm.bias)
    return affine_unless_identity(_rms_gain(norm, layer)[0], None)


def _block(model: object, layer: int) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise unsupported(
            layer,
            f"a {type(model).__name__} has no modules in this process: weights cannot be read, nor "
            "attention replaced",
            "boot the model with TransformerBridge.boot_transformers",
        )
    blocks: Any = dict(model.named_children()).get("blocks")
    if blocks is None:
        raise unsupported(
            layer,
            "this bridge has no stack of decoder blocks (an encoder-decoder has two, and attention "
            "between them)",
        )
    check_layer(layer, len(blocks))
    block: nn.Module = blocks[layer]
    return block


def _attention(model: object, layer: int) -> Any:
    block = _block(model, layer)
    attn = dict(block.named_children()).get("attn")
    if attn is None or getattr(attn, "original_component", None) is None:
        raise unsupported(layer, f"its block (a {type(block).__name__}) has no softmax attention")
    return attn


def _linear(
    attn: Any, name: str, layer: int
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Weight and bias of a projection, detached copies; zeros for no bias."""
    linear = getattr(attn, name).original_component
    kind = type(linear).__name__
    weight = getattr(linear, "weight", None)
    usable = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta
    if kind not in ("Linear", "Conv1D") or not usable or weight is None:
        what = "none" if weight is None else f"{weight.dtype} on {weight.device}"
        raise unsupported(
            layer,
            f"its projection {name} is a {kind} with weight {what}: quantized, offloaded and "
            "adapted layers cannot be read",
            "load the model whole, in floating point, with adapters merged",
        )
    weight = weight.detach().clone()
    if kind == "Linear":
        weight = weight.T.contiguous()
    bias = linear.bias
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().clone()


def _projection(
    attn: Any, name: str, d_head: int, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    weight, bias = _linear(attn, name, layer)
    return (
        rearrange(weight, "d_model (head d_head) -> head d_model d_head", d_head=d_head),
        rearrange(bias, "(head d_head) -> head d_head", d_head=d_head),
    )


def _for_every_head(x: Float[Tensor, "kv_head ..."], n_heads: int) -> Float[Tensor, "head ..."]:
    """Repeat what groups of heads share."""
    return x.repeat_interleave(n_heads // x.shape[0], dim=0)


def _scale(attn: Any, family: Family, d_head: int) -> float:
    """What scores are divided by, as TransformerLens's component does it."""
    wrapped = attn.original_component
    if family.bridge in (JOINT, JOINT_ROTARY):
        # These do not look at the wrapped module's own scale.
        inverse = family.bridge == JOINT and getattr(
            attn.config, "scale_attn_by_inverse_layer_idx", False
        )
        return math.sqrt(d_head) * (int(wrapped.layer_idx) + 1 if inverse else 1)
    kind = type(wrapped).__name__
    if kind == "GPTNeoSelfAttention":
        return 1.0
    if kind in ("GPTJAttention", "NativeAttention"):
        return float(first_of(wrapped, "scale_attn", "scale"))
    return 1.0 / float(wrapped.scaling)


def _soft_cap(wrapped: Any) -> float | None:
    cap = getattr(wrapped, "attn_logit_softcapping", None)
    if cap is None:
        cap = getattr(wrapped, "attn_scores_soft_cap", None)  # native: -1 for none
    return float(cap) if cap is not None and cap > 0 else None


def _window(wrapped: Any, family: Family) -> int | None:
    width: int | None = None
    if family.window == "attention":
        width = wrapped.sliding_window
    elif family.window == "config":
        width = wrapped.config.sliding_window
    elif family.window == "local" and wrapped.attention_type == "local":
        width = wrapped.config.window_size
    return width


def _positions(
    model: object, wrapped: Any, family: Family, d_head: int, layer: int
) -> dict[str, Any]:
    """Fields of the spec about positions: rotary, or in the input already."""
    scale = 1.0
    if family.rotary == "module":
        frequencies, scale, base, n_positions = _module_frequencies(model, wrapped, layer)
    elif family.rotary == "sinusoids" and wrapped.rotary_dim is not None:
        sin, cos = wrapped.embed_positions.chunk(2, dim=-1)
        frequencies, base, n_positions = table_frequencies(sin, cos), 10000.0, len(sin)
    elif family.rotary == "native" and wrapped.rotary is not None:
        sin, cos = wrapped.rotary.sin_cached[:, ::2], wrapped.rotary.cos_cached[:, ::2]
        frequencies, n_positions = table_frequencies(sin, cos), len(sin)
        base = float(wrapped.rotary.effective_base)
    elif family.rotary == "sinusoids":
        raise unsupported(layer, f"{type(wrapped).__name__} has no rotary_dim")
    else:
        return {}
    rotary_dim = 2 * len(frequencies)
    return {
        "positional_embedding_type": "rotary",
        "rotary_dim": None if rotary_dim == d_head else rotary_dim,
        "rotary_base": base,
        "rotary_frequencies": frequencies_unless_plain(frequencies, base, n_positions, FLOAT32_EPS),
        "rotary_scale": scale,
        "rotary_adjacent_pairs": family.rotary != "module",
    }


def _module_frequencies(
    model: object, wrapped: Any, layer: int
) -> tuple[Float[Tensor, " pair"], float, float, int]:
    """Frequencies, their factor, their base and the number of positions, from Hugging Face."""
    module: Any = getattr(getattr(model, "rotary_emb", None), "original_component", None)
    # Gemma 3 has a series for each type of layer, the others one for all.
    kind = getattr(wrapped, "layer_type", None)
    prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    if frequencies is None:
        raise unsupported(layer, "the model's rotary module has no frequencies (inv_freq)")
    types, parameters = module.rope_type, module.config.rope_parameters
    rope_type = types[kind] if isinstance(types, dict) else types
    if rope_type not in FIXED_ROPE_TYPES:
        raise unsupported(
            layer,
            f"its rotary type {rope_type!r} changes frequencies with the length of the text, or "
            "is not tested",
            f"choose a model whose rotary type is one of {', '.join(FIXED_ROPE_TYPES)}",
        )
    scale = float(getattr(module, f"{prefix}attention_scaling"))
    base = float((parameters[kind] if prefix else parameters)["rope_theta"])
    return frequencies.detach(), scale, base, int(module.config.max_position_embeddings)


def _qk_norm(
    attn: Any, n_heads: int, d_head: int, layer: int
) -> tuple[
    dict[str, Any], Float[Tensor, "head d_head"] | None, Float[Tensor, "head d_head"] | None
]:
    """Fields of the spec about the norms of queries and keys, and their gains for every head."""
    children = dict(attn.named_children())
    components = [children[name] for name in ("q_norm", "k_norm") if name in children]
    norms = [c.original_component for c in components if c.original_component is not None]
    if len(norms) < 2:
        return {}, None, None
    (q_gain, eps), (k_gain, _) = (_rms_gain(norm, layer) for norm in norms)
    fields = {"qk_norm": "head" if q_gain.numel() == d_head else "full", "qk_norm_eps": eps}
    gains = []
    for gain in (q_gain, k_gain):
        by_head = rearrange(gain, "(head d_head) -> head d_head", d_head=d_head)
        gains.append(_for_every_head(by_head, n_heads))
    return fields, gains[0], gains[1]


def _rms_gain(norm: Any, layer: int) -> tuple[Float[Tensor, " dim"], float]:
    """What an RMS norm of Hugging Face multiplies by, and what it adds to the mean square.

    Gemma's multiply by 1 + weight. Which of the two a norm does, its output for ones says.
    """
    weight = norm.weight.detach()
    eps = float(first_of(norm, "variance_epsilon", "eps"))
    if weight.ndim == 1:
        with torch.no_grad():
            out = norm(torch.ones_like(weight)[None])[0]
        for gain in (weight, 1 + weight):
            if torch.allclose(out, gain / math.sqrt(1 + eps), rtol=1e-2, atol=1e-2):
                return gain.clone(), eps
    raise unsupported(layer, f"a {type(norm).__name__} in it is no RMS norm of one gain per number")
