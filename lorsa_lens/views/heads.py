"""Heads as figures: one whole, a layer at a glance, and Lorsa heads beside an attention head."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.views.bars import Bars
from lorsa_lens.views.card import Card
from lorsa_lens.views.checks import head_labels, heat_map_values
from lorsa_lens.views.drawing import Drawing
from lorsa_lens.views.excerpts import MIN_SHARE, excerpt_drawing
from lorsa_lens.views.facts import HeadFacts, Weighted
from lorsa_lens.views.figure import Figure
from lorsa_lens.views.figures import heat_map
from lorsa_lens.views.sections import Cell, Heading, Table, Text
from lorsa_lens.views.spec import Scale
from lorsa_lens.views.style import NEGATIVE, POSITIVE
from lorsa_lens.views.tokens import display_token

MAX_EXCERPTS = 16
"""Contexts of one card."""

MAX_ORIGINS = 8
"""Attention heads that a card lists, those with the largest shares."""

MAX_LISTED = 20
"""Heads that the overview of a layer lists."""

DENSITY_EDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Where the bars of a layer's densities part."""

Part = Heading | Text | Table | Bars | Drawing


def head_card(facts: HeadFacts) -> Card:
    """Draw one head whole: what it is named after, where it stays, reads, writes and comes from.

    Arrows run from the sources of a context to the query: blue ones raise the head's activation,
    orange ones lower it, and their width is the share of `|A v|`.

    Args:
        facts: What is known about the head, for example from
            `lorsa_lens.dashboard.read_heads(model, lorsa, tokens, [head])`.

    Returns:
        A card that notebooks show and `lorsa_lens.views.save` puts on a page.

    Raises:
        ValueError: If there are more than `MAX_EXCERPTS` contexts.
    """
    if len(facts.excerpts) > MAX_EXCERPTS:
        raise ValueError(
            f"facts has {len(facts.excerpts)} excerpts, one card draws at most {MAX_EXCERPTS}; "
            "choose the first ones: excerpts[:16]"
        )
    parts: list[Part] = [Text(_behaviours(facts)), Table(*_numbers(facts))]
    if facts.excerpts:
        parts.append(Heading("Contexts", 3))
        parts.append(
            Text(
                "Arrows run from source tokens to the framed query. Blue raises the activation, "
                f"orange lowers it; width is the share of |A·v|. Shares below {MIN_SHARE:.0%} "
                "have no arrow, tokens far from sources and query are left out."
            )
        )
        parts += [excerpt_drawing(excerpt) for excerpt in facts.excerpts]
    if facts.raises or facts.lowers:
        parts.append(Heading("Writes (at a positive activation)", 3))
        parts.append(_pairs(("raises", facts.raises), ("lowers", facts.lowers), "logit"))
    if facts.reads_most or facts.reads_least:
        parts.append(Heading("Reads", 3))
        reads = (("fetches most from", facts.reads_most), ("least from", facts.reads_least))
        parts.append(_pairs(*reads, "value"))
    if facts.origins:
        largest = sorted(facts.origins.items(), key=lambda item: -abs(item[1]))[:MAX_ORIGINS]
        names = [f"{facts.layer}.{head}" for head, _ in largest]
        parts.append(Heading("Attention heads it comes from", 3))
        parts.append(Bars(names, {"share of what it carries": [share for _, share in largest]}))
    return Card(f"Head {facts.name}", parts)


def layer_overview(facts: Sequence[HeadFacts]) -> Card:
    """Draw a layer at a glance: how often its heads stay, what they do, how mixed they are.

    Args:
        facts: What is known about its heads; excerpts and tokens are not needed.

    Returns:
        A card that notebooks show and `lorsa_lens.views.save` puts on a page.

    Raises:
        ValueError: If there are no heads, or they are of several layers.
    """
    layers = sorted({head.layer for head in facts})
    if len(layers) != 1:
        raise ValueError(f"facts must be of the heads of one layer, got layers {layers}")
    parts: list[Part] = [Heading("Densities", 3), _densities(facts)]
    counts = Counter(name for head in facts for name in head.behaviours)
    if counts:
        names = [name for name, _ in counts.most_common()]
        rows: list[list[Cell]] = [
            [name, counts[name], " ".join(_strongest(facts, name))] for name in names
        ]
        parts += [Heading("Behaviours", 3), Table(["behaviour", "heads", "strongest"], rows)]
    known = [head.effective_heads for head in facts if math.isfinite(head.effective_heads)]
    if known:
        n_max = math.ceil(max(known))
        bins = Counter(max(1, round(value)) for value in known)
        labels = [str(number) for number in range(1, max(n_max, *bins) + 1)]
        counted = [float(bins[int(label)]) for label in labels]
        parts += [
            Heading("Effective attention heads behind each head", 3),
            Bars(labels, {"heads": counted}),
        ]
    return Card(f"Layer {layers[0]}: {len(facts)} heads", parts)


def compare_view(
    pattern: Float[Tensor, "query key"],
    z_pattern: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    *,
    attention_name: str = "attention head",
    head_names: Sequence[str] | None = None,
) -> Figure:
    """Draw an attention head beside the Lorsa heads that carry it.

    The first heat map is the attention pattern. Those of the Lorsa heads are their z patterns,
    each divided by its largest absolute value, so that all are drawn from -1 to 1.

    Args:
        pattern: The attention head's pattern, after the softmax.
        z_pattern: The contributions `A[q, k] v[k]` of the Lorsa heads.
        tokens: The tokens of the sequence.
        attention_name: What to call the attention head.
        head_names: A name for each Lorsa head, for example with its share.

    Returns:
        circuitsvis' own object: notebooks show it, `lorsa_lens.views.save` puts it on a page.

    Raises:
        ValueError: If a shape does not fit the tokens, the figure is too large, a value is not
            finite, or `pattern` is not within 0 to 1.
        TypeError: If a tensor is not floating, or `tokens` is not a sequence of strings.
    """
    if pattern.ndim != 2:
        raise ValueError(f"pattern must be [query, key], got shape {tuple(pattern.shape)}")
    attention = heat_map_values("compare_view", "pattern", pattern[None], tokens)
    if attention.min() < 0 or attention.max() > 1.01:
        raise ValueError("pattern must be attention after the softmax, within 0 to 1")
    contributions = heat_map_values("compare_view", "z_pattern", z_pattern, tokens, extra_heads=1)
    names = [attention_name, *head_labels(head_names, len(contributions))]
    largest = contributions.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
    values = torch.cat([attention.clamp(0.0, 1.0), contributions / largest])
    legend = (
        f"Colour: in {attention_name}, attention from the query (row) to the key (column); in the "
        "others, the contribution A[q, k]·v[k] as a part of the head's largest; orange is "
        "negative, blue is positive."
    )
    return heat_map(values, tokens, names, Scale(-1.0, 1.0, NEGATIVE, POSITIVE), legend)


def _behaviours(facts: HeadFacts) -> str:
    if not facts.behaviours:
        return "Not named after any behaviour that was looked for."
    by_score = sorted(facts.behaviours.items(), key=lambda item: -item[1])
    return "; ".join(f"{name} ({score:.2f})" for name, score in by_score)


def _numbers(facts: HeadFacts) -> tuple[list[str], list[list[Cell]]]:
    values = {
        "density": facts.density,
        "largest |z|": facts.max_activation,
        "mean distance to source": facts.mean_offset,
        "effective attention heads": facts.effective_heads,
    }
    cells: list[Cell] = [
        f"{value:.4g}" if math.isfinite(value) else "unknown" for value in values.values()
    ]
    return list(values), [cells]


def _pairs(
    one: tuple[str, Sequence[Weighted]], two: tuple[str, Sequence[Weighted]], unit: str
) -> Table:
    rows: list[list[Cell]] = [
        [cell for pair in row for cell in (display_token(pair[0]) if pair[0] else "", pair[1])]
        for row in zip_longest(one[1], two[1], fillvalue=("", ""))
    ]
    return Table([one[0], unit, two[0], unit], rows)


def _densities(facts: Sequence[HeadFacts]) -> Bars:
    known = [head.density for head in facts if math.isfinite(head.density)]
    labels = ["dead", *(f"< {edge:g}" for edge in DENSITY_EDGES), f"≥ {DENSITY_EDGES[-1]:g}"]
    counts = [0.0] * len(labels)
    for density in known:
        place = 0 if density == 0 else 1 + sum(density >= edge for edge in DENSITY_EDGES)
        counts[place] += 1
    return Bars(labels, {"heads": counts})


def _strongest(facts: Sequence[HeadFacts], behaviour: str) -> list[str]:
    having = [head for head in facts if behaviour in head.behaviours]
    having.sort(key=lambda head: -head.behaviours[behaviour])
    names = [head.name for head in having[:MAX_LISTED]]
    return names if len(having) <= MAX_LISTED else [*names, "…"]
