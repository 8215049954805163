"""`save_pretrained` and `from_pretrained`: `config.json` beside `lorsa.safetensors`.

Loading also recognises the published layouts (`lorsa_lens.interop`). It never runs what a file
holds, and every tensor's name, shape and finiteness is checked before a Lorsa is returned.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorsa_lens.config import LorsaConfig
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.io.hub import local_folder
from lorsa_lens.io.sources import LoadError, SafetensorsSource, read_json
from lorsa_lens.io.weights import check_finite, load_weights, pieces
from lorsa_lens.lorsa import Lorsa

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "lorsa.safetensors"


def save_pretrained(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write a Lorsa to a folder: both files are complete before either takes its place.

    Raises:
        ValueError: if a weight is not finite; nothing is written then.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in lorsa.state_dict().items()}
    for name, tensor in tensors.items():
        for piece in pieces(tensor):
            check_finite(name, tensor[piece], "not saved")
    cfg = lorsa.cfg.replace(dtype=str(lorsa.W_O.dtype).removeprefix("torch."))
    with (
        atomic_write(folder / CONFIG_FILE) as new_config,
        atomic_write(folder / WEIGHTS_FILE) as new_weights,
    ):
        new_config.write_text(cfg.to_json(), encoding="utf-8")
        save_file(tensors, new_weights, metadata={"format": "pt"})
    return folder


def load_pretrained(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **hub_options: Any,
) -> Lorsa:
    """Load what `save_pretrained` wrote, or a published Lorsa, so that memory holds it once.

    Args:
        path: a folder, or an id on the Hugging Face hub: `user/repo`, `user/repo/subfolder` or
            `user/repo:subfolder`.
        device: where it goes.
        dtype: precision to convert to. None: as saved.
        **hub_options: as in `lorsa_lens.io.hub.local_folder`.

    Raises:
        FileNotFoundError: if there is no such folder, here or on the hub, or no Lorsa in it.
        LoadError: if the files are damaged or no Lorsa.
        ConfigError: if the configuration cannot be, or its format is newer than this release.
    """
    folder = local_folder(path, **hub_options)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise _nothing_here(path, folder, hub_options)
    kind = layout_of(read_json(config))
    if kind == "llamascopium":
        from lorsa_lens.interop.llamascopium import load_llamascopium

        return load_llamascopium(folder, device=device, dtype=dtype)
    if kind == "paper":
        from lorsa_lens.interop.paper import load_paper

        return load_paper(folder, device=device, dtype=dtype)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}, so no Lorsa is saved there")
    cfg = LorsaConfig.from_json(config)
    if dtype is not None:
        cfg = cfg.replace(dtype=str(dtype).removeprefix("torch."))
    return load_weights(cfg, SafetensorsSource(weights), device=device)


def _nothing_here(path: str | Path, folder: Path, options: dict[str, Any]) -> FileNotFoundError:
    """The error for a folder that is no Lorsa: it may hold some."""
    from lorsa_lens.io.listing import list_lorsas

    message = f"{folder} holds no {CONFIG_FILE}, so no Lorsa is saved there"
    known = ("revision", "cache_dir", "token", "local_files_only")
    try:
        entries = list_lorsas(path, **{n: v for n, v in options.items() if n in known})
    except FileNotFoundError:
        entries = []
    if entries:
        names = ", ".join(entry.name for entry in entries)
        message += f". {path} holds these, of which one is to be given: {names}"
    return FileNotFoundError(message)


def read_config(values: dict[str, Any]) -> tuple[str, LorsaConfig]:
    """The layout that a `config.json` belongs to, and what it says.

    Raises:
        LoadError: if it is the configuration of another kind of sparse dictionary.
        ConfigError: if it cannot be, or asks for what a Lorsa cannot do.
    """
    layout = layout_of(values)
    if layout == "llamascopium":
        from lorsa_lens.interop.llamascopium_config import understand

        return layout, understand(values)[1]
    if layout == "paper":
        from lorsa_lens.interop.paper import paper_config

        return layout, paper_config(values)
    return layout, LorsaConfig.from_dict(values)


def layout_of(config: dict[str, Any]) -> str:
    """Which layout a `config.json` belongs to: `lorsa_lens`, `llamascopium` or `paper`.

    Raises:
        LoadError: if it is the configuration of another kind of sparse dictionary.
    """
    if "sae_type" in config:
        if config["sae_type"] != "lorsa":
            raise LoadError(f"sae_type = {config['sae_type']!r}: this reads 'lorsa' only")
        return "llamascopium"
    if "d_ov_head" in config:
        return "paper"
    return "lorsa_lens"
