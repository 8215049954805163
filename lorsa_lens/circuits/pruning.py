"""Smaller graphs: the nodes and edges that most of the influence flows through."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph
from lorsa_lens.circuits.influence import edge_influence, node_influence


def prune(
    graph: AttributionGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> AttributionGraph:
    """Keep the nodes, then the edges, that together have a share of all influence.

    As circuit-tracer does: nodes by influence on the targets until their sum is `node_threshold` of
    all; then edges likewise, by the influence that the nodes left give them; then nodes go, again
    and again, that lost all edges out of them (or, but for leaves, into them). Tokens and targets
    stay. What goes is in `missing`; shares stay relative to all that there was (`gross`), while
    circuit-tracer's are relative to what is left.

    Args:
        graph: the whole graph.
        node_threshold: share of the nodes' influence to keep.
        edge_threshold: share of the edges' influence to keep.

    Raises:
        ValueError: if a threshold is not between 0 and 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: a share of all influence, 0 to 1")
    stay = graph.of_kind("token", "logit")
    nodes = strongest(node_influence(graph), node_threshold) | stay
    fewer = graph.keeping(nodes)
    edges = strongest(edge_influence(fewer), edge_threshold)
    nodes = _connected(fewer, edges)
    pruned = fewer.keeping(nodes, edges)
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    return replace(pruned, meta={**graph.meta, **thresholds})


def top_nodes(graph: AttributionGraph, n: int) -> AttributionGraph:
    """The targets, and the `n` other nodes of the most influence."""
    if n < 1:
        raise ValueError(f"n = {n} must be positive")
    scores = node_influence(graph)
    targets = graph.of_kind("logit")
    order = scores.masked_fill(targets, -1.0).argsort(descending=True, stable=True)
    nodes = targets.clone()
    nodes[order[: min(n, len(order) - int(targets.sum()))]] = True
    return graph.keeping(nodes)


def strongest(scores: Float[Tensor, "*any"], share: float) -> Bool[Tensor, "*any"]:
    """The largest scores that together make up a share of all; none that is 0."""
    ordered = scores.flatten().sort(descending=True).values
    total = ordered.sum()
    if not len(ordered) or float(total) <= 0 or share <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Rounding must not leave the last ones out where all are asked for.
    reached = ordered.cumsum(0) >= share * total * (1 - 1e-12)
    least = ordered[int(reached.to(torch.uint8).argmax())]
    return (scores >= least) & (scores > 0)


def _connected(
    graph: AttributionGraph, edges: Bool[Tensor, "target source"]
) -> Bool[Tensor, " node"]:
    """Nodes that still have edges out of them, and into them unless they are leaves."""
    stay = graph.of_kind("token", "logit")
    leaf = torch.tensor([node.is_leaf for node in graph.nodes], dtype=torch.bool)
    nodes = torch.ones(len(graph.nodes), dtype=torch.bool)
    while True:
        live = edges & nodes[:, None] & nodes[None, :]
        kept = stay | (nodes & live.any(0) & (live.any(1) | leaf))
        if torch.equal(kept, nodes):
            return nodes
        nodes = kept
