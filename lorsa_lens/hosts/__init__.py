"""The only place that knows TransformerLens's internals: one adapter per class of model."""

from typing import Any

from torch import nn

from lorsa_lens.hosts.base import (
    AttentionCall,
    AttentionWeights,
    Host,
    InputNorm,
    UnsupportedAttentionError,
)

__all__ = [
    "AttentionCall",
    "AttentionWeights",
    "Host",
    "InputNorm",
    "UnsupportedAttentionError",
    "host_of",
]


def host_of(model: nn.Module) -> Host:
    """The adapter for a model.

    Raises:
        TypeError: if the model is neither a HookedTransformer nor a TransformerBridge.
    """
    candidate: Any = model
    if hasattr(candidate, "original_model") and hasattr(candidate, "adapter"):
        from lorsa_lens.hosts.bridge import BridgeHost

        return BridgeHost(model)
    if all(hasattr(candidate, name) for name in ("hook_dict", "mod_dict", "blocks", "cfg")):
        from lorsa_lens.hosts.hooked_transformer import HookedTransformerHost

        return HookedTransformerHost(model)
    raise TypeError(
        f"model is a {type(model).__name__}: a Lorsa attaches to a HookedTransformer or a "
        "TransformerBridge (TransformerBridge.boot_transformers makes one of a Hugging Face model)"
    )
