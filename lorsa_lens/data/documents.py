"""Documents: sequences of token ids in an order that never changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

if TYPE_CHECKING:
    Ids = npt.NDArray[np.integer[Any]]
    """Token ids, one-dimensional, of any integer type: memory-mapped files keep theirs."""
else:
    Ids = np.ndarray  # abstract dtypes are no annotations for older run-time type checkers

READ_AHEAD = 256
"""Documents that are taken at once from a source that can be read in any order."""


class Document(NamedTuple):
    """One document."""

    number: int
    """Which one in the source, from 0, whatever the order of reading."""

    ids: Ids
    """Its token ids; none if it is empty."""


class Documents(ABC):
    """Documents that can be read from the n-th one on, in the same order every time."""

    description: str
    """What they were read from, for error messages and for the manifest of a cache."""

    @abstractmethod
    def read(self, start: int = 0, epoch: int = 0) -> Iterator[Document]:
        """The documents from the `start`-th in the order of reading.

        Args:
            start: how many to pass over.
            epoch: which time through the corpus; only a shuffled order depends on it.
        """


class IndexedDocuments(Documents):
    """Documents that can be read in any order."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[Ids]:
        """The token ids of some documents."""

    def order(self, epoch: int) -> Sequence[int] | npt.NDArray[np.int64]:
        """The order in which `read` gives the documents."""
        del epoch
        return range(len(self))

    @override
    def read(self, start: int = 0, epoch: int = 0) -> Iterator[Document]:
        order = self.order(epoch)
        for first in range(start, len(order), READ_AHEAD):
            indices = [int(index) for index in order[first : first + READ_AHEAD]]
            for index, ids in zip(indices, self.take(indices), strict=True):
                yield Document(index, ids)

    def shuffled(self, seed: int) -> "ShuffledDocuments":
        """The same documents in a random order, another one in every epoch."""
        return ShuffledDocuments(self, seed)


class ShuffledDocuments(IndexedDocuments):
    """Documents in a random order that depends on a seed and the epoch, and on nothing else."""

    def __init__(self, documents: IndexedDocuments, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed = {seed} must not be negative")
        self.documents, self.seed = documents, seed
        self.description = f"{documents.description}, shuffled with seed {seed}"

    @override
    def __len__(self) -> int:
        return len(self.documents)

    @override
    def take(self, indices: Sequence[int]) -> list[Ids]:
        return self.documents.take(indices)

    @override
    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))


def checked_ids(values: Any, where: str) -> Ids:
    """Token ids as a one-dimensional array.

    Args:
        values: a sequence of integers.
        where: what they are, for the error message.

    Raises:
        ValueError: if these are no integers in one dimension.
    """
    try:
        ids: npt.NDArray[Any] = np.asarray(values)
    except ValueError as error:  # lists of different lengths within
        raise ValueError(f"{where} is no flat list of token ids") from error
    if ids.ndim != 1:
        raise ValueError(f"{where} has shape {list(ids.shape)}: a document is a flat list of ids")
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    check_integers(ids, where)
    return ids


def check_integers(ids: npt.NDArray[Any], where: str) -> None:
    """Refuse arrays of anything but integers.

    Raises:
        ValueError: if that is what it is.
    """
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{where} holds {ids.dtype}: token ids are integers")
