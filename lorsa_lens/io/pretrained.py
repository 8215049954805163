"""`save_pretrained` and `from_pretrained`: `config.json` beside `lorsa.safetensors`.

Loading reads safetensors and JSON only, nothing is unpickled, and every tensor's name, shape and
finiteness is checked before a Lorsa is returned.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorsa_lens.config import LorsaConfig
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.lorsa import Lorsa

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "lorsa.safetensors"


class LoadError(ValueError):
    """Files that are no Lorsa, or a damaged one; the message says which and what is wrong."""


def save_pretrained(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write a Lorsa to a folder: each file atomically, the weights first.

    Raises:
        ValueError: if a weight is not finite; nothing is written then.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in lorsa.state_dict().items()}
    for name, tensor in tensors.items():
        _check_finite(name, tensor, "not saved")
    cfg = lorsa.cfg.replace(dtype=str(lorsa.W_O.dtype).removeprefix("torch."))
    with atomic_write(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG_FILE) as temporary:
        temporary.write_text(cfg.to_json(), encoding="utf-8")
    return folder


def load_pretrained(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Lorsa:
    """Load what `save_pretrained` wrote; one tensor at a time, so memory holds them once.

    Args:
        path: a folder, or an id on the Hugging Face hub (`user/repo` or `user/repo/subfolder`).
        device: where it goes.
        dtype: precision to convert to. None: as saved.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: if there is no such folder, or no Lorsa in it.
        LoadError: if the files are damaged or no Lorsa.
        ConfigError: if the configuration cannot be, or its format is newer than this release.
    """
    folder = _local_folder(path, revision)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, so no Lorsa is saved there")
    cfg = LorsaConfig.from_json(folder / CONFIG_FILE)
    if dtype is not None:
        cfg = cfg.replace(dtype=str(dtype).removeprefix("torch."))
    lorsa = Lorsa(cfg, device="meta").to_empty(device=device)
    weights = folder / WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt", device=str(device)) as tensors, torch.no_grad():
            _fill(lorsa, tensors, weights)
    except SafetensorError as error:
        raise LoadError(f"{weights} is damaged or no safetensors file: {error}") from None
    return lorsa


def _fill(lorsa: Lorsa, tensors: Any, path: Path) -> None:
    """Copy every tensor of an open file into its place, checked."""
    targets: dict[str, Tensor] = dict(lorsa.state_dict())
    names = set(tensors.keys())
    if names != set(targets):
        missing, foreign = sorted(set(targets) - names), sorted(names - set(targets))
        raise LoadError(
            f"{path} does not fit its {CONFIG_FILE}: missing {missing or 'nothing'}, "
            f"unknown {foreign or 'nothing'}"
        )
    for name, target in targets.items():
        shape = tuple(tensors.get_slice(name).get_shape())
        if shape != tuple(target.shape):
            raise LoadError(
                f"{path}: {name} has shape {shape}, but {CONFIG_FILE} says {tuple(target.shape)}"
            )
    for name, target in targets.items():
        tensor = tensors.get_tensor(name)
        if not tensor.is_floating_point():
            raise LoadError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
        _check_finite(name, tensor, f"read from {path}", LoadError)
        target.copy_(tensor)


def _check_finite(
    name: str, tensor: Tensor, what: str, error: type[ValueError] = ValueError
) -> None:
    if not bool(torch.isfinite(tensor).all()):
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise error(f"{name} has {n_bad} entries that are NaN or infinite: {what}")


def _local_folder(path: str | Path, revision: str | None) -> Path:
    """The folder itself, or one downloaded from the hub."""
    if Path(path).exists():
        return Path(path)
    parts = str(path).split("/")
    if len(parts) < 2 or not all(parts) or str(path).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{path} is no folder here, and no hub id either (user/repo or user/repo/subfolder)"
        )
    from huggingface_hub import snapshot_download

    repo, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    pattern = f"{subfolder}/" if subfolder else ""
    wanted = [pattern + CONFIG_FILE, pattern + WEIGHTS_FILE]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)) / subfolder
