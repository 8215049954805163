"""What the page of a graph draws, as JSON values; and how large a graph may be."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.attention_links import attention_links
from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import edge_influence, node_influence
from lorsa_lens.circuits.names import long_name, short_name
from lorsa_lens.interop.graph_json import cumulative
from lorsa_lens.views.tokens import display_tokens

MAX_NODES = 2000
"""Nodes of one page."""

MAX_EDGES = 40_000
"""Edges of one page."""

FIRST_NODES, FIRST_EDGES = 32, 60
"""The page opens with about so many: the strongest. Its sliders show the others."""

KIND_NAMES = {
    "token": "token embedding",
    "position": "position embedding",
    "head": "Lorsa head",
    "attention_head": "original attention head",
    "bias": "bias",
    "error": "error: what the Lorsa or transcoder leaves out",
    "feature": "MLP feature",
    "mlp": "MLP, linearised at the prompt",
    "logit": "output",
}


def page_values(graph: AttributionGraph, details: Details | None = None) -> dict[str, Any]:
    """Nodes, edges and what goes with them.

    Raises:
        ValueError: if the graph is empty, or too large to be drawn.
    """
    n_edges = int((graph.edges != 0).sum())
    if not graph.nodes:
        raise ValueError("the graph has no nodes: nothing to draw")
    if len(graph.nodes) > MAX_NODES or n_edges > MAX_EDGES:
        raise ValueError(
            f"the graph has {len(graph.nodes)} nodes and {n_edges} edges; a page holds at most "
            f"{MAX_NODES} and {MAX_EDGES}. Prune it first: prune(graph, node_threshold=0.8)"
        )
    total = float(graph.target_weights.abs().sum()) or 1.0
    influence, flow = node_influence(graph) / total, edge_influence(graph) / total
    before = _stronger_before(influence)
    targets, sources = graph.edges.nonzero(as_tuple=True)
    flows = flow[targets, sources]
    edges_before = _stronger_before(flows)
    signs = graph.edges[targets, sources].sign()
    edges = [
        {"source": s, "target": t, "weight": w, "flow": _short(f), "before": b}
        for s, t, w, f, b in zip(
            sources.tolist(),
            targets.tolist(),
            map(_short, graph.edges[targets, sources].tolist()),
            (flows * signs).tolist(),
            map(_short, edges_before.tolist()),
            strict=True,
        )
    ]
    rows = zip(graph.nodes, influence.tolist(), before.tolist(), strict=True)
    positions = graph.positions_of
    return {
        "tokens": display_tokens(graph.tokens),
        "n_layers": graph.n_layers,
        "nodes": [_node_values(graph, node, *numbers) for node, *numbers in rows],
        "edges": edges,
        "supernodes": [
            [name, [positions[node] for node in group]] for name, group in graph.supernodes.items()
        ],
        "attends": [
            {
                "source": positions[link.source],
                "target": positions[link.target],
                "side": link.side,
                "value": _short(link.value),
            }
            for link in attention_links(graph, (details or Details()).qk)
        ],
        "nodes_first": _percent_of(before, FIRST_NODES),
        "edges_first": _percent_of(edges_before, FIRST_EDGES),
    }


def _stronger_before(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The share of the sum that larger ones have together: 0 for the largest."""
    reached = sizes.new_tensor(cumulative(sizes.tolist()))
    return (reached - sizes / sizes.sum().clamp(min=1e-300)).clamp(min=0.0)


def _percent_of(before: Float[Tensor, " n"], n: int) -> int:
    """The whole percentage at which about the first `n` are shown."""
    if len(before) <= n:
        return 100
    return min(99, max(1, int(100 * float(before.sort().values[n]))))


def row_of(node: Node, n_layers: int) -> int:
    """Tokens stand in row -1, then attention and MLP of each layer, then what is said."""
    if node.kind in ("token", "position"):
        return -1
    if node.kind == "logit":
        return 2 * n_layers
    mlp = node.kind in ("feature", "mlp") or node.module == "mlp"
    return 2 * node.layer + mlp


def _node_values(
    graph: AttributionGraph, node: Node, influence: float, before: float
) -> dict[str, Any]:
    i = graph.index(node)
    assert graph.gross is not None  # it is made with the graph
    return {
        "id": node.id,
        "kind": node.kind,
        "row": row_of(node, graph.n_layers),
        "pos": node.pos,
        "name": _picture_name(graph, node),
        "title": long_name(graph, node),
        "label": graph.labels.get(node),
        "head": f"{node.layer}.{node.index}" if node.kind == "head" else None,
        "leaf": node.is_leaf,
        "probability": graph.probabilities.get(node),
        "influence": _short(influence),
        "before": _short(before),
        "value": _short(float(graph.activations[i])),
        "pre": _short(float(graph.pre_activations[i])),
        "constant": _short(float(graph.constants[i])),
        "missing": _short(float(graph.missing[i])),
        "gross": _short(float(graph.gross[i])),
    }


def _picture_name(graph: AttributionGraph, node: Node) -> str:
    name = short_name(graph, node)
    probability = graph.probabilities.get(node)
    return name if probability is None else f"{name} {probability:.0%}"


def _short(value: float) -> float:
    """Six significant digits: pages stay small."""
    return float(f"{value:.6g}")
