"""The attention-only transformer of the testbed, as plain functions of a dictionary of weights.

The weights carry HookedTransformer's names and shapes (``blocks.0.attn.W_Q`` [head, d_model,
d_head], ...). Training runs on these functions, so it is the same with every version of
TransformerLens, and `load_model` puts the result into a host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of an attention-only transformer with LayerNorm and learned positions.

    Attributes:
        n_layers: Number of attention layers.
        n_heads: Heads per layer.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        n_ctx: Longest sequence.
        d_vocab: Size of the vocabulary.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int


class NetworkOutput(NamedTuple):
    """Result of `run_network`.

    Attributes:
        logits: Logits of the next token.
        patterns: Attention pattern of each layer.
    """

    logits: Float[Tensor, "batch pos vocab"]
    patterns: tuple[Float[Tensor, "batch head query key"], ...]


def weight_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the network, by name."""
    heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
    shapes: dict[str, tuple[int, ...]] = {
        "embed.W_E": (config.d_vocab, d_model),
        "pos_embed.W_pos": (config.n_ctx, d_model),
    }
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.ln1.w": (d_model,), f"{block}.ln1.b": (d_model,)}
        for name in "QKV":
            shapes[f"{block}.attn.W_{name}"] = (heads, d_model, d_head)
            shapes[f"{block}.attn.b_{name}"] = (heads, d_head)
        shapes[f"{block}.attn.W_O"] = (heads, d_head, d_model)
        shapes[f"{block}.attn.b_O"] = (d_model,)
    return shapes | {
        "ln_final.w": (d_model,),
        "ln_final.b": (d_model,),
        "unembed.W_U": (d_model, config.d_vocab),
        "unembed.b_U": (config.d_vocab,),
    }


def initial_weights(config: NetworkConfig, *, seed: int) -> dict[str, Tensor]:
    """Fresh weights: matrices normal with deviation 0.8 / sqrt(d_model), biases 0, norm gains 1."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        parameter = name.rsplit(".", 1)[1]
        if parameter.startswith("W_"):
            weights[name] = torch.randn(shape, generator=generator) * 0.8 / config.d_model**0.5
        else:
            weights[name] = torch.ones(shape) if parameter == "w" else torch.zeros(shape)
    return weights


def run_network(
    weights: Mapping[str, Tensor], tokens: Int[Tensor, "batch pos"], config: NetworkConfig
) -> NetworkOutput:
    """Logits and attention patterns of the network.

    Args:
        weights: Weights by name, as in `weight_shapes`.
        tokens: Token ids.
        config: Shape of the network.

    Raises:
        ValueError: if the sequences are longer than ``config.n_ctx``.
    """
    n_pos = tokens.shape[1]
    if n_pos > config.n_ctx:
        raise ValueError(f"tokens have {n_pos} positions, the network has n_ctx = {config.n_ctx}")
    residual = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][:n_pos]
    patterns = []
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        normalized = _layer_norm(residual, weights[f"{block}.ln1.w"], weights[f"{block}.ln1.b"])
        attn = {name: weights[f"{block}.attn.{name}"] for name in _ATTENTION_WEIGHTS}
        output, pattern = _attention(attn, normalized)
        residual = residual + output
        patterns.append(pattern)
    normalized = _layer_norm(residual, weights["ln_final.w"], weights["ln_final.b"])
    logits = normalized @ weights["unembed.W_U"] + weights["unembed.b_U"]
    return NetworkOutput(logits, tuple(patterns))


_ATTENTION_WEIGHTS = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")


def _layer_norm(
    x: Float[Tensor, "batch pos d_model"], w: Float[Tensor, "d_model"], b: Float[Tensor, "d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b, LAYER_NORM_EPS)


def _attention(
    weights: Mapping[str, Tensor], x: Float[Tensor, "batch pos d_model"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head query key"]]:
    """Causal attention of one layer, and its pattern."""
    q, k, v = (
        einsum(x, weights[f"W_{name}"], "b p m, h m d -> b p h d") + weights[f"b_{name}"]
        for name in "QKV"
    )
    scores = einsum(q, k, "b q h d, b k h d -> b h q k") / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    pattern = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    z = einsum(pattern, v, "b h q k, b k h d -> b q h d")
    return einsum(z, weights["W_O"], "b p h d, h d m -> b p m") + weights["b_O"], pattern
