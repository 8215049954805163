"""TransformerBridge, TransformerLens 3.9 to 4.x."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.hook_points import HookPoint, fire
from lorsa_lens.hosts import read_bridge
from lorsa_lens.hosts.base import (
    Args,
    AttentionCall,
    Forward,
    Host,
    Kwargs,
    LayerCache,
)


class BridgeHost(Host):
    """A TransformerBridge: attention is called by Hugging Face's code, in several ways."""

    reader = read_bridge
    forbidden = ("enable_compatibility_mode", "process_weights", "process_compatibility_weights")

    @override
    def post_norm(self, layer: int) -> nn.Module | None:
        writer, component = self._writer(layer, "hook_attn_out")
        return None if writer == "attn" else component

    @override
    def mlp_post_norm(self, layer: int) -> nn.Module | None:
        writer, component = self._writer(layer, "hook_mlp_out")
        return None if writer == "mlp" else component

    def _writer(self, layer: int, name: str) -> tuple[str, nn.Module]:
        """The block's component whose output is a hook point, and what it is called."""
        # By identity of the hook point: names change in compatibility mode.
        shown = getattr(self.block(layer), name, None)
        for writer, component in self.block(layer)._modules.items():
            if writer == "_original_component" or component is None:
                continue
            if shown is not None and component._modules.get("hook_out") is shown:
                return writer, component
        raise read_bridge.unsupported(layer, f"{name} is not the output of one component")

    @override
    def name_hooks(self, hook_points: Mapping[str, HookPoint], holder: nn.Module) -> None:
        for name, hook_point in hook_points.items():
            hook_point.name = name
            self.model._hook_registry[name] = hook_point

    @override
    def forget_hooks(self, hook_points: Mapping[str, HookPoint]) -> None:
        for name in hook_points:
            self.model._hook_registry.pop(name, None)

    @override
    def receive(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        received = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        x = fire(self.attention(layer).hook_in, received)
        past = kwargs.get("past_key_values")
        past = kwargs.get("layer_past") if past is None else past
        cache = None if past is None else _HuggingFaceCache(past, layer, self.n_layers)
        n_past = 0 if cache is None else cache.n_past
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(n_past, n_past + x.shape[1], device=x.device)[None]
        keep = self._keep(kwargs.get("attention_mask"), x.shape[1], n_past + x.shape[1])
        return AttentionCall(
            x=x, qk_input=None, positions=positions, keep=keep, cache=cache, n_past=n_past
        )

    def _keep(
        self, mask: Tensor | None, n_new: int, n_keys: int
    ) -> Bool[Tensor, "batch #pos key"] | None:
        """Keys that may be seen, from any of the masks that Hugging Face's code hands down."""
        if mask is None:
            return None
        if mask.ndim == 2:
            keep = rearrange(mask.bool(), "b k -> b 1 k")
        elif mask.dtype == torch.bool:
            keep = (mask if self._true_means_keep() else ~mask)[:, 0]
        else:
            keep = mask[:, 0] > -1.0  # additive: 0, or a very negative number
        if keep.shape[1] > n_new:
            keep = keep[:, -n_new:]
        n_given = keep.shape[-1]
        if n_given < n_keys:  # a sliding window's mask covers the last keys only
            return F.pad(keep, (n_keys - n_given, 0), value=False)
        return keep[..., :n_keys]

    def _true_means_keep(self) -> bool:
        adapter = self.model.adapter
        inverted = type(adapter).__name__ in ("NativeArchitectureAdapter", "MPTArchitectureAdapter")
        return bool(getattr(adapter, "bool_4d_mask_is_keep", not inverted))

    @override
    def run_original(
        self, layer: int, original: Forward, call: AttentionCall, args: Args, kwargs: Kwargs
    ) -> Tensor:
        if "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": call.x}
        else:
            args = (call.x, *args[1:])
        with _silenced(self.attention(layer), "hook_in", "hook_out"):
            out = original(*args, **kwargs)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    @override
    def respond(self, layer: int, out: Tensor) -> tuple[Tensor, None]:
        return fire(self.attention(layer).hook_out, out), None

    @override
    def run_post_norm(self, layer: int, original: Forward, args: tuple[Any, ...]) -> Tensor:
        post_norm = self.post_norm(layer)
        assert post_norm is not None  # it is its `forward` that is called
        with _silenced(post_norm, "hook_out"):
            out: Tensor = original(*args)
        return out

    @override
    def respond_post_norm(self, layer: int, out: Tensor) -> Tensor:
        post_norm: Any = self.post_norm(layer)
        return fire(post_norm.hook_out, out)


class _HuggingFaceCache(LayerCache):
    """Hugging Face's cache; what a Lorsa keeps lies in layers appended to it.

    Being layers of the cache, they are reordered by beam search, cropped and repeated with it.
    """

    def __init__(self, cache: Any, layer: int, n_layers: int) -> None:
        self.cache, self.layer, self.n_layers = cache, layer, n_layers
        self.n_past = int(cache.get_seq_length(layer))

    def _slot(self, name: str) -> Any:
        from transformers.cache_utils import DynamicLayer

        slots: dict[tuple[int, str], int] = self.cache.__dict__.setdefault("lorsa_slots", {})
        layers = self.cache.layers
        if (self.layer, name) not in slots:
            while len(layers) < self.n_layers:  # the host's own layers come first
                layers.append((self.cache.layer_class_to_replicate or DynamicLayer)())
            slots[self.layer, name] = len(layers)
            layers.append(DynamicLayer())
        return layers[slots[self.layer, name]]

    @override
    def load(self, name: str) -> tuple[Tensor, Tensor] | None:
        slot = self._slot(name)
        if not slot.get_seq_length():
            return None
        return rearrange(slot.keys, "b h k d -> b k h d"), rearrange(
            slot.values, "b 1 k h -> b k h"
        )

    @override
    def store(self, name: str, k: Tensor, v: Tensor, n_new: int) -> None:
        first = k.shape[1] - n_new
        self._slot(name).update(
            rearrange(k[:, first:], "b k h d -> b h k d"),
            rearrange(v[:, first:], "b k h -> b 1 k h"),
        )

    @override
    def advance(self, like: Tensor) -> None:
        batch, n_new = like.shape[:2]
        nothing = like.new_zeros(1, 1, 1, 1).expand(batch, 1, n_new, 1)
        self.cache.update(nothing, nothing, self.layer)


@contextmanager
def _silenced(component: nn.Module, *names: str) -> Iterator[None]:
    """Within, hook points of a component are passed by."""
    modules = component._modules
    hook_points = {name: modules[name] for name in names if name in modules}
    modules.update({name: nn.Identity() for name in hook_points})
    try:
        yield
    finally:
        modules.update(hook_points)
