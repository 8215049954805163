"""Tensors in files of any layout, opened without running anything that they hold.

A source lists the names, shapes and kinds of its tensors without reading them, and reads pieces.
"""

import io
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point kinds by their names in safetensors files."""


class LoadError(ValueError):
    """Files that are no Lorsa, or a damaged one; the message says which and what is wrong."""


class Header(NamedTuple):
    """What is known of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: str
    """As in safetensors: `F32`, `BF16`, `I64`, `BOOL`, ..."""


class TensorSource(ABC):
    """Named tensors in one or more files."""

    path: Path
    """For messages: the file, or the folder of files."""

    headers: Mapping[str, Header]
    """Every tensor there is."""

    @abstractmethod
    def read(self, name: str, piece: Any) -> Tensor:
        """One piece of a tensor: a slice of its rows, or `...` for all of it."""


class SafetensorsSource(TensorSource):
    """One safetensors file, or the shards that an index file lists.

    Args:
        path: a `.safetensors` file, or its `.safetensors.index.json`.

    Raises:
        LoadError: if a file is damaged or no safetensors file, or if the index names files outside
            its folder or tensors that are not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        self._files: dict[str, Path] = {}
        if path.suffix == ".json":
            self._read_index()
        else:
            self._read_headers(path)

    def _read_headers(self, file: Path) -> None:
        with _safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                header = tensors.get_slice(name)
                self.headers[name] = Header(tuple(header.get_shape()), header.get_dtype())
                self._files[name] = file

    def _read_index(self) -> None:
        index = read_json(self.path)
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise LoadError(f"{self.path} has no weight_map from tensors to files")
        for name in sorted(set(listed.values())):
            self._read_headers(file_beside(self.path, name))
        if missing := sorted(set(listed) - set(self.headers)):
            raise LoadError(f"{self.path} lists tensors that its files do not hold: {missing}")

    @override
    def read(self, name: str, piece: Any) -> Tensor:
        # Opened anew for each piece: what was read of a mapped file counts as memory until it is
        # closed.
        with _safetensors(self._files[name]) as tensors:
            tensor: Tensor = tensors.get_slice(name)[piece]
        return tensor


class LoadedSource(TensorSource):
    """Tensors that are in memory already."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.headers = {
            name: Header(tuple(t.shape), names.get(t.dtype, str(t.dtype).removeprefix("torch.")))
            for name, t in tensors.items()
        }

    @override
    def read(self, name: str, piece: Any) -> Tensor:
        return self.tensors[name][piece]


def load_weights_only(path: Path, content: bytes | None = None) -> Any:
    """What `torch.save` wrote, read by PyTorch's restricted unpickler, which runs no code.

    Args:
        path: the file.
        content: the part of it to read. None: all of it.

    Raises:
        LoadError: if it is damaged, or holds anything but tensors and plain values.
    """
    try:
        file = path if content is None else io.BytesIO(content)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is damaged"
        raise LoadError(
            f"{path} cannot be read as plain tensors, and nothing else is unpickled: {reason}"
        ) from None


def only_tensors(path: Path, values: Any) -> LoadedSource:
    """A source of the tensors of a dict, which must hold nothing else.

    Raises:
        LoadError: if it is no dict, or holds something else.
    """
    if not isinstance(values, dict):
        raise LoadError(f"{path} holds {type(values).__name__}, not tensors by name")
    foreign = [str(n) for n, t in values.items() if not isinstance(t, Tensor) or t.is_sparse]
    if foreign:
        raise LoadError(f"{path} holds entries that are no plain tensors: {sorted(foreign)}")
    return LoadedSource(path, {str(name): tensor for name, tensor in values.items()})


def file_beside(path: Path, name: str) -> Path:
    """A file in the same folder, for a name that `path` gives.

    Raises:
        LoadError: if the name leads out of the folder, or there is no such file.
    """
    if not name or name != Path(name).name or "\\" in name or "\0" in name or name in (".", ".."):
        raise LoadError(f"{path} names the file {name!r}: only files beside it are read")
    file = path.parent / name
    if not file.is_file():
        raise LoadError(f"{path} names the file {name!r}, which is not there")
    return file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LoadError: if it is no JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise LoadError(f"{path} holds {type(values).__name__}, not a JSON object")
    return values


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose errors name it."""
    opened: Any = safe_open
    try:
        with opened(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is damaged or no safetensors file: {error}") from None
