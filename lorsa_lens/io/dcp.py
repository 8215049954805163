"""PyTorch's distributed checkpoints (DCP), read without unpickling what they are free to name.

Such a folder has a pickle, `.metadata`, that says where the tensors lie in its `.distcp` files.
Here that pickle may name only what PyTorch itself writes there, and each name stands for an inert
record of our own, so that nothing it holds is ever run. The tensors are read as weights only.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lorsa_lens.io.sources import (
    DTYPES,
    Header,
    LoadError,
    TensorSource,
    file_beside,
    load_weights_only,
)

METADATA_FILE = ".metadata"

_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")  # the second in Python 3.13
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    ),
}


class _Chunk(NamedTuple):
    """Where a part of a tensor lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class DCPSource(TensorSource):
    """A folder that `torch.distributed.checkpoint` wrote.

    Args:
        path: the folder, as `sae_weights.dcp`.

    Raises:
        LoadError: if its metadata is damaged, or names anything but tensors in files beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[_Chunk, Tensor] | None = None
        metadata = _read_metadata(path / METADATA_FILE)
        try:
            self._understand(metadata)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"{path}: its metadata is damaged: {error}") from None

    def _understand(self, metadata: Any) -> None:
        places = {
            (index.fqn, tuple(getattr(index, "offset", ()))): info
            for index, info in metadata.storage_data.items()
        }
        self.headers: dict[str, Header] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        names = {str(dtype): name for name, dtype in DTYPES.items()}
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                raise LoadError(f"{self.path}: {name} is no tensor, and is not unpickled")
            dtype = entry.properties.state[0]
            self.headers[name] = Header(_sizes(entry.size), names.get(dtype, dtype))
            self._chunks[name] = [
                self._chunk(_sizes(chunk.offsets), _sizes(chunk.sizes), places, name)
                for chunk in entry.chunks
            ]

    def _chunk(
        self, offsets: tuple[int, ...], sizes: tuple[int, ...], places: Any, name: str
    ) -> _Chunk:
        info = places[name, offsets]
        if getattr(info, "transform_descriptors", None):
            raise LoadError(f"{self.path}: {name} is compressed or encrypted, which is not read")
        file = file_beside(self.path / METADATA_FILE, info.relative_path)
        start, length = int(info.offset), int(info.length)
        if start < 0 or length < 0 or start + length > file.stat().st_size:
            raise LoadError(f"{file} is too short to hold {name}")
        return _Chunk(offsets, sizes, file, start, length)

    @override
    def read(self, name: str, piece: Any) -> Tensor:
        shape, dtype = self.headers[name]
        rows = range(shape[0])[piece] if shape else range(1)
        out = torch.full((len(rows), *shape[1:]), torch.nan, dtype=DTYPES[dtype])
        for chunk in self._chunks[name]:
            if not shape:
                return self._load(chunk)
            first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            start, stop = max(first, rows.start), min(last, rows.stop)
            if start < stop:
                others = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                columns = tuple(slice(offset, offset + size) for offset, size in others)
                target = out[(slice(start - rows.start, stop - rows.start), *columns)]
                target.copy_(self._load(chunk)[start - first : stop - first])
        return out  # what no chunk covers is NaN, and refused as such

    def _load(self, chunk: _Chunk) -> Tensor:
        """A chunk; the last one is kept, since pieces of it are read one after the other."""
        if self._last is None or self._last[0] != chunk:
            with open(chunk.file, "rb") as file:
                file.seek(chunk.start)
                tensor = load_weights_only(chunk.file, file.read(chunk.length))
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes:
                raise LoadError(f"{chunk.file} does not hold the tensors that its metadata says")
            self._last = (chunk, tensor)
        return self._last[1]


class _Record:
    """Stands for an object of a checkpoint's metadata: its fields, and nothing that acts."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names that PyTorch writes into metadata, as records; refuses all others."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return f"torch.{name}"
        raise LoadError(f"it names {module}.{name}, which no checkpoint of tensors needs")


def _read_metadata(path: Path) -> Any:
    if not path.is_file():
        raise LoadError(f"{path.parent} holds no {METADATA_FILE}: it is no distributed checkpoint")
    try:
        with open(path, "rb") as file:
            return _MetadataUnpickler(file).load()
    except LoadError as error:
        raise LoadError(f"{path} is refused, and nothing of it was run: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise LoadError(f"{path} is damaged or no metadata of a checkpoint: {error}") from None


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in value)
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return sizes
