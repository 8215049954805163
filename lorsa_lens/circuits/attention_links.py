"""Why the heads of a graph attend, as links: which nodes make their queries and keys.

The edges of a graph say what heads move, with their patterns frozen. A node that only decides where
another head attends has no influence there, so pruning drops it; here it comes back.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from lorsa_lens.circuits.attention_stages import AttentionStage
from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import node_influence, shares
from lorsa_lens.circuits.qk_tracing import trace_qk
from lorsa_lens.circuits.replacement import LocalReplacement

Traced = Mapping[Node, Mapping[str, Any]]
"""Heads, and what `QKTracing.to_dict` gives for each."""

MIN_SHARE = 0.1
"""Of the sizes of all parts of one side: smaller ones are no links."""

N_INPUTS = 2
"""Sources that a node brings with it which only decides where heads attend."""


class AttentionLink(NamedTuple):
    """What a node gives to a head's score."""

    source: Node
    target: Node
    side: Literal["query", "key"]
    value: float
    """Summed over everything on the other side, in units of the score."""


def trace_heads(
    replacement: LocalReplacement, graph: AttributionGraph, n: int = 8
) -> dict[Node, dict[str, Any]]:
    """Trace why the heads of the most influence attend to the token that they attend to most.

    Heads are left out above a layer whose attention is neither replaced nor made of nodes: what
    passes through it has no node to be traced to.

    Args:
        replacement: the prompt that the graph was made of.
        graph: whose heads.
        n: how many.
    """
    hidden = [
        stage.layer
        for stage in replacement.stages
        if isinstance(stage, AttentionStage) and stage.attention == "frozen"
    ]
    order = node_influence(graph).argsort(descending=True).tolist()
    heads = [graph.nodes[i] for i in order if graph.nodes[i].kind == "head"]
    seen = [node for node in heads if node.layer <= min(hidden, default=node.layer)]
    return {node: trace_qk(replacement, node).to_dict() for node in seen[:n]}


def attention_links(graph: AttributionGraph, traced: Traced) -> list[AttentionLink]:
    """The larger parts of each side of each traced head whose nodes are in the graph."""
    by_id = {node.id: node for node in graph.nodes}
    found = []
    sides: tuple[tuple[Literal["query", "key"], str], ...] = (
        ("query", "top_q_marginal"),
        ("key", "top_k_marginal"),
    )
    for target, values in traced.items():
        for side, name in sides:
            total = sum(abs(value) for _, value in values[name]) or 1.0
            found += [
                AttentionLink(by_id[source], target, side, float(value))
                for source, value in values[name]
                if source in by_id and abs(value) >= MIN_SHARE * total
            ]
    return found


def with_attention_nodes(
    whole: AttributionGraph, pruned: AttributionGraph, traced: Traced
) -> AttributionGraph:
    """The pruned graph, and with it what decides where its heads attend.

    Nodes at the lower end of an attention link come back, each with its strongest sources.

    Args:
        whole: the graph before pruning.
        pruned: some of its nodes and edges.
        traced: of heads of `pruned`.
    """
    place = whole.positions_of
    nodes = torch.zeros(len(whole.nodes), dtype=torch.bool)
    nodes[[place[node] for node in pruned.nodes]] = True
    added = {
        place[link.source]
        for link in attention_links(whole, traced)
        if not nodes[place[link.source]]
    }
    edges = torch.zeros_like(whole.edges, dtype=torch.bool)
    rows = torch.tensor([place[node] for node in pruned.nodes])
    edges[rows[:, None], rows] = pruned.edges != 0
    share = shares(whole)
    for i in sorted(added):
        strongest = share[i].topk(min(N_INPUTS, len(whole.nodes)))
        sources = strongest.indices[strongest.values > 0]
        edges[i, sources] = True
        nodes[i] = True
        nodes[sources] = True
    kept = whole.keeping(nodes, edges)
    return replace(
        kept,
        labels={**kept.labels, **pruned.labels},
        supernodes=pruned.supernodes,
        meta=pruned.meta,
    )
