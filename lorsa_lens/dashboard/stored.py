"""What is known about all heads of a run, from the tables that `lorsa-lens heads` saved."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorsa_lens.analysis.contexts import ContextStore
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.dashboard.facts import behaviours_of, weighted_tokens
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.views.facts import Excerpt, HeadFacts

TABLES = ("named.json", "correspondence.json", "contexts.sqlite")

Rows = dict[tuple[int, int], list[dict[str, Any]]]


def stored_heads(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    folder: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    n_excerpts: int = 6,
    n_tokens: int = 8,
) -> Iterator[HeadFacts]:
    """Read all heads of some layers, one after another.

    Args:
        model: for the strings of its tokens and what heads read and write.
        lorsas: by layer.
        folder: where `lorsa-lens heads RUN_DIR --contexts N` saved its tables.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_excerpts: contexts per head.
        n_tokens: tokens read and written, per head and direction.

    Raises:
        ValueError: if a table is missing.
    """
    path = Path(folder)
    missing = [name for name in TABLES if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: run lorsa-lens heads RUN_DIR --contexts 1000000 "
            "first"
        )
    return _heads(model, lorsas, path, vocabulary, n_excerpts, n_tokens)


def _heads(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    path: Path,
    vocabulary: Vocabulary | None,
    n_excerpts: int,
    n_tokens: int,
) -> Iterator[HeadFacts]:
    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    named = _by_head(path / "named.json", kind="ov")
    origins = _by_head(path / "correspondence.json")
    with ContextStore(path / "contexts.sqlite") as store:
        for layer, lorsa in sorted(lorsas.items()):
            every = range(lorsa.cfg.n_ov_heads)
            for head, weights in weighted_tokens(model, lorsa, every, strings, n_tokens):
                seen = store.head(layer, head)
                (origin,) = origins.get((layer, head), [{}])
                yield HeadFacts(
                    layer=layer,
                    head=head,
                    behaviours=behaviours_of(named.get((layer, head), []), layer, head),
                    density=seen.density,
                    max_activation=seen.max_activation,
                    mean_offset=seen.mean_offset,
                    excerpts=[
                        Excerpt(
                            strings.read(kept.tokens),
                            kept.query,
                            kept.activation,
                            kept.z_pattern.tolist(),
                        )
                        for kept in seen.top[:n_excerpts]
                    ],
                    origins=_shares(origin),
                    effective_heads=_number(origin.get("effective_heads")),
                    **weights,
                )


def _by_head(path: Path, **only: str) -> Rows:
    """The rows of a table by layer and head, those with given values in some columns."""
    rows: Rows = defaultdict(list)
    for row in json.loads(path.read_text(encoding="utf-8")):
        if all(row[name] == value for name, value in only.items()):
            rows[row["layer"], row["head"]].append(row)
    return rows


def _shares(row: Mapping[str, Any]) -> dict[int, float]:
    columns = {name: value for name, value in row.items() if name.startswith("share_")}
    return {int(name[6:]): value for name, value in columns.items() if value is not None}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
