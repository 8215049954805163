"""How much of a target a graph explains, and how alike graphs are."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import node_influence, shares
from lorsa_lens.circuits.pruning import top_nodes


class GraphScores(NamedTuple):
    """How much of the targets a graph explains, 0 to 1."""

    replacement: float
    """Share of the influence of leaves that tokens, positions and biases have, not errors."""
    completeness: float
    """Share of what goes into nodes that is no error and not missing, weighted by influence."""


def graph_scores(graph: AttributionGraph) -> GraphScores:
    """Replacement and completeness scores, as circuit-tracer defines them.

    With the influence I of nodes and the shares N of edges (`lorsa_lens.circuits.influence`)

        replacement  = sum of I over inputs / (the same + sum of I over errors)
        completeness = sum_t I[t] (1 - errors[t] - missing[t]) / sum_t I[t]

    where inputs are tokens, positions and biases, t runs over all nodes, and `errors[t]` and
    `missing[t]` are the shares of what error nodes, and what is not in the graph, give to t (0 for
    leaves). Where there are no biases and nothing is missing the numbers are circuit-tracer's: it
    has no bias nodes, and what is missing does not count there.
    """
    total = node_influence(graph)
    normalized = shares(graph)
    errors = graph.of_kind("error")
    inputs = graph.of_kind("token", "position", "bias")
    by_input, by_error = float(total[inputs].sum()), float(total[errors].sum())
    explained = normalized[:, ~errors].sum(1)
    explained[errors | inputs] = 1.0
    weight = float(total.sum())
    return GraphScores(
        replacement=by_input / (by_input + by_error) if by_input + by_error > 0 else 0.0,
        completeness=float((total * explained).sum()) / weight if weight > 0 else 0.0,
    )


def nodes_for(graph: AttributionGraph, completeness: float) -> int | None:
    """The fewest of the strongest nodes with which a graph is so complete; None if none suffice.

    Nodes are taken by influence, targets not counted; completeness is that of `graph_scores`.

    Raises:
        ValueError: if `completeness` is not between 0 and 1.
    """
    if not 0 <= completeness <= 1:
        raise ValueError(f"completeness = {completeness}: between 0 and 1")
    most = len(graph.nodes) - len(graph.targets)
    low, high = 0, most
    if graph_scores(graph).completeness < completeness:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if graph_scores(top_nodes(graph, middle)).completeness >= completeness:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Stability:
    """How alike the graphs of several prompts are: mean Jaccard indices over pairs of prompts."""

    units: float
    """Of heads and features, wherever they are at work."""
    edges: float
    """Of edges between units, wherever they are at work."""
    n_graphs: int


def stability(graphs: Sequence[AttributionGraph]) -> Stability:
    """Compare graphs of paraphrases; prune them first, since every unit is in a whole graph.

    Units are compared by kind, layer and index, so that prompts may differ in length.

    Raises:
        ValueError: if there are fewer than two graphs.
    """
    if len(graphs) < 2:
        raise ValueError(f"graphs has {len(graphs)}: stability needs two or more to compare")
    units = [{_unit(node) for node in graph.nodes if not node.is_leaf} for graph in graphs]
    edges = [_unit_edges(graph) for graph in graphs]
    return Stability(_mean_jaccard(units), _mean_jaccard(edges), len(graphs))


def _unit(node: Node) -> tuple[str, int, int]:
    return (node.kind, node.layer, node.index)


def _unit_edges(graph: AttributionGraph) -> set[tuple[object, object]]:
    targets, sources = (index.tolist() for index in graph.edges.nonzero(as_tuple=True))
    pairs = ((graph.nodes[s], graph.nodes[t]) for s, t in zip(sources, targets, strict=True))
    return {(_unit(s), _unit(t)) for s, t in pairs if not s.is_leaf}


def _mean_jaccard(sets: Sequence[AbstractSet[object]]) -> float:
    pairs = list(combinations(sets, 2))
    both = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    return float(torch.tensor(both, dtype=torch.float64).mean())
