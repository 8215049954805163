"""Load a model by name, folder or hub id, with whatever the installed TransformerLens has."""

from pathlib import Path
from typing import Any

import torch


def load_host(name: str, *, device: torch.device | str = "cpu") -> Any:
    """A model to attach Lorsas to: a TransformerBridge, or a HookedTransformer before 3.9.

    Its weights are as they were trained, nothing is folded or centered.

    Args:
        name: a folder with a Hugging Face model and its tokenizer, or an id on the hub.
        device: where it goes.

    Raises:
        ValueError: if there is no such model, no network to fetch it, or TransformerLens does not
            know its kind.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".")):
        raise ValueError(f"there is no folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json: give a folder with a Hugging Face model")
    try:
        return _load(name, str(device))
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"the model {name} cannot be loaded: {reason}") from error


def _load(name: str, device: str) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # pragma: no cover - TransformerLens 2.x
        return _load_hooked_transformer(name, device)
    if not hasattr(TransformerBridge, "boot_native"):  # pragma: no cover - 3.0 to 3.8
        return _load_hooked_transformer(name, device)
    return TransformerBridge.boot_transformers(name, device=device)


def _load_hooked_transformer(name: str, device: str) -> Any:
    from transformer_lens import HookedTransformer

    if not Path(name).is_dir():
        return HookedTransformer.from_pretrained_no_processing(name, device=device)
    # `from_pretrained` takes no folder, the functions under it do.
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hugging_face = AutoModelForCausalLM.from_pretrained(name)
    cfg = loading.get_pretrained_model_config(name, fold_ln=False, device=device)
    weights = loading.get_pretrained_state_dict(name, cfg, hugging_face)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(name))
    model.load_state_dict(weights, strict=False)
    return model
