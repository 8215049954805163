"""What every host can do, whatever its class: the protocol that adapters fulfil."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.config import AttentionSpec
from lorsa_lens.hook_points import HookPoint

Forward = Callable[..., Any]
"""The `forward` of a module."""

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class UnsupportedAttentionError(ValueError):
    """An attention layer that a Lorsa cannot replace truthfully; the message says why."""


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """One attention layer of a host, read out: all its weights, and all else in its `spec`.

    Keys and values of grouped-query attention are repeated, so that every head has its own.
    """

    spec: AttentionSpec
    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "head d_head"]
    b_V: Float[Tensor, "head d_head"]
    b_O: Float[Tensor, " d_model"]
    q_norm: Float[Tensor, "head d_head"] | None = None
    """Gain of the queries' RMS norm, where `spec.qk_norm` says there is one."""
    k_norm: Float[Tensor, "head d_head"] | None = None
    """Gain of the keys' RMS norm."""


class InputNorm(NamedTuple):
    """The affine part of the norm before attention: `x = normalized * gain + bias`."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]


class LayerCache(ABC):
    """One layer's place in the host's KV cache."""

    n_past: int
    """Tokens that the host's cache held before this call."""

    @abstractmethod
    def load(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Keys [batch, key, head, dim] and values [batch, key, head] stored under a name."""

    @abstractmethod
    def store(self, name: str, k: Tensor, v: Tensor, n_new: int) -> None:
        """Keep keys and values, the last `n_new` of which are new."""

    @abstractmethod
    def advance(self, like: Tensor) -> None:
        """Count the tokens of `like` [batch, pos, ...] in the host's own place, at no memory.

        The host derives positions and masks from the length of its cache, so it must grow also
        where the layer's own keys and values are never computed.
        """


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of a host's attention, in the terms of a Lorsa."""

    x: Float[Tensor, "batch pos d_model"]
    """What the attention module receives; values read it."""
    qk_input: Float[Tensor, "batch pos d_model"] | None
    """What queries and keys read, where that differs."""
    positions: Int[Tensor, "#batch pos"]
    """Position of each token."""
    keep: Bool[Tensor, "batch #pos key"] | None
    """Keys that may be seen."""
    cache: LayerCache | None
    """The layer's place in the KV cache, if there is one."""
    n_past: int
    """Tokens in the cache before this call."""


class Host(ABC):
    """A model whose attention layers can be read and replaced."""

    reader: ModuleType
    """Reads weights: `read_attention(model, layer)` and `input_norm(model, layer)`."""

    forbidden: tuple[str, ...] = ()
    """Methods of the model that rewrite its weights: refused while a Lorsa is in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def n_layers(self) -> int:
        """Number of blocks.

        Raises:
            UnsupportedAttentionError: if there is no one stack of them.
        """
        if not hasattr(self.model, "blocks"):
            raise UnsupportedAttentionError(
                "the model has no single stack of blocks (an encoder-decoder has two, and "
                "attention between them): a Lorsa replaces self-attention of decoders or encoders"
            )
        return len(self.model.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def model_name(self) -> str | None:
        """The model's name, where it has one."""
        return getattr(self.model.cfg, "model_name", None)

    @property
    def shortformer(self) -> bool:
        """Whether queries and keys read another input than values: the stream plus positions."""
        return getattr(self.model.cfg, "positional_embedding_type", None) == "shortformer"

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that does not exist, or whose attention cannot be replaced.

        Raises:
            ValueError: if the layer is out of range, or the model hands attention separate
                inputs for each head.
            UnsupportedAttentionError: if a Lorsa cannot stand in for this attention.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer = {layer}, but the model has layers 0 to {self.n_layers - 1}")
        for option in ("use_split_qkv_input", "use_attn_in"):
            if getattr(self.model.cfg, option, False):
                raise ValueError(
                    f"the model has {option} = True: attention then receives an input for each "
                    f"head, which a Lorsa cannot read. Call model.set_{option}(False) first"
                )

    def block(self, layer: int) -> Any:
        """The transformer block of a layer."""
        return self.model.blocks[layer]

    def attention(self, layer: int) -> Any:
        """The attention module of a layer, whose `forward` is overridden."""
        return self.block(layer).attn

    def is_folded(self, layer: int) -> bool:
        """Whether attention receives the normalized residual stream with no affine part."""
        return self.input_norm(layer) is None

    def shows_normalized(self, layer: int) -> bool:
        """Whether `ln1.hook_normalized` shows what attention reads, before the gain and bias."""
        ln1 = getattr(self.block(layer), "ln1", None)
        return hasattr(ln1, "hook_normalized") and ln1 is not self.post_norm(layer)

    def read_attention(self, layer: int) -> AttentionWeights:
        """Weights and all else of a layer's attention.

        Raises:
            UnsupportedAttentionError: if a Lorsa cannot stand in for this attention.
        """
        self.check_layer(layer)
        weights: AttentionWeights = self.reader.read_attention(self.model, layer)
        return weights

    def input_norm(self, layer: int) -> InputNorm | None:
        """The affine part of the norm before attention, None if there is none or it is folded."""
        norm = self.reader.input_norm(self.model, layer)
        return None if norm is None else InputNorm(*norm)

    def norm_before(self, layer: int) -> nn.Module:
        """The block's first norm: before attention, unless attention reads the stream itself."""
        norm: nn.Module = self.block(layer).ln1
        return norm

    def mlp(self, layer: int) -> nn.Module | None:
        """The block's MLP, if it has one."""
        return getattr(self.block(layer), "mlp", None)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm whose output the MLP reads: a second one, or the one that attention reads.

        None where it reads the stream itself (OLMo 2 normalizes after it).
        """
        second: nn.Module | None = getattr(self.block(layer), "ln2", None)
        if second is None:
            return self.norm_before(layer)
        return None if self.mlp_post_norm(layer) is second else second

    @property
    def parallel(self) -> bool:
        """Whether MLPs read the stream before attention writes to it, as in GPT-NeoX and GPT-J."""
        return bool(getattr(self.model.cfg, "parallel_attn_mlp", False))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding, if there is one."""
        return getattr(self.model, "ln_final", None)

    @property
    def unembedding(
        self,
    ) -> tuple[Float[Tensor, "d_model vocab"], Float[Tensor, " vocab"]]:
        """Weights and bias from the normalized stream to logits (before a cap on logits)."""
        return self.model.W_U.detach(), self.model.b_U.detach()

    @abstractmethod
    def post_norm(self, layer: int) -> nn.Module | None:
        """The module between attention and the residual stream, if there is one."""

    @abstractmethod
    def mlp_post_norm(self, layer: int) -> nn.Module | None:
        """The module between the MLP and the residual stream, if there is one."""

    @abstractmethod
    def name_hooks(self, hook_points: Mapping[str, HookPoint], holder: nn.Module) -> None:
        """Make hook points known under full names; `holder` is the module that holds them."""

    @abstractmethod
    def forget_hooks(self, hook_points: Mapping[str, HookPoint]) -> None:
        """Undo `name_hooks`."""

    @abstractmethod
    def receive(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        """Understand a call of the layer's attention; hooks on its input fire."""

    @abstractmethod
    def run_original(
        self, layer: int, original: Forward, call: AttentionCall, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """What the layer's own attention, whose `forward` is `original`, returns for a call."""

    @abstractmethod
    def respond(self, layer: int, out: Tensor) -> Any:
        """An attention output as the caller expects it; hooks on it fire."""

    @abstractmethod
    def run_post_norm(self, layer: int, original: Forward, args: tuple[Any, ...]) -> Tensor:
        """What the post-norm, whose `forward` is `original`, returns; hooks on it are silent."""

    @abstractmethod
    def respond_post_norm(self, layer: int, out: Tensor) -> Tensor:
        """An output in place of the post-norm's; hooks on it fire."""
