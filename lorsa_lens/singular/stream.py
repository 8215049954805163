"""The residual stream of one prompt, taken apart: who wrote what, and what attention read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.hosts import AttentionWeights, Host, UnsupportedAttentionError, host_of
from lorsa_lens.recording import AttentionRecord, recorded
from lorsa_lens.singular.frozen_norm import FrozenNorm, freeze, no_norm
from lorsa_lens.singular.qk_head import QKHead, QKReading
from lorsa_lens.site import site_at

SUM_TOLERANCE = 1e-3
"""Largest error of the parts of the stream, relative to its largest entry."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerStream:
    """One layer on one prompt: what its attention read, and what the layer wrote."""

    weights: AttentionWeights
    resid_pre: Float[Tensor, "pos d_model"]
    x: Float[Tensor, "pos d_model"]
    """What attention received: the norm of `resid_pre`."""
    norm: FrozenNorm
    """From `resid_pre` to `x`."""
    keep: Bool[Tensor, "#query key"] | None
    """Keys that could be seen, where the host hid some."""
    qk_positions: Float[Tensor, "pos d_model"] | None
    """What queries and keys read besides (shortformer)."""
    pattern: Float[Tensor, "head query key"]
    values: Float[Tensor, "key head d_head"]
    """With the value bias."""
    W_out: Float[Tensor, "head d_head d_model"]
    """`W_O`, with the gain of a norm after attention in it."""
    out_factor: Float[Tensor, " pos"]
    """One over the frozen scale of that norm, else 1."""
    bias_out: Float[Tensor, "pos d_model"]
    """What biases write."""
    post_norm: FrozenNorm
    """From what attention returns to `attn_out`; nothing is changed where there is none."""
    attn_out: Float[Tensor, "pos d_model"]
    mlp_out: Float[Tensor, "pos d_model"]
    """What the MLP writes; zeros if there is none."""

    @property
    def qk_input(self) -> Float[Tensor, "pos d_model"]:
        """What queries and keys read."""
        return self.x if self.qk_positions is None else self.x + self.qk_positions

    def head_out(self, head: int, source: int) -> Float[Tensor, "pos d_model"]:
        """What one head writes, at every position, of what it read from one source token."""
        value = self.values[source, head] @ self.W_out[head]
        return (self.pattern[head, :, source] * self.out_factor)[:, None] * value


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stream:
    """The residual stream of one prompt, in float64."""

    model: nn.Module
    tokens: Int[Tensor, " pos"]
    token_embedding: Float[Tensor, "pos d_model"]
    position_embedding: Float[Tensor, "pos d_model"]
    """Learned positions; zeros where positions enter elsewhere."""
    layers: tuple[LayerStream, ...]
    final_norm: FrozenNorm
    W_U: Float[Tensor, "d_model vocab"]
    b_U: Float[Tensor, " vocab"]
    resid_final: Float[Tensor, "pos d_model"]
    logits: Float[Tensor, "pos vocab"]
    """What the model returned: capped, where it caps logits."""
    positions: Int[Tensor, " pos"]
    _heads: dict[tuple[int, int], QKReading] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Stream(n_pos={self.n_pos}, n_layers={len(self.layers)})"

    @property
    def n_pos(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def embedding(self) -> Float[Tensor, "pos d_model"]:
        """Tokens and learned positions together: the stream before the first layer."""
        return self.token_embedding + self.position_embedding

    def reading(self, layer: int, head: int) -> QKReading:
        """An attention head on this prompt, in the basis of its singular vectors."""
        if (layer, head) not in self._heads:
            form = QKHead.from_weights(self.layers[layer].weights, layer, head)
            self._heads[layer, head] = self.read(form)
        return self._heads[layer, head]

    def read(self, head: QKHead) -> QKReading:
        """Any head on this prompt: of another basis, or of a Lorsa."""
        layer = self.layers[head.layer]
        return head.reading(layer.qk_input, positions=self.positions, keep=layer.keep)


@torch.no_grad()
def record_stream(model: nn.Module, tokens: Int[Tensor, "*one pos"] | Sequence[int]) -> Stream:
    """Run a model on one prompt and take its residual stream apart.

    Args:
        model: a HookedTransformer or a TransformerBridge, no Lorsa in place.
        tokens: ids of one prompt, [pos] or [1, pos].

    Raises:
        ValueError: if `tokens` is no prompt, or a Lorsa is in place.
        UnsupportedAttentionError: if the stream is no sum of what attention, MLPs and embeddings
            write (BERT normalizes the stream itself), or attention cannot be read.
    """
    host = host_of(model)
    ids = torch.as_tensor(tokens)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"tokens has shape {list(ids.shape)}: give the ids of one prompt [pos]")
    for layer in range(host.n_layers):
        host.check_layer(layer)
        if site_at(host, layer) is not None:
            raise ValueError(f"layer {layer} is spliced: remove the splice, then trace")
    records, cache, logits = _run(host, ids)
    last = cache[f"blocks.{host.n_layers - 1}.hook_resid_post"]
    layers = tuple(_layer(host, layer, records[layer], cache) for layer in range(host.n_layers))
    embedding = cache["blocks.0.hook_resid_pre"]
    token_embedding = embedding
    if layers[0].weights.spec.positional_embedding_type == "standard":
        token_embedding = cache.get("hook_embed", embedding)
    _check_sum(embedding + sum(layer.attn_out + layer.mlp_out for layer in layers), last)
    W_U, b_U = host.unembedding
    norm = host.final_norm
    final = no_norm(last) if norm is None else freeze(norm, last, _apply(norm, last))
    return Stream(
        model=model,
        tokens=ids[0],
        token_embedding=token_embedding,
        position_embedding=embedding - token_embedding,
        layers=layers,
        final_norm=final,
        W_U=W_U.double(),
        b_U=b_U.double(),
        resid_final=last,
        logits=logits,
        positions=records[0].positions[0],
    )


_LAYER_HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")


def _run(
    host: Host, ids: Tensor
) -> tuple[list[AttentionRecord], dict[str, Tensor], Float[Tensor, "pos vocab"]]:
    """What attention layers received, what was written to the stream by hook name, and logits."""
    layers = range(host.n_layers)
    parts: dict[int, list[AttentionRecord]] = {layer: [] for layer in layers}
    cache: dict[str, Tensor] = {}

    def store(name: str, tensor: Tensor, hook: Any) -> None:
        del hook  # its own name differs: this may be an alias
        cache[name] = tensor[0].double()

    names = [f"blocks.{layer}.{name}" for layer in layers for name in _LAYER_HOOKS]
    names = [name for name in ["hook_embed", *names] if name in host.model.hook_dict]
    with recorded(host, layers, parts):
        logits = host.model.run_with_hooks(
            ids, fwd_hooks=[(name, partial(store, name)) for name in names]
        )
    return [parts[layer][0] for layer in layers], cache, logits[0].double()


def _layer(
    host: Host, layer: int, record: AttentionRecord, cache: dict[str, Tensor]
) -> LayerStream:
    """One layer's reading and writing, from what was recorded."""
    weights = host.read_attention(layer)
    resid_pre, x = cache[f"blocks.{layer}.hook_resid_pre"], record.x[0].double()
    norm = no_norm(x)
    if not torch.equal(resid_pre, x):
        norm = freeze(host.norm_before(layer), resid_pre, x)
    W_out, b_O = weights.W_O.double(), weights.b_O.double()
    out_factor, bias_out = torch.ones_like(x[:, 0]), b_O.expand_as(x)
    attn_out, post_norm = cache[f"blocks.{layer}.hook_attn_out"], host.post_norm(layer)
    post = no_norm(x)
    if post_norm is not None:
        post = freeze(post_norm, record.out[0].double(), attn_out)
        W_out, out_factor = _through(post, W_out), 1 / post.scale
        bias_out = post.share(bias_out) + post.bias
    shift = None if record.qk_input is None else record.qk_input[0].double() - x
    read = x if shift is None else x + shift
    keep = None if record.keep is None else record.keep[0]
    n_heads = len(weights.W_Q)
    forms = [QKHead.from_weights(weights, layer, head) for head in range(n_heads)]
    readings = [form.reading(read, positions=record.positions[0], keep=keep) for form in forms]
    values = einsum(x, weights.W_V.double(), "p m, h m d -> p h d") + weights.b_V.double()
    stream = LayerStream(
        weights=weights,
        resid_pre=resid_pre,
        x=x,
        norm=norm,
        keep=keep,
        qk_positions=shift,
        pattern=torch.stack([reading.pattern for reading in readings]),
        values=values,
        W_out=W_out,
        out_factor=out_factor,
        bias_out=bias_out,
        post_norm=post,
        attn_out=attn_out,
        mlp_out=cache.get(f"blocks.{layer}.hook_mlp_out", torch.zeros_like(x)),
    )
    z = einsum(stream.pattern, values, "h q k, k h d -> q h d")
    heads = einsum(z, W_out, "q h d, h d m -> q m") * out_factor[:, None]
    _check_sum(heads + bias_out, attn_out)
    return stream


def _through(norm: FrozenNorm, W: Float[Tensor, "head d d_model"]) -> Float[Tensor, "..."]:
    """What heads write, seen behind a norm, but for its scale."""
    if norm.centred:
        W = W - W.mean(dim=-1, keepdim=True)
    return W * norm.gain


def _apply(norm: nn.Module, r: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    like = next(norm.parameters(), r)
    out: Tensor = norm(r.to(like.dtype)[None])[0]
    return out.double()


def _check_sum(parts: Tensor, whole: Tensor) -> None:
    error = float((parts - whole).abs().max() / whole.abs().max())
    if not error < SUM_TOLERANCE:
        raise UnsupportedAttentionError(
            f"the residual stream is no sum of what attention, MLPs and embeddings write (it "
            f"differs by {error:.1e} of its largest entry): components cannot be told apart, as in "
            "models that normalize the stream itself"
        )
