"""What the demo shows: tables for a terminal, and one page of figures."""

import math
from pathlib import Path

from einops import rearrange
from rich.console import Console
from rich.table import Table as RichTable

from lorsa_lens import views
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.demo.story import Finding, Story
from lorsa_lens.evaluation import Fidelity
from lorsa_lens.functional.code import to_dense
from lorsa_lens.lorsa import Lorsa

MAX_FIGURE_TOKENS = 48
MAX_FIGURE_HEADS = 8

FIDELITY_COLUMNS = [
    "layer", "CE clean", "CE spliced", "CE zero", "recovered", "FVU", "K", "dead",
]  # fmt: skip
FINDING_COLUMNS = [
    "relation", "layer", "attention head: on source", "Lorsa heads", "on source", "F1",
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
    "such tokens. Where no attention head looks at a source, no Lorsa head can be expected to."
)


def print_story(console: Console, story: Story) -> None:
    """Print a story's two tables."""
    console.print(f"\n[bold]{story.subject.title}[/bold]")
    for columns, rows in (
        (FIDELITY_COLUMNS, _fidelity_rows(story)),
        (FINDING_COLUMNS, _finding_rows(story)),
    ):
        table = RichTable(*columns)
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        console.print(table)


def save_page(path: Path, stories: list[Story]) -> Path:
    """Write all stories as one page that opens without a network."""
    sections: list[views.Heading | views.Text | views.Table | views.Figure] = []
    sections.append(views.Text(READING_THE_TABLES))
    for story in stories:
        sections += [
            views.Heading(story.subject.title),
            views.Table(FIDELITY_COLUMNS, _fidelity_rows(story)),
            views.Table(FINDING_COLUMNS, _finding_rows(story)),
        ]
        for lorsa in story.lorsas:
            sections += _figures(story, lorsa)
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
    names = ", ".join(head_name(finding.layer, head) for head in finding.heads[:2])
    if len(finding.heads) > 2:
        names += f" + {len(finding.heads) - 2}"
    return [
        finding.relation,
        str(finding.layer),
        f"H{finding.attention_head}: {finding.attention_mass:.2f}",
        names or "none",
        "" if math.isnan(finding.share) else f"{finding.share:.2f}",
        "" if math.isnan(finding.f1) else f"{finding.f1:.2f}",
    ]


def _figures(
    story: Story, lorsa: Lorsa
) -> list[views.Heading | views.Text | views.Table | views.Figure]:
    """The strongest head of each relation found in a layer, on the sequence where most occur."""
    layer = lorsa.cfg.layer
    found = [f for f in story.findings if f.layer == layer and f.heads][:MAX_FIGURE_HEADS]
    if layer is None or not found:
        return []
    counts = sum((story.subject.sources[f.relation] >= 0).any(1).int() for f in found)
    row = int(counts.argmax())  # type: ignore[union-attr]
    record = story.records[layer].batch(slice(row, row + 1))
    heads = [finding.heads[0] for finding in found]
    circuits = sorted({head // lorsa.cfg.group_size for head in heads})
    n_shown = min(MAX_FIGURE_TOKENS, record.x.shape[1])
    tokens = story.subject.str_tokens(story.subject.test_tokens[row])[:n_shown]
    pattern = lorsa.pattern(record.x, circuits, **record.context)[0, :, :n_shown, :n_shown]
    acts = to_dense(lorsa.encode(record.x, **record.context), lorsa.cfg.n_ov_heads)
    z_pattern = lorsa.z_pattern(record.x, heads, **record.context)
    z_pattern = z_pattern * rearrange(acts[..., heads] != 0, "b q h -> b h q 1")
    z_pattern = z_pattern[0, :, :n_shown, :n_shown]
    names = [f"{head_name(layer, f.heads[0])} {f.relation}" for f in found]
    return [
        views.Heading(f"Layer {layer}: what the heads fetch", level=3),
        views.Text(
            "The strongest Lorsa head of each relation: what each token (column) gives it, at the "
            "tokens (rows) where it stays. The other rows are blank."
        ),
        views.z_pattern_view(z_pattern, tokens, head_names=names),
        views.Text("The query-key circuits that these heads share."),
        views.attention_view(pattern, tokens, head_names=[f"L{layer} QK {c}" for c in circuits]),
    ]
