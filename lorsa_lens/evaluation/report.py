"""An evaluation as tables for a terminal, as JSON, and as a page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens.evaluation.documents import CONFIDENCE, Estimate
from lorsa_lens.evaluation.fidelity import METRICS, Fidelity, density_histogram
from lorsa_lens.io.atomic import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

JSON_FILE, PAGE_FILE = "evaluation.json", "evaluation.html"

TABLES = {
    "Cross entropy": {
        "clean": "ce_clean",
        "spliced": "ce_spliced",
        "zero": "ce_zero",
        "mean": "ce_mean",
        "recovered (zero)": "ce_recovered",
        "recovered (mean)": "ce_recovered_mean",
    },
    "Predicted distributions": {
        "KL spliced": "kl",
        "KL zero": "kl_zero",
        "KL mean": "kl_mean",
        "KL recovered": "kl_recovered",
        "agreement": "agreement",
    },
    "Output of the layer": {
        "expl. variance": "explained_variance",
        "FVU": "fvu",
        "without sinks": "fvu_without_sinks",
        "sinks": "sink_share",
        "cosine": "cosine",
    },
    "Heads": {
        "L0": "l0",
        "dead": "dead",
        "pattern overlap": "pattern_overlap",
        "by chance": "pattern_overlap_chance",
    },
}
"""Tables, with the titles of their columns and what stands in them."""


def layer_name(row: Fidelity) -> str:
    """The layer's number, or `all`."""
    return "all" if row.layer is None else str(row.layer)


def table(rows: Sequence[Fidelity], columns: Mapping[str, str]) -> list[list[str]]:
    """The cells of a table, rows without any of its values left out."""
    return [
        [layer_name(row), *(_cell(getattr(row, name)) for name in columns.values())]
        for row in rows
        if any(getattr(row, name) is not None for name in columns.values())
    ]


def _cell(value: float | None) -> str:
    """A number, with half the width of its interval if there is one."""
    if value is None or not math.isfinite(value):
        return ""
    if isinstance(value, Estimate) and math.isfinite(value.low):
        return f"{value:.4f} ± {(value.high - value.low) / 2:.1g}"
    return f"{value:.4f}"


def print_evaluation(console: "Console", rows: Sequence[Fidelity]) -> None:
    """Print all tables."""
    from rich.table import Table

    for title, columns in TABLES.items():
        shown = Table(title=title, title_justify="left")
        for name in ("layer", *columns):
            shown.add_column(name, min_width=6)
        for cells in table(rows, columns):
            shown.add_row(*(cell.replace(" ±", "\n±") for cell in cells))
        console.print(shown)


def to_dict(rows: Sequence[Fidelity], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An evaluation as JSON can hold it; what is not a number is null.

    Args:
        rows: from `evaluate`.
        about: what was evaluated on what, added as it is.

    Returns:
        `about`, `confidence` of the intervals, and `rows`. A row has its counts, under `metrics`
        every metric with `value`, `low` and `high`, and under `sae_lens` those that SAELens
        reports, by its names.
    """
    return {"about": dict(about or {}), "confidence": CONFIDENCE, "rows": [*map(_row, rows)]}


def _row(row: Fidelity) -> dict[str, Any]:
    metrics = row.metrics()
    values: dict[str, Any] = {
        "layer": row.layer,
        "n_documents": row.n_documents,
        "n_predicted": row.n_predicted,
        "metrics": {
            name: {
                "value": _finite(value),
                "low": _finite(value.low),
                "high": _finite(value.high),
            }
            for name, value in metrics.items()
        },
        "sae_lens": {
            METRICS[name].sae_lens: _finite(value)
            for name, value in metrics.items()
            if METRICS[name].sae_lens is not None
        },
    }
    if row.density is not None and row.dead is not None:
        values.update(
            n_tokens=row.n_tokens,
            dead=row.dead,
            pattern_overlap_chance=_finite(row.pattern_overlap_chance),
            density_histogram=density_histogram(row.density),
            matched_heads=row.matched_heads,
        )
    return values


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def save_evaluation(
    folder: str | Path, rows: Sequence[Fidelity], about: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write `evaluation.json` and `evaluation.html`, a page that opens without a network.

    Args:
        folder: where; it is made if it is not there.
        rows: from `evaluate`.
        about: what was evaluated on what, for people and programs.

    Returns:
        The two files.
    """
    from lorsa_lens.evaluation.page import page_sections
    from lorsa_lens.views import save

    target = Path(folder) / JSON_FILE
    text = json.dumps(to_dict(rows, about), indent=2, allow_nan=False) + "\n"
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    page = save(
        Path(folder) / PAGE_FILE,
        *page_sections(rows, about or {}),
        title="How faithful the Lorsas are",
    )
    return [target, page]
