"""A comparison of levels as a page."""

from collections.abc import Sequence
from pathlib import Path

from lorsa_lens.singular.levels import LevelComparison, SideAgreement
from lorsa_lens.singular.read_in import Side
from lorsa_lens.views import Heading, Table, Text, save

EXPLANATION = (
    "One firing, explained twice: by the attention heads that attend, and by each circuit of the "
    "Lorsa that does. Upstream components are the same on both levels.\n\n"
    "jaccard: of the components selected. pearson: of the attribution of every component. "
    "overlap: mean squared cosine between the spans of the singular vectors selected, beside that "
    "of a random rotation of the circuit's basis. without heads' signal: the circuit's attention "
    "weight when what the heads' edges say is taken out of what it reads; without own signal: the "
    "heads' mean attention weight the other way round. terms: pairs of component and vector that "
    "each level needs."
)

THROUGH: dict[Side, str] = {"dest": "query", "src": "key"}


def level_table(comparison: LevelComparison) -> Table:
    """One row for each circuit and side."""
    header = [
        "circuit",
        "attention",
        "nearest head",
        "pattern distance",
        "through",
        "jaccard",
        "pearson",
        "overlap",
        "rotated",
        "without heads' signal",
        "heads without own signal",
        "terms",
        "heads' terms",
    ]
    rows = [
        [
            f"L{comparison.layer}.qk{circuit.qk_head}",
            circuit.attention,
            f"L{comparison.layer}.{circuit.nearest_head}",
            circuit.pattern_distance,
            THROUGH[side],
            *_cells(agreement),
        ]
        for circuit in comparison.comparisons
        for side, agreement in circuit.sides.items()
    ]
    return Table(header, rows)


def save_level_page(
    comparisons: LevelComparison | Sequence[LevelComparison],
    path: str | Path,
    *,
    title: str = "Two levels of one model",
) -> Path:
    """Write a self-contained HTML page with a table for each firing.

    Raises:
        ValueError: if the name does not end in `.html`.
    """
    given = [comparisons] if isinstance(comparisons, LevelComparison) else list(comparisons)
    sections: list[Heading | Text | Table] = [Text(EXPLANATION)]
    for comparison in given:
        heads = zip(comparison.heads, comparison.head_attention, strict=True)
        names = ", ".join(f"L{comparison.layer}.{head} ({weight:.3f})" for head, weight in heads)
        sections += [
            Heading(f"Layer {comparison.layer}: token {comparison.dest} to {comparison.src}"),
            Text(f"Attention heads that attend, with their weights: {names or 'none'}."),
            level_table(comparison),
        ]
    return save(path, *sections, title=title)


def _cells(agreement: SideAgreement) -> list[float | int]:
    return [
        agreement.jaccard,
        agreement.pearson,
        agreement.overlap,
        agreement.overlap_null,
        agreement.ablated,
        agreement.ablated_original,
        agreement.n_selected,
        agreement.n_selected_original,
    ]
