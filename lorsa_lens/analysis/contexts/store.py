"""Heads and their contexts in one SQLite file: written once, read a head at a time."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.analysis.contexts.gather import LayerHeads
from lorsa_lens.analysis.contexts.kept import NO_CONTEXT, Kept
from lorsa_lens.analysis.tables import table
from lorsa_lens.io.atomic import atomic_write

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE heads (
    layer INTEGER, head INTEGER, density REAL, n_active INTEGER, mean_energy REAL,
    mean_offset REAL, first_token REAL, max_activation REAL, PRIMARY KEY (layer, head)
) WITHOUT ROWID;
CREATE TABLE kept (
    layer INTEGER, head INTEGER, kind TEXT, rank INTEGER, context INTEGER, query INTEGER,
    activation REAL, z_pattern BLOB, PRIMARY KEY (layer, head, kind, rank)
) WITHOUT ROWID;
CREATE TABLE contexts (context INTEGER PRIMARY KEY, tokens BLOB);
"""

_COLUMNS = "layer, head, density, n_active, mean_energy, mean_offset, first_token, max_activation"


@dataclass(frozen=True)
class KeptContext:
    """One context in which a head stays."""

    context: int
    """Its number in the corpus."""
    tokens: Int[Tensor, " pos"]
    query: int
    """Where the head is most active in it."""
    activation: float
    """Its activation there."""
    z_pattern: Float[Tensor, " pos"]
    """What each token contributes to it, in half precision."""


@dataclass(frozen=True)
class HeadContexts:
    """What a pass over a corpus found for one head."""

    layer: int
    head: int
    density: float
    """Share of tokens at which the head stays."""
    n_active: int
    mean_energy: float
    """Mean of `(z ||w_O||)^2` where it stays."""
    mean_offset: float
    """Distance from source to query, averaged by `|A v|`; not a number for a dead head."""
    first_token: float
    """Share of `|A v|` at the first token."""
    max_activation: float
    """Largest `|z|`."""
    top: list[KeptContext]
    """Contexts with the largest `|z|`, largest first."""
    sample: list[KeptContext]
    """Contexts drawn alike from all in which the head stays, by falling `|z|`."""

    def quantiles(self, n: int = 4) -> list[list[KeptContext]]:
        """The sample in `n` parts of like size, from the strongest to the weakest."""
        bounds = [round(len(self.sample) * part / n) for part in range(n + 1)]
        return [self.sample[low:high] for low, high in pairwise(bounds)]


class ContextStore:
    """A file of heads and their contexts, opened for reading.

    Raises:
        ValueError: if the file is none that `collect_contexts` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no file {path}")
        self._db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        try:
            rows = dict(self._db.execute("SELECT name, value FROM meta"))
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"{path} is no file of contexts: {error}") from None
        self.meta: dict[str, Any] = {name: json.loads(value) for name, value in rows.items()}

    def __enter__(self) -> "ContextStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def head(self, layer: int, head: int) -> HeadContexts:
        """One head.

        Raises:
            KeyError: if there is no such head.
        """
        query = f"SELECT {_COLUMNS} FROM heads WHERE layer = ? AND head = ?"
        row = self._db.execute(query, (layer, head)).fetchone()
        if row is None:
            raise KeyError(f"the file has no head {head} of layer {layer}")
        top, sample = (self._contexts(layer, head, kind) for kind in ("top", "sample"))
        sample.sort(key=lambda kept: abs(kept.activation), reverse=True)
        # SQLite has no NaN, and keeps NULL in its place.
        values = (float("nan") if value is None else value for value in row)
        named: dict[str, Any] = dict(zip(_COLUMNS.split(", "), values, strict=True))
        return HeadContexts(**named, top=top, sample=sample)

    def table(self) -> "DataFrame":
        """Statistics of all heads, a row each."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM heads").fetchall()
        names = _COLUMNS.split(", ")
        return table({name: [row[i] for row in rows] for i, name in enumerate(names)})

    def _contexts(self, layer: int, head: int, kind: Literal["top", "sample"]) -> list[KeptContext]:
        query = (
            "SELECT context, tokens, query, activation, z_pattern FROM kept JOIN contexts "
            "USING (context) WHERE layer = ? AND head = ? AND kind = ? ORDER BY rank"
        )
        return [
            KeptContext(
                context=context,
                tokens=torch.from_numpy(np.frombuffer(tokens, "<i4").astype(np.int64)),
                query=query_at,
                activation=activation,
                z_pattern=torch.from_numpy(np.frombuffer(z, "<f2").astype(np.float32)),
            )
            for context, tokens, query_at, activation, z in self._db.execute(
                query, (layer, head, kind)
            )
        ]


def write_store(
    path: Path,
    layers: Mapping[int, LayerHeads],
    tokens: Mapping[int, Int[Tensor, " pos"]],
    n_tokens: int,
    meta: Mapping[str, Any],
) -> None:
    """Write the file, atomically.

    Args:
        path: where.
        layers: what was gathered, by layer.
        tokens: the kept contexts, by number.
        n_tokens: queries that counted.
        meta: what the pass was, for JSON.
    """
    values = {**meta, "format_version": FORMAT_VERSION, "n_tokens": n_tokens}
    blobs = ((n, row.numpy().astype("<i4").tobytes()) for n, row in sorted(tokens.items()))
    into_heads, into_kept = (
        f"INSERT INTO {name} VALUES ({', '.join('?' * 8)})" for name in ("heads", "kept")
    )
    with atomic_write(path) as temporary, closing(sqlite3.connect(temporary)) as db:
        db.executescript(_SCHEMA)
        rows = [(name, json.dumps(value)) for name, value in sorted(values.items())]
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        for layer, heads in sorted(layers.items()):
            db.executemany(into_heads, _head_rows(layer, heads, n_tokens))
            for kind, kept in (("sample", heads.sample), ("top", heads.top)):
                db.executemany(into_kept, _kept_rows(layer, kind, kept))
        db.executemany("INSERT INTO contexts VALUES (?, ?)", blobs)
        db.commit()


def _head_rows(layer: int, heads: LayerHeads, n_tokens: int) -> Iterator[tuple[Any, ...]]:
    columns = {
        "density": heads.n_active / max(1, n_tokens),
        "n_active": heads.n_active.long(),
        "mean_energy": heads.energy / heads.n_active.clamp(min=1),
        "mean_offset": heads.offset / heads.size,
        "first_token": heads.first / heads.size,
        "max_activation": heads.top.activation[:, 0].abs(),
    }
    lists = [column.tolist() for column in columns.values()]
    for head, row in enumerate(zip(*lists, strict=True)):
        yield layer, head, *row


def _kept_rows(layer: int, kind: str, kept: Kept) -> Iterator[tuple[Any, ...]]:
    contexts, queries = kept.context.tolist(), kept.query.tolist()
    activations, z_patterns = kept.activation.tolist(), kept.z_pattern.numpy().astype("<f2")
    for head, row in enumerate(contexts):
        for rank, context in enumerate(row):
            if context == NO_CONTEXT:
                break
            z_pattern = z_patterns[head, rank].tobytes()
            query, activation = queries[head][rank], activations[head][rank]
            yield layer, head, kind, rank, context, query, activation, z_pattern
