"""Documents in arrays: .npy and .bin files, tensors, lists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import override

from lorsa_lens.data.documents import Ids, IndexedDocuments, check_integers, checked_ids

_SCANNED = 1 << 24
"""Tokens looked at together in search of separators."""


class ArrayDocuments(IndexedDocuments):
    """The rows of an array, or the stretches between separators of a flat one.

    Args:
        array: token ids [document, pos] or [pos]; a memory map stays one.
        description: where it is from.
        separator_token_id: for a flat array, the id between documents, which belongs to none of
            them. Without it, all of the array is one document. Found by one pass over the array.

    Raises:
        ValueError: if the array holds no integers or has another number of dimensions, or a
            separator is given for rows.
    """

    def __init__(
        self, array: npt.NDArray[Any], description: str, separator_token_id: int | None = None
    ) -> None:
        if array.ndim not in (1, 2):
            raise ValueError(
                f"{description} has shape {list(array.shape)}: give ids [document, pos], or all "
                "in a row [pos]"
            )
        check_integers(array, description)
        if array.ndim == 2 and separator_token_id is not None:
            raise ValueError(
                f"separator_token_id = {separator_token_id} means nothing for {description}: "
                "every row is a document"
            )
        self.array: Ids = array
        self.description = f"{description}, {list(array.shape)} {array.dtype}"
        self._ends: npt.NDArray[np.int64] | None = None
        if separator_token_id is not None:
            self.description += f", split at {separator_token_id}"
            self._ends = np.append(_places(array, separator_token_id), len(array))

    @override
    def __len__(self) -> int:
        if self._ends is not None:
            return len(self._ends)
        return 1 if self.array.ndim == 1 else len(self.array)

    @override
    def take(self, indices: Sequence[int]) -> list[Ids]:
        return [self._document(index) for index in indices]

    def _document(self, index: int) -> Ids:
        if self.array.ndim == 2:
            row: Ids = self.array[index]
            return row
        if self._ends is None:
            return self.array
        first = int(self._ends[index - 1]) + 1 if index else 0
        return self.array[first : int(self._ends[index])]


class ListDocuments(IndexedDocuments):
    """Documents in memory, each of its own length."""

    def __init__(self, documents: Sequence[Any], description: str) -> None:
        self.documents = [checked_ids(ids, f"document {i}") for i, ids in enumerate(documents)]
        self.description = description

    @override
    def __len__(self) -> int:
        return len(self.documents)

    @override
    def take(self, indices: Sequence[int]) -> list[Ids]:
        return [self.documents[index] for index in indices]


def in_memory(
    tokens: Tensor | npt.NDArray[Any] | Sequence[Any], separator_token_id: int | None = None
) -> IndexedDocuments:
    """Documents from a tensor, an array, a list of ids or a list of lists (or tensors) of ids."""
    if isinstance(tokens, Tensor):
        return ArrayDocuments(tokens.detach().cpu().numpy(), "a tensor", separator_token_id)
    if isinstance(tokens, np.ndarray):
        return ArrayDocuments(tokens, "an array", separator_token_id)
    if tokens and isinstance(tokens[0], int):
        return ArrayDocuments(checked_ids(tokens, "the list"), "a list", separator_token_id)
    if separator_token_id is not None:
        raise ValueError(
            f"separator_token_id = {separator_token_id} means nothing for a list of documents"
        )
    parts = [part.detach().cpu().numpy() if isinstance(part, Tensor) else part for part in tokens]
    return ListDocuments(parts, f"a list of {len(parts)} documents")


def array_file(
    path: Path, *, dtype: str | None = None, separator_token_id: int | None = None
) -> ArrayDocuments:
    """Documents from a .npy file, or a .bin file of bare ids all in a row; memory-mapped.

    Args:
        path: the file.
        dtype: of the ids in a .bin file, such as `uint16`, which is the default. A .npy file says
            it itself.
        separator_token_id: the id between documents of a flat array.

    Raises:
        ValueError: if the file is damaged or no array of integers. Nothing is unpickled.
    """
    if path.suffix == ".npy":
        if dtype is not None:
            raise ValueError(f"dtype = {dtype!r} means nothing for {path}, which says it itself")
        return ArrayDocuments(_load_npy(path), str(path), separator_token_id)
    try:
        kind = np.dtype(dtype or "uint16")
    except TypeError as error:
        raise ValueError(f"dtype = {dtype!r} is none that numpy knows: try 'uint16'") from error
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % kind.itemsize:
        raise ValueError(f"{path} has {n_bytes} bytes: no whole number of {kind} ids")
    return ArrayDocuments(np.memmap(path, dtype=kind, mode="r"), str(path), separator_token_id)


def _load_npy(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array of token ids: {error}") from error
    return array


def _places(array: Ids, token_id: int) -> npt.NDArray[np.int64]:
    """Where a token stands."""
    found = [
        np.flatnonzero(np.asarray(array[first : first + _SCANNED]) == token_id) + first
        for first in range(0, len(array), _SCANNED)
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
