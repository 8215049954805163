"""The strongest paths of a graph: from a token, a bias or an error up to what is explained."""

from heapq import nlargest
from typing import NamedTuple

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import shares
from lorsa_lens.circuits.names import long_name
from lorsa_lens.views.sections import Table


class GraphPath(NamedTuple):
    """One way up."""

    nodes: tuple[Node, ...]
    """From the source to the target."""
    influence: float
    """Share of the explained output that flows along it: the product of its edges' shares, with
    the target's own weight. Over all paths these sum to at most 1."""
    sign: int
    """1 where it raises the target, -1 where it lowers it."""


def strongest_paths(graph: AttributionGraph, n: int = 10) -> list[GraphPath]:
    """The paths of the most influence, strongest first.

    Paths begin at nodes that no edge of the graph reaches, and end at targets.

    Args:
        graph: `prune` large ones first, since every edge is looked at.
        n: how many.

    Raises:
        ValueError: if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n = {n} must be positive")
    weights = graph.target_weights.abs()
    weights = weights / weights.sum().clamp(min=1e-300)
    # A source that lowers a negative activation adds to what its node writes.
    own = graph.pre_activations.sign().masked_fill(graph.of_kind("logit"), 1.0)
    share, sign = shares(graph).tolist(), (graph.edges.sign() * own[:, None]).tolist()
    # Of every node, its best ways up to a target: influence, sign and the nodes above.
    ways: list[list[GraphPath]] = [[] for _ in graph.nodes]
    whole: list[GraphPath] = []
    for i in reversed(range(len(graph.nodes))):  # targets stand behind their sources
        node = graph.nodes[i]
        if node.kind == "logit":
            ways[i] = [GraphPath((node,), float(weights[i]), 1)]
        best = nlargest(n, ways[i], key=lambda way: way.influence)
        sources = [j for j, weight in enumerate(share[i]) if weight > 0]
        if not sources:
            whole += [way for way in best if len(way.nodes) > 1]
        for j in sources:
            ways[j] += [
                GraphPath(
                    (graph.nodes[j], *way.nodes),
                    way.influence * share[i][j],
                    way.sign * int(sign[i][j]),
                )
                for way in best
            ]
        ways[i] = []
    return nlargest(n, whole, key=lambda way: way.influence)


def path_table(graph: AttributionGraph, n: int = 10) -> Table:
    """`strongest_paths` as a table for a terminal, a notebook or a page."""
    rows = [
        [
            " → ".join(long_name(graph, node) for node in path.nodes),
            "raises" if path.sign > 0 else "lowers",
            f"{path.influence:.1%}",
        ]
        for path in strongest_paths(graph, n)
    ]
    return Table(["path", "the target", "influence"], rows)
