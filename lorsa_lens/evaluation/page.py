"""The page of an evaluation: tables, charts, and what every number means."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorsa_lens.evaluation.documents import CONFIDENCE, Estimate
from lorsa_lens.evaluation.fidelity import Fidelity, density_histogram
from lorsa_lens.evaluation.report import TABLES, layer_name, table
from lorsa_lens.validation import field_docs
from lorsa_lens.views import Bars, Heading, Table, Text

Section = Heading | Table | Text | Bars

CHARTS = {
    "Cross entropy recovered": {
        "against zero ablation": "ce_recovered",
        "against mean ablation": "ce_recovered_mean",
    },
    "Variance unexplained": {
        "all tokens": "fvu",
        "without sink positions": "fvu_without_sinks",
    },
    "Overlap with the patterns of the layer's own heads": {
        "best matching head": "pattern_overlap",
        "a head at random": "pattern_overlap_chance",
    },
}
"""Charts with a group of bars for each layer."""


def page_sections(rows: Sequence[Fidelity], about: Mapping[str, Any]) -> list[Section]:
    """What the page is made of."""
    sections: list[Section] = []
    if about:
        sections.append(Table(["evaluated", ""], [[name, str(about[name])] for name in about]))
    first = rows[0]
    sections += [
        Text(
            f"{first.n_predicted:,} predictions in {first.n_documents:,} documents. What stands "
            f"after ± is half of the {CONFIDENCE:.0%} interval over documents."
        ),
    ]
    for title, columns in TABLES.items():
        sections += [Heading(title), Table(["layer", *columns], table(rows, columns))]
    for title, series in CHARTS.items():
        sections += [Heading(title, level=3), _chart(rows, series)]
    for row in rows:
        if row.density is not None:
            sections += [
                Heading(f"How often heads stay, layer {row.layer}", level=3),
                _histogram(row),
            ]
    documented = {name: doc for name, doc in field_docs(Fidelity).items() if hasattr(first, name)}
    sections += [
        Heading("What the numbers are"),
        Text(
            "y is what the layer returns, y' what the Lorsa writes, E the mean over tokens that "
            "count; special tokens do not."
        ),
        Table(["name", "meaning"], [[name, doc] for name, doc in documented.items()]),
    ]
    return sections


def _chart(rows: Sequence[Fidelity], series: Mapping[str, str]) -> Bars:
    shown = [row for row in rows if any(getattr(row, name) is not None for name in series.values())]
    values = {title: [getattr(row, name) for row in shown] for title, name in series.items()}
    return Bars(
        [layer_name(row) for row in shown],
        values,
        {
            title: [(value.low, value.high) for value in column]
            for title, column in values.items()
            if all(isinstance(value, Estimate) for value in column)
        },
    )


def _histogram(row: Fidelity) -> Bars:
    assert row.density is not None  # the caller has looked
    counts = density_histogram(row.density)
    return Bars(
        list(counts), {"heads by density (share of tokens)": list(map(float, counts.values()))}
    )
