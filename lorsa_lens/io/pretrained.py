"""`save_pretrained` and `from_pretrained`: `config.json` beside `lorsa.safetensors`.

Loading reads safetensors and JSON only, nothing is unpickled, and every tensor's name, shape and
finiteness is checked before a Lorsa is returned.
"""

from collections.abc import Iterator
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

PIECE_ELEMENTS = 2**20
"""Numbers of a tensor that are read or checked at a time: 4 MB in float32."""


class LoadError(ValueError):
    """Files that are no Lorsa, or a damaged one; the message says which and what is wrong."""


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
        for piece in _pieces(tensor):
            _check_finite(name, tensor[piece], "not saved")
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
    revision: str | None = None,
) -> Lorsa:
    """Load what `save_pretrained` wrote, piece by piece, so that memory holds it once.

    Args:
        path: a folder, or an id on the Hugging Face hub (`user/repo` or `user/repo/subfolder`).
        device: where it goes.
        dtype: precision to convert to. None: as saved.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: if there is no such folder, here or on the hub, or no Lorsa in it.
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
    lorsa, weights = Lorsa(cfg, device="meta"), folder / WEIGHTS_FILE
    try:
        _check_contents(weights, lorsa.state_dict())
        lorsa.to_empty(device=device)
        for name, target in lorsa.state_dict().items():
            _fill(target, name, weights)
    except SafetensorError as error:
        raise LoadError(f"{weights} is damaged or no safetensors file: {error}") from None
    return lorsa


def _check_contents(path: Path, targets: dict[str, Tensor]) -> None:
    """Names, shapes and kinds of a file's tensors, before any of them is read."""
    with safe_open(path, framework="pt") as tensors:
        headers = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    if set(headers) != set(targets):
        missing, foreign = sorted(set(targets) - set(headers)), sorted(set(headers) - set(targets))
        raise LoadError(
            f"{path} does not fit its {CONFIG_FILE}: missing {missing or 'nothing'}, "
            f"unknown {foreign or 'nothing'}"
        )
    for name, header in headers.items():
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != tuple(targets[name].shape):
            raise LoadError(
                f"{path}: {name} has shape {shape}, but {CONFIG_FILE} says "
                f"{tuple(targets[name].shape)}"
            )
        if not dtype.startswith(("F", "BF")):
            raise LoadError(f"{path}: {name} holds {dtype}, not floating-point numbers")


def _fill(target: Tensor, name: str, path: Path) -> None:
    """Copy a tensor of a file into its place.

    The file is opened anew for each piece: what was read of a mapped file counts as memory until
    it is closed.
    """
    for piece in _pieces(target):
        with safe_open(path, framework="pt") as tensors:
            target[piece] = tensors.get_slice(name)[piece]
        _check_finite(name, target[piece], f"read from {path} as {target.dtype}", LoadError)


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """Indices that cut a tensor into pieces, along its first dimension."""
    if tensor.ndim == 0:
        yield ...
        return
    n_rows = max(1, PIECE_ELEMENTS // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), n_rows):
        yield slice(start, start + n_rows)


def _check_finite(
    name: str, tensor: Tensor, what: str, error: type[ValueError] = ValueError
) -> None:
    if not bool(torch.isfinite(tensor).all()):
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise error(f"{name} has {n_bad} entries that are NaN or infinite: {what}")


def _local_folder(path: str | Path, revision: str | None) -> Path:
    """The folder itself, or one downloaded from the hub."""
    if Path(path).is_file():
        raise FileNotFoundError(f"{path} is a file: give the folder that holds it")
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
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)) / subfolder
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is no folder here, and could not be loaded from the Hugging Face hub: {error}"
        ) from error
