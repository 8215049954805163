"""Read activations back from disk, in the form in which a language model would stream them."""

from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lorsa_lens.data.activations import ActivationBatch
from lorsa_lens.data.contexts import State
from lorsa_lens.data.manifest import CacheError, Manifest
from lorsa_lens.data.prefetch import prefetched
from lorsa_lens.data.shards import OpenShard, joined_rows
from lorsa_lens.data.weights import fingerprint
from lorsa_lens.hosts import host_of


class CachedActivations:
    """Batches of activations from a cache: what `ActivationStream` is for a language model.

    Files are memory-mapped. Iterating goes on after the last batch that was given out.

    Args:
        folder: what `cache_activations` wrote.
        model: the language model; if given, it must be the one that the cache was made with.
        layers: which of the layers in the cache; by default all.
        batch_size: sequences per batch. The last one of an epoch may have fewer; without an end,
            all are whole, and one may hold the end of an epoch and the beginning of the next.
        shuffle_seed: for a random order of sequences, another one each epoch; None for their own.
        n_epochs: times through the cache; None for no end.
        prefetch: how many batches a background thread reads ahead; 0 for no thread.
        rank: with several processes, which one this is: of `n_ranks` batches that follow one
            another, it gets the one of its number.
        n_ranks: how many processes there are; more than one need `n_epochs = None`.

    Raises:
        CacheError: if there is no cache, it is unfinished or damaged, was made with another model,
            or has not all the layers.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module | None = None,
        layers: Sequence[int] | None = None,
        *,
        batch_size: int,
        shuffle_seed: int | None = None,
        n_epochs: int | None = 1,
        prefetch: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        _check_numbers(batch_size, shuffle_seed, n_epochs, prefetch)
        _check_ranks(rank, n_ranks, n_epochs)
        self.folder = Path(folder)
        self.manifest = _checked_manifest(self.folder, model)
        self.layers = list(self.manifest.layers if layers is None else layers)
        for layer in self.layers:
            if layer not in self.manifest.layers:
                raise CacheError(
                    f"layer {layer} is not in the cache, which has the layers "
                    f"{', '.join(map(str, self.manifest.layers))}"
                )
        self.batch_size, self.prefetch = batch_size, prefetch
        self.shuffle_seed, self.n_epochs = shuffle_seed, n_epochs
        self.rank, self.n_ranks = rank, n_ranks
        self._ends = list(accumulate(shard.n_contexts for shard in self.manifest.shards))
        self._open: dict[int, OpenShard] = {}
        self._state = self._place(0, 0)

    def __len__(self) -> int:
        """How many sequences the cache has."""
        return self._ends[-1]

    # ------------------------------------------------------------------------------------ state

    def _place(self, epoch: int, position: int) -> State:
        settings = {"n_contexts": len(self), "shuffle_seed": self.shuffle_seed}
        return {"epoch": epoch, "position": position, "settings": settings}

    def state_dict(self) -> State:
        """The place after the last batch that was given out, as JSON can hold it."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Go to a place.

        Raises:
            ValueError: if the state is of another cache or order.
        """
        for name, mine in self._state["settings"].items():
            theirs = state["settings"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"the state is of a cache read with {name} = {theirs}, and here it is {mine}: "
                    "give the same to go on"
                )
        self._state = state

    # -------------------------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Batches from the place on."""
        return self._iterate()

    def _iterate(self) -> Generator[ActivationBatch, None, None]:
        start = self._state
        batches: Generator[ActivationBatch, None, None] = (
            prefetched(lambda: self._produce(start), self.prefetch)
            if self.prefetch
            else self._produce(start)
        )
        try:
            for batch in batches:
                self._state = batch.state
                yield batch
                del batch
        finally:
            batches.close()

    def _produce(self, start: State) -> Generator[ActivationBatch, None, None]:
        n_given = start["epoch"] * len(self) + start["position"]
        numbers = self._numbers(n_given)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while n := self._n_next(n_given):
            n_given += n
            rows = np.array(list(islice(numbers, n)))[mine]
            yield self._batch(rows, self._place(*divmod(n_given, len(self))))

    def _numbers(self, n_given: int) -> Iterator[int]:
        """Numbers of the sequences after the first `n_given`, epoch after epoch."""
        epoch, position = divmod(n_given, len(self))
        while True:
            yield from self._order(epoch)[position:].tolist()
            epoch, position = epoch + 1, 0

    def _n_next(self, n_given: int) -> int:
        """How many sequences the next batches of all processes have together."""
        whole = self.batch_size * self.n_ranks
        if self.n_epochs is None:
            return whole
        left = self.n_epochs * len(self) - n_given
        return min(whole, len(self) - n_given % len(self)) if left else 0

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self.shuffle_seed is None:
            return np.arange(len(self))
        return np.random.default_rng([self.shuffle_seed, epoch]).permutation(len(self))

    def _batch(self, rows: npt.NDArray[np.int64], state: State) -> ActivationBatch:
        """The sequences with these numbers."""
        shards = [bisect_right(self._ends, int(row)) for row in rows]
        parts, places = [], []
        for shard in sorted(set(shards)):
            mine = [i for i, of in enumerate(shards) if of == shard]
            first = self._ends[shard - 1] if shard else 0
            parts.append(self._shard(shard).rows(torch.from_numpy(rows[mine] - first)))
            places += mine
        tokens, records = joined_rows(parts, torch.tensor(places).argsort())
        return ActivationBatch(*tokens, records=records, state=state)

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            path = self.folder / self.manifest.shards[number].file
            self._open[number] = OpenShard(path, self.layers)
        return self._open[number]


def _check_numbers(
    batch_size: int, shuffle_seed: int | None, n_epochs: int | None, prefetch: int
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be positive")
    if n_epochs is not None and n_epochs < 1:
        raise ValueError(f"n_epochs = {n_epochs} must be positive, or None for no end")
    for name, value in (("shuffle_seed", shuffle_seed), ("prefetch", prefetch)):
        if value is not None and value < 0:
            raise ValueError(f"{name} = {value} must not be negative")


def _check_ranks(rank: int, n_ranks: int, n_epochs: int | None) -> None:
    if not 0 <= rank < n_ranks:
        raise ValueError(f"rank = {rank} must be from 0 to n_ranks - 1 = {n_ranks - 1}")
    if n_ranks > 1 and n_epochs is not None:
        raise ValueError(
            f"n_epochs = {n_epochs} with n_ranks = {n_ranks}: the last batches may not be enough "
            "for all processes, give n_epochs = None"
        )


def _checked_manifest(folder: Path, model: Any) -> Manifest:
    manifest = Manifest.load(folder)
    if not manifest.complete:
        raise CacheError(
            f"the cache in {folder} was interrupted after {manifest.n_written} of "
            f"{manifest.n_contexts} contexts: finish it with cache_activations(..., resume=True)"
        )
    manifest.check_shards(folder)
    if not manifest.shards:
        raise CacheError(f"the cache in {folder} is empty")
    if model is not None:
        manifest.check_model(fingerprint(model), host_of(model).model_name)
    return manifest
