"""The trained models of the testbed, loaded into whichever host TransformerLens offers.

The weights beside this module are what ``python -m lorsa_lens.testbed.train`` writes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from lorsa_lens.testbed.cyclic import CyclicLanguage
from lorsa_lens.testbed.network import LAYER_NORM_EPS, NetworkConfig
from lorsa_lens.testbed.recall import RecallLanguage
from lorsa_lens.testbed.rules import RuleLanguage

ModelName = Literal["rules", "induction", "recall"]
HostName = Literal["auto", "hooked_transformer", "bridge"]

MODEL_NAMES: tuple[ModelName, ...] = get_args(ModelName)
WEIGHTS_DIR = Path(__file__).parent / "weights"


@overload
def load_language(name: Literal["rules"]) -> RuleLanguage: ...
@overload
def load_language(name: Literal["induction"]) -> CyclicLanguage: ...
@overload
def load_language(name: Literal["recall"]) -> RecallLanguage: ...


def load_language(name: ModelName) -> RuleLanguage | CyclicLanguage | RecallLanguage:
    """The language a model was trained on.

    Raises:
        ValueError: if there is no such model.
    """
    _check_choice("name", name, MODEL_NAMES)
    if name == "rules":
        return RuleLanguage()
    return CyclicLanguage() if name == "induction" else RecallLanguage()


def load_weights(
    name: ModelName, *, folder: Path = WEIGHTS_DIR
) -> tuple[dict[str, Tensor], NetworkConfig]:
    """Weights of a model by HookedTransformer name, and its shape.

    Args:
        name: Which model.
        folder: Where `lorsa_lens.testbed.train` wrote it; the committed weights by default.

    Raises:
        ValueError: if there is no such model.
    """
    _check_choice("name", name, MODEL_NAMES)
    description = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return load_file(folder / f"{name}.safetensors"), NetworkConfig(**description["network"])


def load_model(
    name: ModelName,
    *,
    device: str | torch.device = "cpu",
    host: HostName = "auto",
    folder: Path = WEIGHTS_DIR,
) -> Any:
    """A trained model of the testbed as a TransformerLens host.

    The host is attention-only with LayerNorm (gain and bias not folded) and learned positions. It
    has no tokenizer: tokens come from ``load_language(name).sample`` and their strings from
    ``str_tokens``. It is returned in evaluation mode.

    Args:
        name: ``"rules"``, one layer with three heads for eleven rules, ``"induction"``, two
            layers that continue repeated segments, or ``"recall"``, two layers that recall pairs.
        device: Where the model goes.
        host: ``"hooked_transformer"``, ``"bridge"`` (TransformerBridge, TransformerLens 3.9 on), or
            ``"auto"``: HookedTransformer where the installed TransformerLens has it.
        folder: Where `lorsa_lens.testbed.train` wrote the model; the committed weights by default.

    Returns:
        A HookedTransformer or a TransformerBridge.

    Raises:
        ValueError: if ``name`` or ``host`` is none of the above.
        ImportError: if the installed TransformerLens does not have the host asked for.
    """
    _check_choice("host", host, get_args(HostName))
    weights, config = load_weights(name, folder=folder)
    if host == "auto":
        host = "hooked_transformer" if _has_hooked_transformer() else "bridge"
    build = _build_hooked_transformer if host == "hooked_transformer" else _build_bridge
    with torch.random.fork_rng(devices=[]):  # constructors draw weights that are overwritten here
        model = build(weights, config, device)
    return model.eval()


def _has_hooked_transformer() -> bool:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def _host_config(config: NetworkConfig) -> dict[str, Any]:
    """The options both hosts understand."""
    return {
        **asdict(config),
        "attn_only": True,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "eps": LAYER_NORM_EPS,
        "init_weights": False,
    }


def _build_hooked_transformer(
    weights: Mapping[str, Tensor], config: NetworkConfig, device: str | torch.device
) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise ImportError(
            "host='hooked_transformer' needs TransformerLens below 4, which removed "
            "HookedTransformer; use host='bridge'"
        ) from error
    model = HookedTransformer(HookedTransformerConfig(**_host_config(config), device=str(device)))
    _copy_into(model, weights)
    return model


def _build_bridge(
    weights: Mapping[str, Tensor], config: NetworkConfig, device: str | torch.device
) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge

        boot = TransformerBridge.boot_native
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "host='bridge' needs TransformerLens 3.9 or newer, for TransformerBridge.boot_native; "
            "use host='hooked_transformer'"
        ) from error
    bridge = boot(_host_config(config), device=str(device))
    _copy_into(bridge.original_model, native_weights(weights))
    return bridge


def native_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights renamed and reshaped from HookedTransformer's layout to that of a native bridge.

    The native model holds ordinary linear layers: [out, in] matrices with the heads side by side.
    """
    fixed = {
        "embed.W_E": "tok_embed.weight",
        "pos_embed.W_pos": "pos.weight",
        "ln_final.w": "ln_out.weight",
        "ln_final.b": "ln_out.bias",
        "unembed.b_U": "head.bias",
    }
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in fixed:
            converted[fixed[name]] = weight
            continue
        if name == "unembed.W_U":
            converted["head.weight"] = rearrange(weight, "model vocab -> vocab model")
            continue
        prefix, kind = name.replace("blocks.", "layers.").rsplit(".", 1)
        if kind in ("w", "b"):
            converted[f"{prefix}.{'weight' if kind == 'w' else 'bias'}"] = weight
        elif kind == "b_O":
            converted[f"{prefix}.o.bias"] = weight
        elif kind == "W_O":
            converted[f"{prefix}.o.weight"] = rearrange(weight, "h d model -> model (h d)")
        elif kind.startswith("W_"):
            name_in_layer = f"{prefix}.{kind[2:].lower()}.weight"
            converted[name_in_layer] = rearrange(weight, "h model d -> (h d) model")
        else:
            converted[f"{prefix}.{kind[2:].lower()}.bias"] = rearrange(weight, "h d -> (h d)")
    return converted


def _copy_into(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy every weight to its place in a host; no parameter of the host may be left out."""
    # A bridge wraps components in place, which puts "_original_component" into the names; on
    # TransformerLens 4 its unembedding bias is a buffer.
    parameters, buffers = (
        {name.replace("._original_component", ""): tensor for name, tensor in named}
        for named in (model.named_parameters(), model.named_buffers())
    )
    places = {**buffers, **parameters}
    unmatched = (parameters.keys() - weights.keys()) | (weights.keys() - places.keys())
    if unmatched:
        raise RuntimeError(
            "the installed TransformerLens names this model's parameters differently: "
            f"{sorted(unmatched)} have no counterpart"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            places[name].copy_(weight)


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}; got {value!r}")
