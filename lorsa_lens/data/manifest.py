"""The manifest of a cache of activations: what it was made from, and which shards it has."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorsa_lens.io.atomic import atomic_write

FORMAT_VERSION = 1
"""Changes whenever older code could not read the files."""

MANIFEST = "manifest.json"
"""Its name in the folder."""

_PACKAGES = ("lorsa-lens", "torch", "transformer-lens", "transformers")


class CacheError(ValueError):
    """A cache that is damaged, unfinished, or of something else; the message says which."""


@dataclass
class Shard:
    """One file of a cache."""

    file: str
    """Its name in the folder."""
    n_contexts: int
    """Sequences in it."""
    n_bytes: int
    """Its size, from which truncation shows."""


@dataclass(kw_only=True)
class Manifest:
    """What a cache is."""

    model_name: str | None
    """Name of the language model, where it has one."""
    fingerprint: str
    """Of its weights, see `fingerprint`."""
    layers: list[int]
    """Layers that were recorded."""
    sites: dict[str, list[str]]
    """For each layer, names of what was kept of it."""
    d_model: int
    """Width of the residual stream."""
    context_size: int
    """Positions per sequence."""
    dtype: str
    """Of the activations."""
    source: str
    """What the tokens were read from, and how they were packed."""
    n_contexts: int
    """Sequences that it is to have, or has if it is complete."""
    batch_size: int
    """Sequences per pass of the language model."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages that made it."""
    shards: list[Shard] = field(default_factory=list)
    """Files that are written."""
    state: dict[str, Any] | None = None
    """The place in the data after the last shard; None before the first."""
    complete: bool = False
    """Whether all is written."""
    format_version: int = FORMAT_VERSION
    """See `FORMAT_VERSION`."""

    @property
    def n_written(self) -> int:
        """Sequences in the shards."""
        return sum(shard.n_contexts for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        with atomic_write(folder / MANIFEST) as path:
            path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read it.

        Raises:
            CacheError: if there is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(f"{folder} holds no {MANIFEST}: it is no cache of activations")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != FORMAT_VERSION:
                raise CacheError(
                    f"{path} has format version {values['format_version']}, and this version of "
                    f"lorsa-lens reads {FORMAT_VERSION}: make the cache anew"
                )
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def check_shards(self, folder: Path) -> None:
        """Look whether all shards are there, and whole.

        Raises:
            CacheError: if not.
        """
        for shard in self.shards:
            path = folder / shard.file
            n_bytes = path.stat().st_size if path.is_file() else None
            if n_bytes is None:
                raise CacheError(f"{path} is missing: make the cache anew")
            if n_bytes != shard.n_bytes:
                raise CacheError(
                    f"{path} has {n_bytes} bytes, and the manifest says {shard.n_bytes}: it is "
                    "damaged, make the cache anew"
                )

    def check_model(self, model_fingerprint: str, model_name: str | None) -> None:
        """Refuse a model that the cache was not made with.

        Raises:
            CacheError: if so.
        """
        if model_fingerprint != self.fingerprint:
            raise CacheError(
                f"the cache was made with {self.model_name} (weights {self.fingerprint}), and the "
                f"model given is {model_name} (weights {model_fingerprint}): give the same model, "
                "in the same precision and with the same processing of weights"
            )


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a cache."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
