"""The layout of the repository of the paper (arXiv 2504.20938): `config.json` and `final.pth`.

It computes what the Llamascopium layout does, without norms of queries and keys, and with `W_V`
[n_ov_heads, d_model, 1] and `W_O` [n_ov_heads, 1, d_model]. Heads are ranked by `|z| ||w_O||`, or
by `relu(z) ||w_O||` where `use_z_relu` is set. Activations were scaled to a norm of `sqrt(d_model)`
on average where `avg_norm` is given; that is folded in.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorsa_lens.config import LorsaConfig
from lorsa_lens.interop.llamascopium_config import LlamascopiumConfig
from lorsa_lens.interop.scales import fold_scales
from lorsa_lens.io.sources import (
    DTYPES,
    LoadError,
    load_weights_only,
    only_tensors,
    read_json,
)
from lorsa_lens.io.weights import load_weights
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.validation import ConfigError

WEIGHTS_FILE = "final.pth"

BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")

SHARED = (
    "d_model",
    "n_qk_heads",
    "d_qk_head",
    "rotary_dim",
    "rotary_base",
    "rotary_adjacent_pairs",
    "rotary_scale",
    "use_NTK_by_parts_rope",
    "NTK_by_parts_factor",
    "NTK_by_parts_low_freq_factor",
    "NTK_by_parts_high_freq_factor",
    "old_context_len",
    "attn_scale",
)
"""Keys that mean the same in the Llamascopium layout."""


def load_paper(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Lorsa:
    """Load a Lorsa in this layout; `final.pth` is read as weights only.

    Args:
        folder: holds `config.json` and `final.pth`.
        device: where it goes.
        dtype: precision to convert to. None: as saved.

    Raises:
        FileNotFoundError: if there are no weights.
        LoadError: if the files are damaged, or mean something that a Lorsa cannot do.
    """
    values, path = read_json(folder / "config.json"), folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}, so no Lorsa is saved there")
    try:
        cfg, (x, out) = paper_config(values), _scales(values)
    except ConfigError as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from None
    tensors = dict(only_tensors(path, load_weights_only(path)).tensors)
    for name, flat_dim in (("W_V", 2), ("W_O", 1), ("b_V", 1)):
        if name in tensors and tensors[name].ndim > flat_dim:
            tensors[name] = tensors[name].squeeze(flat_dim)
    source = only_tensors(path, tensors)
    if dtype is None and "W_O" in source.headers:
        dtype = DTYPES.get(source.headers["W_O"].dtype)
    cfg = cfg.replace(dtype=str(dtype or torch.float32).removeprefix("torch."))
    lorsa = load_weights(cfg, source, device=device, ignored=BUFFERS)
    fold_scales(lorsa, x=x, out=out)
    return lorsa


def paper_config(values: Mapping[str, Any]) -> LorsaConfig:
    """In our terms: by way of the Llamascopium layout, with which most keys are shared.

    Raises:
        ConfigError: if it cannot be, or asks for what a Lorsa cannot do.
    """
    if values.get("d_ov_head") != 1:
        raise ConfigError(f"d_ov_head = {values.get('d_ov_head')!r}: only rank 1 is read")
    if values.get("virtual_kv_num"):
        raise ConfigError(
            f"virtual_kv_num = {values['virtual_kv_num']!r}: keys that no token has, which a Lorsa "
            "cannot attend to"
        )
    if values.get("mode", "default") not in ("default", "top_k"):
        raise ConfigError(f"mode = {values['mode']!r}: only 'top_k' and 'default' are read")
    sizes = {name: values.get(name) for name in ("d_model", "n_ov_heads", "layer")}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (name != "layer"):
            raise ConfigError(f"{name} = {value!r} must be given as an integer")
    rotary = values.get("positional_embedding_type", "rotary") == "rotary"
    shared = {name: values[name] for name in SHARED if values.get(name) is not None}
    shared.setdefault("rotary_adjacent_pairs", False)
    cfg = LlamascopiumConfig.from_values(
        {
            **shared,
            "expansion_factor": values["n_ov_heads"] / values["d_model"],
            "hook_point_in": f"blocks.{values['layer']}.ln1.hook_normalized",
            "hook_point_out": f"blocks.{values['layer']}.hook_attn_out",
            "positional_embedding_type": "rotary" if rotary else "none",
        }
    ).to_lorsa_config()
    all_stay = values.get("mode", "default") == "default"
    return cfg.replace(
        act_fn="topk_relu" if values.get("use_z_relu") and not all_stay else "topk",
        k=None if all_stay else values.get("top_k"),
        model_name=values.get("model_name"),
    )


def _scales(values: Mapping[str, Any]) -> tuple[float, float]:
    norms = values.get("avg_norm")
    if norms is None:
        return 1.0, 1.0
    try:
        pair = [float(norms[side]) for side in ("in", "out")]
    except (TypeError, KeyError, ValueError):
        pair = [math.nan]
    if not all(1e-6 <= norm <= 1e6 for norm in pair):
        raise ConfigError(f"avg_norm = {norms!r} must hold two positive numbers, 'in' and 'out'")
    root = math.sqrt(values["d_model"])
    return root / pair[0], root / pair[1]
