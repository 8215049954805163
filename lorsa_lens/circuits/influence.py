"""Influence: how much of what is explained flows through a node or an edge, in shares of sizes.

With `N[t, s] = |edge[t, s]| / gross[t]` and the weights w of the targets, the influence of nodes is
`w N + w N^2 + w N^3 + ...` (Ameisen et al. 2025, "Circuit Tracing", appendix on pruning). A graph
has no cycles, so the sum ends.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph


def influence(
    effects: Float[Tensor, "row node"],
    gross: Float[Tensor, " row"],
    weights: Float[Tensor, " target"],
    columns: Int[Tensor, " unit"],
) -> Float[Tensor, " node"]:
    """Influence of nodes on targets, by the rows known so far.

    Args:
        effects: direct effects; the first rows are the targets', the others those of units.
        gross: what the sizes of each row are divided by.
        weights: of the targets.
        columns: which node each of the other rows is.
    """
    shares = effects.abs() / gross.clamp(min=torch.finfo(effects.dtype).tiny)[:, None]
    total = effects.new_zeros(effects.shape[1])
    flow = weights @ shares[: len(weights)]
    while bool(flow.any()):
        total += flow
        flow = flow[columns] @ shares[len(weights) :]
    return total


def shares(graph: AttributionGraph) -> Float[Tensor, "target source"]:
    """`N`: the share of every edge in the sizes of all that goes into its target."""
    assert graph.gross is not None  # it is made with the graph
    return graph.edges.abs() / graph.gross.clamp(min=torch.finfo(graph.edges.dtype).tiny)[:, None]


def node_influence(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """Influence of every node on the targets; of these themselves it is their own weight."""
    weights = graph.target_weights
    flow = total = weights
    normalized = shares(graph)
    while bool(flow.any()):
        flow = flow @ normalized
        total = total + flow
    return total


def edge_influence(graph: AttributionGraph) -> Float[Tensor, "target source"]:
    """The influence of every node, divided over what goes into it."""
    return node_influence(graph)[:, None] * shares(graph)
