"""Read an attention layer out of a HookedTransformer or a HookedEncoder: weights and positions."""

from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.config import AttentionSpec
from lorsa_lens.hosts.base import AttentionWeights, UnsupportedAttentionError
from lorsa_lens.hosts.reading import (
    FLOAT32_EPS,
    FLOAT64_EPS,
    affine_unless_identity,
    check_layer,
    frequencies_unless_plain,
    table_frequencies,
)

_UNSUPPORTED: dict[str, tuple[str, str]] = {
    "load_in_4bit": (
        "has weights quantized to 4 bits (load_in_4bit), from which no Lorsa can be read",
        "load the model without load_in_4bit",
    ),
    "use_attention_sinks": (
        "has attention sinks (use_attention_sinks): part of every softmax goes to a learned logit, "
        "so its pattern does not sum to 1 as a Lorsa's does",
        "choose a model without attention sinks",
    ),
    "clip_qkv": (
        "clamps queries, keys and values (clip_qkv), which no linear circuit does",
        "set clip_qkv = None if the model was not trained with it, or choose another model",
    ),
    "use_logn_attn": (
        "scales queries by the logarithm of their position (use_logn_attn)",
        "set use_logn_attn = False if sequences stay within the training length",
    ),
    "use_dynamic_ntk_rope": (
        "changes its rotary frequencies with the length of the text (use_dynamic_ntk_rope)",
        "set use_dynamic_ntk_rope = False if sequences stay within the training length",
    ),
}
"""Fields of a HookedTransformerConfig that change the arithmetic of attention beyond an
`AttentionSpec`: what they do, and what a user can do about it."""


def read_attention(model: nn.Module, layer: int) -> AttentionWeights:
    """Read the attention of one layer of a HookedTransformer or HookedEncoder.

    Args:
        model: the host.
        layer: index of the block.

    Returns:
        Detached copies of the weights, in the dtype and on the device of the model, and the
        `AttentionSpec` by which they act on the input that the attention module receives. With
        shortformer positions queries and keys receive another input than values.

    Raises:
        ValueError: when there is no such layer.
        UnsupportedAttentionError: when the layer does what no `AttentionSpec` can say.
    """
    attn = _block(model, layer).attn
    _refuse_unsupported(attn, layer)
    norm, q_norm, k_norm = _qk_norm(attn)
    return AttentionWeights(
        spec=AttentionSpec(**_scores(attn), **_positions(attn), **norm),
        W_Q=attn.W_Q.detach().clone(),
        W_K=attn.W_K.detach().clone(),
        W_V=attn.W_V.detach().clone(),
        W_O=attn.W_O.detach().clone(),
        b_Q=attn.b_Q.detach().clone(),
        b_K=attn.b_K.detach().clone(),
        b_V=attn.b_V.detach().clone(),
        b_O=attn.b_O.detach().clone(),
        q_norm=q_norm,
        k_norm=k_norm,
    )


def input_norm(
    model: nn.Module, layer: int
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    """The affine part of the norm whose output the attention of a layer receives.

    With shortformer positions it is the norm of the values' input; queries and keys receive
    its output plus the positions.

    Args:
        model: the host.
        layer: index of the block.

    Returns:
        Gain and bias, detached copies. None where attention receives the normalized residual
        stream as it is (folded weights, gain 1 and bias 0) or no norm's output at all (BERT and
        OLMo 2 normalize after attention).

    Raises:
        ValueError: when there is no such layer.
    """
    block = _block(model, layer)
    bert = hasattr(block, "hook_normalized_resid_post")
    gain = getattr(block.ln1, "w", None)
    if bert or _normalizes_after(block) or gain is None:
        return None
    bias = getattr(block.ln1, "b", None)
    return affine_unless_identity(gain, bias)


def post_norm(model: nn.Module, layer: int) -> nn.Module | None:
    """The module between attention's output and the residual stream, if there is one.

    Gemma 2 and 3 have a norm there besides that before attention, OLMo 2 in place of it.

    Raises:
        ValueError: when there is no such layer.
    """
    block = _block(model, layer)
    after: nn.Module | None = getattr(block, "ln1_post", None)
    if after is None and _normalizes_after(block):
        after = block.ln1
    return after


def mlp_post_norm(model: nn.Module, layer: int) -> nn.Module | None:
    """The same for the MLP."""
    block = _block(model, layer)
    after: nn.Module | None = getattr(block, "ln2_post", None)
    if after is None and _normalizes_after(block):
        after = block.ln2
    return after


def _block(model: nn.Module, layer: int) -> Any:
    blocks: Any = dict(model.named_children()).get("blocks")
    if blocks is None:
        raise UnsupportedAttentionError(
            f"layer {layer}: a {type(model).__name__} has no stack of blocks of its own "
            "(encoder-decoder models have two, and attention between them). A Lorsa stands in for "
            "the self-attention of a HookedTransformer, a HookedEncoder or a TransformerBridge"
        )
    check_layer(layer, len(blocks))
    return blocks[layer]


def _normalizes_after(block: Any) -> bool:
    """Whether `ln1` follows attention, instead of preceding it (OLMo 2, from 3.x on)."""
    try:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
    except ImportError:
        return False
    return getattr(block.cfg, "original_architecture", None) in POST_NORM_ARCHITECTURES


def _refuse_unsupported(attn: Any, layer: int) -> None:
    """Raise an `UnsupportedAttentionError` for what an `AttentionSpec` has no field for."""
    name = type(attn).__name__
    if name not in ("Attention", "GroupedQueryAttention"):
        raise UnsupportedAttentionError(
            f"layer {layer}: {name} is no attention that lorsa_lens knows. Only Attention and "
            "GroupedQueryAttention of a HookedTransformer are verified to be reproduced"
        )
    for field, (what, remedy) in _UNSUPPORTED.items():
        value = getattr(attn.cfg, field, None)
        if value is not None and value is not False:
            raise UnsupportedAttentionError(
                f"layer {layer}: attention {what}. A Lorsa cannot stand in for it: {remedy}"
            )
    kind = attn.cfg.positional_embedding_type
    if kind not in ("standard", "rotary", "shortformer", "alibi"):
        raise UnsupportedAttentionError(
            f"layer {layer}: attention has positions of type {kind!r}, learned for each distance "
            "(T5). A Lorsa cannot stand in for it: choose a model with standard, rotary, "
            "shortformer or alibi positions"
        )


def _scores(attn: Any) -> dict[str, Any]:
    """Fields of the spec about scores: scale, cap, mask."""
    cfg = attn.cfg
    direction = getattr(attn, "_attention_dir_override", None) or cfg.attention_dir
    local = attn.attn_type == "local" and direction == "causal"
    cap = float(getattr(cfg, "attn_scores_soft_cap", -1.0))
    return {
        "attn_scale": float(attn.attn_scale),
        "attn_scores_soft_cap": cap if cap > 0 else None,
        "window_size": int(cfg.window_size) if local else None,
        "attention_dir": direction,
    }


def _positions(attn: Any) -> dict[str, Any]:
    """Fields of the spec about positions."""
    cfg = attn.cfg
    kind = cfg.positional_embedding_type
    fields: dict[str, Any] = {"positional_embedding_type": kind}
    if kind == "alibi":
        fields["alibi_slopes"] = tuple(attn.create_alibi_multipliers(cfg.n_heads).tolist())
    if kind != "rotary":
        return fields

    local_base = getattr(cfg, "rotary_base_local", None)
    base = cfg.rotary_base
    if attn.attn_type == "local" and local_base is not None:
        base = local_base
    return fields | _rotary(attn, float(base))


def _rotary(attn: Any, base: float) -> dict[str, Any]:
    """Fields of the spec about rotary positions, from the host's own code: it knows every scaling.

    Computed anew, since the live table is rounded to the dtype of the model.
    """
    cfg = attn.cfg
    rotary_dim = int(cfg.rotary_dim)
    adjacent = bool(cfg.rotary_adjacent_pairs)
    pairs = slice(0, None, 2) if adjacent else slice(rotary_dim // 2)
    n_positions = max(2, attn.rotary_cos.shape[0])

    def table(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sin, cos = attn.calculate_sin_cos_rotary(rotary_dim, n_positions, base=base, dtype=dtype)
        return sin[:, pairs], cos[:, pairs]

    live = attn.rotary_cos[:, pairs].detach().cpu()
    (sin, cos), (sin_32, cos_32) = table(torch.float64), table(torch.float32)
    scale = float(torch.hypot(sin[1], cos[1]).mean())
    # The table of a float64 model may have been computed in float32 and cast later (`model.to`),
    # or computed in float64 and rounded later (weight processing of 3.x): which is nearer?
    rows = slice(len(live))
    double = live.dtype == torch.float64 and bool(
        (live - cos[rows]).abs().max() < (live - cos_32[rows]).abs().max()
    )
    if not double:
        sin, cos = sin_32, cos_32
    return {
        "rotary_dim": None if rotary_dim == cfg.d_head else rotary_dim,
        "rotary_base": base,
        "rotary_frequencies": frequencies_unless_plain(
            table_frequencies(sin, cos), base, n_positions, FLOAT64_EPS if double else FLOAT32_EPS
        ),
        "rotary_scale": 1.0 if abs(scale - 1) < FLOAT64_EPS else scale,
        "rotary_adjacent_pairs": adjacent,
        "rotary_dtype": "float64" if double else "float32",
    }


def _qk_norm(
    attn: Any,
) -> tuple[
    dict[str, Any], Float[Tensor, "head d_head"] | None, Float[Tensor, "head d_head"] | None
]:
    """Fields of the spec about the norms of queries and keys, and their gains for every head."""
    q_norm: Any = getattr(attn, "q_norm", None)
    k_norm: Any = getattr(attn, "k_norm", None)
    if q_norm is None or k_norm is None:
        return {}, None, None
    n_heads, d_head = attn.b_Q.shape
    gains = []
    for norm in (q_norm, k_norm):
        gain = norm.w.detach()
        if gain.numel() == d_head:
            gains.append(repeat(gain, "d_head -> head d_head", head=n_heads).clone())
        else:
            # All heads together. The mean square does not change when keys are repeated.
            gain = rearrange(gain, "(kv_head d_head) -> kv_head d_head", d_head=d_head)
            group = n_heads // gain.shape[0]
            gains.append(repeat(gain, "kv d_head -> (kv group) d_head", group=group).clone())
    kind = "head" if q_norm.w.numel() == d_head else "full"
    return {"qk_norm": kind, "qk_norm_eps": float(q_norm.eps)}, gains[0], gains[1]
