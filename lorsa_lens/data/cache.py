"""Write activations to disk, to train on them again and again."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from lorsa_lens.data.activations import ActivationBatch, ActivationStream
from lorsa_lens.data.contexts import TokenBatch
from lorsa_lens.data.manifest import CacheError, Manifest, Shard, package_versions
from lorsa_lens.data.shards import STREAMS, write_shard
from lorsa_lens.data.weights import fingerprint

SHARD_BYTES = 1 << 28
"""Size of a shard, where nothing else is said; twice as much is held in memory."""

_HEADER_BYTES = 1 << 12


class CacheSize(NamedTuple):
    """How much a cache holds, and takes."""

    n_contexts: int
    """Sequences."""

    n_tokens: int
    """Positions of all of them."""

    n_bytes: int
    """Disk that it takes."""


def cache_size(
    stream: ActivationStream,
    n_tokens: int,
    dtype: torch.dtype | None = None,
    contexts_per_shard: int | None = None,
) -> CacheSize:
    """What `cache_activations` would write. Masks that differ between sequences come on top.

    Args:
        stream: the activations.
        n_tokens: positions to cache; rounded up to whole contexts.
        dtype: of the activations; by default the model's own.
        contexts_per_shard: as for `cache_activations`.

    Raises:
        ValueError: if a number is not positive.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens = {n_tokens} must be positive")
    pos = stream.contexts.context_size
    n_contexts = -(-n_tokens // pos)
    own = dtype or next(stream.model.parameters()).dtype
    n_streams = sum(len(_streams(stream, layer)) for layer in stream.layers)
    # tokens and documents in int64, `counted` in bool
    per_context = pos * (n_streams * stream.host.d_model * own.itemsize + 17)
    # positions, a mask for all sequences and the norm; of every shard
    shared = len(stream.layers) * (pos * (pos + 8) + 8 * stream.host.d_model) + _HEADER_BYTES
    n_shards = -(-n_contexts // _contexts_per_shard(stream, own, contexts_per_shard))
    return CacheSize(n_contexts, n_contexts * pos, n_contexts * per_context + n_shards * shared)


def cache_activations(
    stream: ActivationStream,
    folder: str | Path,
    *,
    n_tokens: int,
    dtype: torch.dtype | None = None,
    contexts_per_shard: int | None = None,
    resume: bool = False,
    progress: bool = False,
) -> CacheSize:
    """Run the language model and write what layers receive and return, shard by shard.

    Shards are written whole or not at all, and the manifest last. What an interruption leaves is
    refused by `CachedActivations`, and finished by the same call with `resume=True`.

    Args:
        stream: the activations, from its place on.
        folder: a new or empty folder.
        n_tokens: positions to cache; rounded up to whole contexts. If the text has fewer, there is
            a warning, and the cache is complete with what there is.
        dtype: of the activations; by default the model's own.
        contexts_per_shard: sequences per file, rounded up to whole batches; by default 256 MB of
            them.
        resume: go on with an interrupted cache.
        progress: show a progress bar.

    Returns:
        What the cache holds and takes.

    Raises:
        ValueError: before anything is written: if a number is out of range, the folder is not
            empty, or the disk has too little room (the message says how much it takes).
        CacheError: if there is nothing to resume, or it was made in another way.
    """
    folder = Path(folder)
    size = cache_size(stream, n_tokens, dtype, contexts_per_shard)
    own = dtype or next(stream.model.parameters()).dtype
    per_shard = _contexts_per_shard(stream, own, contexts_per_shard)
    manifest = _manifest(stream, own, size)
    if resume:
        manifest = _resumed(folder, manifest, stream)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"folder {folder} is not empty: give a new one, or resume=True to go on with a cache "
            "that was interrupted"
        )
    if manifest.complete:
        return _written(manifest)
    _check_room(folder, size.n_bytes - sum(shard.n_bytes for shard in manifest.shards))
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.save(folder)
    n_left = manifest.n_contexts - manifest.n_written
    for batches in _shards(stream, n_left, per_shard, progress):
        name = f"shard-{len(manifest.shards):05d}.safetensors"
        n_bytes = write_shard(folder / name, batches, own)
        n_contexts = sum(len(batch.tokens) for batch in batches)
        manifest.shards.append(Shard(name, n_contexts, n_bytes))
        manifest.state = batches[-1].state
        manifest.save(folder)
    if manifest.n_written < manifest.n_contexts:
        warnings.warn(
            f"the text has only {manifest.n_written * manifest.context_size} of the "
            f"{size.n_tokens} tokens asked for: the cache in {folder} ends there",
            UserWarning,
            stacklevel=2,
        )
        manifest.n_contexts = manifest.n_written
    manifest.complete = True
    manifest.save(folder)
    return _written(manifest)


def _shards(
    stream: ActivationStream, n_contexts: int, per_shard: int, progress: bool
) -> Iterator[list[ActivationBatch]]:
    """Batches, as many as go into one shard, until there are `n_contexts` sequences."""
    batches: list[ActivationBatch] = []
    n_batches = -(-n_contexts // stream.batch_size)
    for batch in tqdm(stream, "caching", n_batches, unit="batch", disable=not progress):
        batch = _first(batch, n_contexts)
        n_contexts -= len(batch.tokens)
        batches.append(batch)
        if not n_contexts or sum(len(batch.tokens) for batch in batches) >= per_shard:
            yield batches
            batches = []
        if not n_contexts:
            return
    if batches:
        yield batches


def _first(batch: ActivationBatch, n: int) -> ActivationBatch:
    """The first sequences of a batch."""
    if len(batch.tokens) <= n:
        return batch
    first = slice(0, n)
    return batch._replace(
        **{name: getattr(batch, name)[first] for name in TokenBatch._fields},
        records={layer: record.batch(first) for layer, record in batch.records.items()},
    )


def _streams(stream: ActivationStream, layer: int) -> list[str]:
    """Which activations a layer has."""
    there = {
        "qk_input": stream.host.shortformer,
        "attn_out": stream.host.post_norm(layer) is not None,
    }
    return [name for name in STREAMS if there.get(name, True)]


def _contexts_per_shard(
    stream: ActivationStream, dtype: torch.dtype, contexts_per_shard: int | None
) -> int:
    """Sequences per shard, in whole batches."""
    if contexts_per_shard is None:
        n_streams = sum(len(_streams(stream, layer)) for layer in stream.layers)
        n_values = stream.contexts.context_size * stream.host.d_model * n_streams
        contexts_per_shard = max(1, SHARD_BYTES // (n_values * dtype.itemsize))
    if contexts_per_shard < 1:
        raise ValueError(f"contexts_per_shard = {contexts_per_shard} must be positive")
    return -(-contexts_per_shard // stream.batch_size) * stream.batch_size


def _manifest(stream: ActivationStream, dtype: torch.dtype, size: CacheSize) -> Manifest:
    return Manifest(
        model_name=stream.host.model_name,
        fingerprint=fingerprint(stream.model),
        layers=stream.layers,
        sites={str(layer): _streams(stream, layer) for layer in stream.layers},
        d_model=stream.host.d_model,
        context_size=stream.contexts.context_size,
        dtype=str(dtype).removeprefix("torch."),
        source=stream.contexts.description,
        n_contexts=size.n_contexts,
        batch_size=stream.batch_size,
        versions=package_versions(),
    )


def _resumed(folder: Path, wanted: Manifest, stream: ActivationStream) -> Manifest:
    """The manifest of an interrupted cache; the stream goes to its place."""
    manifest = Manifest.load(folder)
    manifest.check_model(wanted.fingerprint, wanted.model_name)
    for name in ("layers", "context_size", "dtype", "batch_size", "source"):
        theirs, mine = getattr(manifest, name), getattr(wanted, name)
        if theirs != mine:
            raise CacheError(
                f"the cache in {folder} was begun with {name} = {theirs}, and this is {mine}: "
                "give the same to go on"
            )
    if manifest.n_contexts != wanted.n_contexts and not manifest.complete:
        raise CacheError(
            f"the cache in {folder} was begun for {manifest.n_contexts} contexts, and this is for "
            f"{wanted.n_contexts}: give the same n_tokens to go on"
        )
    manifest.check_shards(folder)
    if manifest.state is not None:
        stream.load_state_dict(manifest.state)
    for leftover in folder.glob(".*"):  # temporary files of what was interrupted
        leftover.unlink()
    return manifest


def _check_room(folder: Path, n_bytes: int) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise ValueError(
            f"the cache takes {in_words(n_bytes)}, and {there} has {in_words(free)} left: "
            "choose fewer tokens or layers, a smaller dtype, or another disk"
        )


def in_words(n_bytes: int) -> str:
    """A number of bytes in the unit that suits it."""
    amount = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def _written(manifest: Manifest) -> CacheSize:
    n_bytes = sum(shard.n_bytes for shard in manifest.shards)
    n_contexts = manifest.n_written
    return CacheSize(n_contexts, n_contexts * manifest.context_size, n_bytes)
