"""HookedTransformer (and HookedEncoder), TransformerLens 2.16.1 to 3.9."""

from collections.abc import Mapping
from typing import Any

import torch
import transformer_lens
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.hook_points import HookPoint
from lorsa_lens.hosts import read_hooked
from lorsa_lens.hosts.base import (
    Args,
    AttentionCall,
    Forward,
    Host,
    Kwargs,
    LayerCache,
)

ARGUMENTS = (
    "query_input",
    "key_input",
    "value_input",
    "past_kv_cache_entry",
    "additive_attention_mask",
    "attention_mask",
    "position_bias",
)
"""What `Attention.forward` takes, in this order."""


class HookedTransformerHost(Host):
    """A HookedTransformer or a HookedEncoder."""

    reader = read_hooked
    forbidden = (
        "process_weights_",
        "load_and_process_state_dict",
        "fold_layer_norm",
        "fold_value_biases",
        "center_writing_weights",
        "refactor_factored_attn_matrices",
    )

    @override
    def post_norm(self, layer: int) -> nn.Module | None:
        return read_hooked.post_norm(self.model, layer)

    @override
    def mlp_post_norm(self, layer: int) -> nn.Module | None:
        return read_hooked.mlp_post_norm(self.model, layer)

    @override
    def shows_normalized(self, layer: int) -> bool:
        block = self.block(layer)
        if hasattr(block, "hook_normalized_resid_post"):  # BERT normalizes after attention
            return False
        # Before TransformerLens 3 the hook point of a LayerNorm comes after its gain and bias.
        before_3 = not hasattr(transformer_lens, "HookedRootModule")
        if before_3 and type(block.ln1).__name__ == "LayerNorm":
            return self.input_norm(layer) is None
        return super().shows_normalized(layer)

    @override
    def name_hooks(self, hook_points: Mapping[str, HookPoint], holder: nn.Module) -> None:
        for name, hook_point in hook_points.items():
            hook_point.name = name
            self.model.mod_dict[name] = hook_point
            self.model.hook_dict[name] = hook_point
        self.model.mod_dict[_holder_name(hook_points)] = holder

    @override
    def forget_hooks(self, hook_points: Mapping[str, HookPoint]) -> None:
        for name in hook_points:
            self.model.mod_dict.pop(name, None)
            self.model.hook_dict.pop(name, None)
        self.model.mod_dict.pop(_holder_name(hook_points), None)

    @override
    def receive(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        x = given["value_input"]
        if x.ndim != 3:
            raise ValueError(
                "attention received an input for each head, which a Lorsa cannot read. Call "
                "model.set_use_split_qkv_input(False) and model.set_use_attn_in(False)"
            )
        entry = given.get("past_kv_cache_entry")
        cache = None if entry is None else _EntryCache(entry)
        n_past = 0 if cache is None else cache.n_past
        padding = given.get("attention_mask")
        return AttentionCall(
            x=x,
            qk_input=given["query_input"] if self.shortformer else None,
            positions=_positions(padding, n_past, x),
            keep=self._keep(padding, given.get("additive_attention_mask")),
            cache=cache,
            n_past=n_past,
        )

    def _keep(self, padding: Tensor | None, additive: Tensor | None) -> Bool[Tensor, "..."] | None:
        """Keys that may be seen; a bidirectional HookedTransformer looks at `additive` only."""
        if additive is not None:
            return rearrange(additive > -1.0, "b 1 q k -> b q k")
        if padding is None or self.model.cfg.attention_dir != "causal":
            return None
        return rearrange(padding.bool(), "b k -> b 1 k")

    @override
    def run_original(
        self, layer: int, original: Forward, call: AttentionCall, args: Args, kwargs: Kwargs
    ) -> Tensor:
        out: Tensor = original(*args, **kwargs)
        return out

    @override
    def respond(self, layer: int, out: Tensor) -> Tensor:
        return out

    @override
    def run_post_norm(self, layer: int, original: Forward, args: tuple[Any, ...]) -> Tensor:
        out: Tensor = original(*args)
        return out

    @override
    def respond_post_norm(self, layer: int, out: Tensor) -> Tensor:
        return out


class _EntryCache(LayerCache):
    """TransformerLens's own cache entry; what the Lorsa keeps is an attribute of it."""

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self.n_past = int(entry.past_keys.shape[1])

    @override
    def load(self, name: str) -> tuple[Tensor, Tensor] | None:
        stored: dict[str, tuple[Tensor, Tensor]] = getattr(self.entry, "lorsa_states", {})
        return stored.get(name)

    @override
    def store(self, name: str, k: Tensor, v: Tensor, n_new: int) -> None:
        if self.entry.frozen:
            return
        if not hasattr(self.entry, "lorsa_states"):
            self.entry.lorsa_states = {}
        self.entry.lorsa_states[name] = (k, v)

    @override
    def advance(self, like: Tensor) -> None:
        if self.entry.frozen:
            return
        batch, n_new = like.shape[:2]
        n_tokens = self.n_past + n_new
        for name in ("past_keys", "past_values"):
            own = getattr(self.entry, name)
            nothing = own.new_zeros(1, 1, 1, 1).expand(batch, n_tokens, *own.shape[2:])
            setattr(self.entry, name, nothing)


def _holder_name(hook_points: Mapping[str, HookPoint]) -> str:
    return next(iter(hook_points)).rpartition(".")[0]


def _positions(padding: Tensor | None, n_past: int, x: Tensor) -> Int[Tensor, "#batch pos"]:
    """Positions counted from the first token that is no padding, as TransformerLens counts them."""
    n_new = x.shape[1]
    if padding is None:
        return torch.arange(n_past, n_past + n_new, device=x.device)[None]
    counted = (padding.long().cumsum(dim=1) - 1).clamp(min=0)
    return counted[:, n_past:]
