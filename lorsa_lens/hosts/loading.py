"""Load a model by name, folder or hub id, with whatever the installed TransformerLens has."""

from pathlib import Path
from typing import Any

import torch


def load_host(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A model to attach Lorsas to: a TransformerBridge, or a HookedTransformer before 3.9.

    Its weights are as they were trained, nothing is folded or centered.

    Args:
        name: a folder with a Hugging Face model and its tokenizer, or an id on the hub.
        device: where it goes; `meta` for a model without weights, if there are bridges (from
            TransformerLens 3.9 on; before, it goes to the CPU with its weights).
        dtype: precision of its weights.

    Raises:
        ValueError: if there is no such model, no network to fetch it, or TransformerLens does not
            know its kind.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".")):
        raise ValueError(f"there is no folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json: give a folder with a Hugging Face model")
    try:
        return _load(name, str(device), dtype)
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"the model {name} cannot be loaded: {reason}") from error


def _load(name: str, device: str, dtype: torch.dtype) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:  # pragma: no cover - TransformerLens 2.x
        return _load_hooked_transformer(name, device, dtype)
    if not hasattr(TransformerBridge, "boot_native"):  # pragma: no cover - 3.0 to 3.8
        return _load_hooked_transformer(name, device, dtype)
    if device == "meta":
        empty = _empty(name).to(dtype)
        return TransformerBridge.boot_transformers(name, hf_model=empty, device=device, dtype=dtype)
    return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)


def _empty(name: str) -> Any:
    """The Hugging Face model, with shapes and no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        # As bridges load it.
        config = AutoConfig.from_pretrained(name)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _load_hooked_transformer(name: str, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformer

    device = "cpu" if device == "meta" else device

    if not Path(name).is_dir():
        return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype)
    # `from_pretrained` takes no folder, the functions under it do.
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hugging_face = AutoModelForCausalLM.from_pretrained(name)
    cfg = loading.get_pretrained_model_config(name, fold_ln=False, device=device)
    weights = loading.get_pretrained_state_dict(name, cfg, hugging_face)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(name))
    model.load_state_dict(weights, strict=False)
    return model.to(dtype)
