"""The page's elements, which the scripts fill, and templates of what they cannot draw."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import AttributionGraph, Kind
from lorsa_lens.circuits.names import long_name
from lorsa_lens.views.excerpts import excerpt_drawing
from lorsa_lens.views.spec import escape
from lorsa_lens.views.tokens import display_token

MAX_CONTEXTS = 6
"""Contexts of one head on a page: the strongest."""

MAX_PAIRS = 12
"""Lines of a table of QK tracing: the largest."""


def body_html(graph: AttributionGraph, kinds: Mapping[Kind, str], *, attends: bool) -> str:
    """Prompt, controls, the empty drawing, the empty panel, the legend.

    Args:
        graph: the graph.
        kinds: the kinds of its nodes, and what they are called.
        attends: whether there are links that say why heads attend.
    """
    tokens = " ".join(escape(display_token(token)) for token in graph.tokens)
    explained = ", ".join(escape(long_name(graph, node)) for node in graph.targets)
    grouped = (
        '<label><input id="grouped" type="checkbox" checked> supernodes as one node</label>'
        if graph.supernodes
        else ""
    )
    if attends:
        grouped += '<label><input id="attends" type="checkbox" checked> why heads attend</label>'
    return f"""<p class="prompt"><b>Prompt</b> {tokens}<br><b>Explains</b> {explained}</p>
<form id="controls" role="search">
{_slider("nodes", "Nodes")}
{_slider("edges", "Edges")}
{grouped}
<label>Find <input id="query" type="search" placeholder="head, label or token"></label>
<span id="zoom"><button type="button" data-action="in" aria-label="zoom in">+</button>
<button type="button" data-action="out" aria-label="zoom out">&minus;</button>
<button type="button" data-action="fit">fit</button></span>
<p id="count" role="status"></p>
</form>
<div id="work">
<div id="stage"><svg id="graph" tabindex="-1" role="application"
aria-label="Attribution graph: tokens across, layers up. Arrow keys move between nodes."></svg>
<div id="tip" role="tooltip" hidden></div></div>
<aside id="panel" aria-label="Chosen node" aria-live="polite">{_overview(graph)}</aside>
</div>
<ul id="legend">{_legend(kinds, attends=attends)}</ul>"""


def template_html(graph: AttributionGraph, details: Details) -> Iterator[str]:
    """What scripts show: `own-<place>`, `qk-<place>` of a node, `contexts-<layer>.<head>`."""
    for place, node in enumerate(graph.nodes):
        own = details.excerpt(graph, node)
        if own is not None:
            yield f'<template id="own-{place}">{excerpt_drawing(own).to_html()}</template>'
        if node in details.qk:
            yield f'<template id="qk-{place}">{_qk_html(graph, details.qk[node])}</template>'
    for (layer, head), excerpts in details.contexts.items():
        drawn = "".join(excerpt_drawing(excerpt).to_html() for excerpt in excerpts[:MAX_CONTEXTS])
        yield f'<template id="contexts-{layer}.{head}">{drawn}</template>'


def _slider(name: str, label: str) -> str:
    return (
        f'<label>{label} <input id="{name}" type="range" min="1" max="100" step="1">'
        f'<output id="{name}-value" for="{name}"></output> of influence</label>'
    )


def _overview(graph: AttributionGraph) -> str:
    """What the panel says while nothing is chosen."""
    meta = [(name, value) for name, value in graph.meta.items() if _is_plain(value)]
    facts = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>"
        for name, value in meta
    )
    groups = "".join(
        f"<li>{escape(name)} ({len(nodes)})</li>" for name, nodes in graph.supernodes.items()
    )
    return (
        "<h2>How to read it</h2>"
        "<p>Each node writes to the residual stream at its token; an edge is what the upper node "
        "reads of it, with attention patterns, norms and selections as they are on this prompt. "
        "<b>Influence</b> is the share of the explained output that passes through a node or an "
        "edge, signs aside.</p>"
        "<p>Click a node to follow its edges. Drag to move, "
        "<kbd>Ctrl</kbd> and the wheel (or <kbd>+</kbd> <kbd>&minus;</kbd>) to zoom. Arrow keys: "
        "up and down along the strongest edge, left and right from node to node.</p>"
        + (f"<h3>Supernodes</h3><ul>{groups}</ul>" if groups else "")
        + (f"<h3>This graph</h3><dl>{facts}</dl>" if facts else "")
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _text(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _legend(kinds: Mapping[Kind, str], *, attends: bool) -> str:
    samples = [
        f'<li><svg width="34" height="24" viewBox="-17 -12 34 24" aria-hidden="true">'
        f'<g class="{kind}"><path class="shape" data-kind="{kind}"/></g></svg>{escape(name)}</li>'
        for kind, name in kinds.items()
    ]
    lines = [
        ("raises", "raises what it reaches; thicker: more influence"),
        ("lowers", "lowers it"),
    ]
    if attends:
        lines.append(("attends", "makes a head attend there (part of its score)"))
    samples += [
        f'<li><svg width="34" height="12" aria-hidden="true"><g class="link {sign}">'
        f'<path class="line" d="M1 6H33" stroke-width="3"/></g></svg>{name}</li>'
        for sign, name in lines
    ]
    return "".join(samples)


def _qk_html(graph: AttributionGraph, traced: Mapping[str, Any]) -> str:
    """Why a head attends: pairs of nodes, and each side alone."""
    intro = ""
    if {"key", "weight", "total"} <= traced.keys():
        token = escape(display_token(graph.tokens[traced["key"]]))
        intro = (
            f"<p>It attends to {token} ({traced['key']}) with weight {traced['weight']:.2f}. Parts "
            f"of that score, which is {traced['total']:.3g}:</p>"
        )
    tables = (
        (("query node", "key node"), "pair_wise"),
        (("all of the query side",), "top_q_marginal"),
        (("all of the key side",), "top_k_marginal"),
    )
    return intro + "".join(
        _qk_table(graph, titles, traced[key]) for titles, key in tables if traced[key]
    )


def _qk_table(graph: AttributionGraph, titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    places = {node.id: place for place, node in enumerate(graph.nodes)}
    lines = []
    for *names, value in rows[:MAX_PAIRS]:
        cells = "".join(f"<td>{_node_button(graph, places, name)}</td>" for name in names)
        lines.append(f'<tr>{cells}<td class="number">{value:+.3g}</td></tr>')
    return f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _node_button(graph: AttributionGraph, places: Mapping[str, int], name: str) -> str:
    if name not in places:
        return escape(name)
    title = long_name(graph, graph.nodes[places[name]])
    return f'<button type="button" data-node="{places[name]}">{escape(title)}</button>'
