"""What the demo shows: tables for a terminal, and one page of figures."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from lorsa_lens import views
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.demo.figures import Section, layer_figures
from lorsa_lens.demo.story import Finding, Story
from lorsa_lens.evaluation import Fidelity

FIDELITY_COLUMNS = [
    "layer", "CE clean", "CE spliced", "CE zero", "recovered", "FVU", "K", "dead",
]  # fmt: skip
FINDING_COLUMNS = [
    "relation", "layer", "attention", "Lorsa heads", "on source", "F1", "untrained",
]  # fmt: skip

READING_THE_TABLES = (
    "Each attention layer was replaced by a Lorsa trained on what the layer receives and returns. "
    "CE is the cross entropy in nats at the positions that count: of the model as it is (clean), "
    "with the Lorsa in place (spliced), and with the layer's output set to zero. Recovered is "
    "(zero - spliced) / (zero - clean). FVU is the fraction of variance of the layer's output that "
    "the Lorsa leaves unexplained, K the heads that stay per token, dead the share of heads that "
    "never stay.\n\n"
    "A relation names the earlier token, the source, that a head may fetch from. Beside each are "
    "the attention head of the model that attends to the source most, with the mass it puts there, "
    "and the Lorsa heads named after it, strongest first: at least half of their energy falls on "
    "tokens that have such a source, and at least half of their z pattern there lies on it. On "
    "source is how much it is for all of them, F1 that of 'one of them stays' as a detector of "
    "such tokens. Untrained is both for the Lorsa before training, whose query-key circuits are "
    "copies of the model's: sources come from these, so do not take them for a merit of training, "
    "which is what makes the Lorsa faithful. Where no attention head looks at a source, no Lorsa "
    "head can be expected to."
)


def print_story(console: Console, story: Story) -> None:
    """Print a story's two tables."""
    console.print(f"\n[bold]{story.subject.title}[/bold]")
    for columns, rows in (
        (FIDELITY_COLUMNS, _fidelity_rows(story)),
        (FINDING_COLUMNS, _finding_rows(story)),
    ):
        table = RichTable()
        for column in columns:
            table.add_column(column, no_wrap=column == columns[0])
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        console.print(table)


def save_page(path: Path, stories: list[Story]) -> Path:
    """Write all stories as one page that opens without a network."""
    sections: list[Section] = []
    sections.append(views.Text(READING_THE_TABLES))
    for story in stories:
        sections += [
            views.Heading(story.subject.title),
            views.Table(FIDELITY_COLUMNS, _fidelity_rows(story)),
            views.Table(FINDING_COLUMNS, _finding_rows(story)),
        ]
        for lorsa in story.lorsas:
            sections += layer_figures(story, lorsa)
    return views.save(path, *sections, title="lorsa_lens: attention layers, one head one job")


def _fidelity_rows(story: Story) -> list[list[str]]:
    return [_fidelity_row(row, story.subject.sizes["k"]) for row in story.fidelity]


def _fidelity_row(row: Fidelity, k: int) -> list[str]:
    return [
        "all" if row.layer is None else str(row.layer),
        f"{row.ce_clean:.3f}",
        f"{row.ce_spliced:.3f}",
        f"{row.ce_zero:.3f}",
        f"{row.ce_recovered:.1%}",
        "" if row.fvu is None else f"{row.fvu:.4f}",
        str(k),
        "" if row.dead is None else f"{row.dead:.0%}",
    ]


def _finding_rows(story: Story) -> list[list[str]]:
    return [_finding_row(finding) for finding in story.findings]


def _finding_row(finding: Finding) -> list[str]:
    names = head_name(finding.layer, finding.heads[0]) if finding.heads else "none"
    if len(finding.heads) > 1:
        names += f" + {len(finding.heads) - 1}"
    return [
        finding.relation,
        str(finding.layer),
        f"H{finding.attention_head}: {finding.attention_mass:.2f}",
        names,
        "" if math.isnan(finding.share) else f"{finding.share:.2f}",
        "" if math.isnan(finding.f1) else f"{finding.f1:.2f}",
        _untrained(finding),
    ]


def _untrained(finding: Finding) -> str:
    if math.isnan(finding.null_share):
        return "none"
    return f"{finding.null_share:.2f}, {finding.null_f1:.2f}"
