"""Load a model by name, folder or hub id, with whatever the installed TransformerLens has."""

from typing import Any

import torch


def load_host(name: str, *, device: torch.device | str = "cpu") -> Any:
    """A model to attach Lorsas to: a TransformerBridge, or a HookedTransformer before 3.9.

    Args:
        name: a folder with a Hugging Face model and its tokenizer, or an id on the hub.
        device: where it goes.

    Raises:
        OSError: if there is no such model, or no network to fetch it.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # pragma: no cover - TransformerLens 2.x
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained(name, device=str(device))
    return TransformerBridge.boot_transformers(name, device=str(device))
