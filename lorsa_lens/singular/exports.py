"""Circuits for other programs: NetworkX, GraphML, and the attribution graphs of circuit-tracer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.singular.graph import Circuit, Edge, Node

if TYPE_CHECKING:
    import networkx


def to_networkx(circuit: Circuit) -> "networkx.MultiDiGraph":
    """A directed multigraph: nodes by their `id`, edges by their side.

    Attributes of nodes: kind, layer, head, dest, src, label, attn; those that a node lacks are
    left out. Of edges: weight, side, vectors (a JSON list), n_prompts.

    Raises:
        ImportError: if NetworkX is missing.
    """
    try:
        import networkx
    except ImportError as error:  # pragma: no cover - torch requires it
        raise ImportError("this needs NetworkX: pip install networkx") from error
    graph = networkx.MultiDiGraph(tokens=json.dumps(list(circuit.tokens)))
    for node in circuit.nodes:
        values = {**node._asdict(), "label": node.label, "attn": circuit.attention.get(node)}
        graph.add_node(node.id, **{k: v for k, v in values.items() if v is not None})
    for edge in circuit.edges:
        graph.add_edge(
            edge.up.id,
            edge.down.id,
            key=edge.side,
            weight=edge.weight,
            side=edge.side,
            vectors=json.dumps(list(edge.vectors)),
            n_prompts=edge.n_prompts,
        )
    return graph


def save_graphml(circuit: Circuit, path: str | Path) -> Path:
    """Write a GraphML file, atomically: for Cytoscape, Gephi, yEd."""
    graph = to_networkx(circuit)
    import networkx

    with atomic_write(Path(path)) as temporary:
        networkx.write_graphml_xml(graph, temporary)
    return Path(path)


def to_circuit_tracer(circuit: Circuit, *, slug: str, scan: str = "lorsa-lens") -> dict[str, Any]:
    """The graph as circuit-tracer's JSON: `metadata`, `qParams`, `nodes`, `links`.

    Attention heads stand as nodes of feature type `lorsa`, at the context index of their
    destination; the root as a `logit`.

    Args:
        circuit: of one prompt.
        slug: the graph's name.
        scan: the name of the model, in its vocabulary.

    Raises:
        ValueError: if it is a merged circuit, which has no prompt.
    """
    if not circuit.tokens:
        raise ValueError("circuit has no tokens: merged circuits have no prompt to show")
    influence: dict[Node, float] = {}
    for edge in circuit.edges:
        influence[edge.up] = influence.get(edge.up, 0.0) + abs(edge.weight)
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "prompt_tokens": list(circuit.tokens),
            "prompt": "".join(circuit.tokens),
            "schema_version": 1,
            "info": {"generator": {"name": "lorsa-lens"}},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": None},
        "nodes": [_tracer_node(circuit, node, influence) for node in circuit.nodes],
        "links": [_tracer_link(edge) for edge in circuit.edges],
    }


def save_circuit_tracer(
    circuit: Circuit, path: str | Path, *, slug: str, scan: str = "lorsa-lens"
) -> Path:
    """Write `to_circuit_tracer` as a file, atomically."""
    values = to_circuit_tracer(circuit, slug=slug, scan=scan)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


_FEATURE_TYPES = {
    "root": "logit",
    "head": "lorsa",
    "mlp": "mlp reconstruction error",
    "bias": "bias",
    "offset": "bias",
}


def _tracer_node(circuit: Circuit, node: Node, influence: dict[Node, float]) -> dict[str, Any]:
    source = "" if node.src in (None, node.dest) else f" from {circuit.tokens[node.src]!r}"
    return {
        "node_id": node.id,
        "feature": node.head,
        "layer": str(node.layer) if node.kind in ("head", "mlp", "bias", "root") else "E",
        "ctx_idx": node.dest,
        "feature_type": _FEATURE_TYPES.get(node.kind, "embedding"),
        "jsNodeId": node.id,
        "clerp": f"{node.label} at {circuit.tokens[node.dest]!r}{source}",
        "influence": influence.get(node, 0.0),
        "activation": circuit.attention.get(node),
        "is_target_logit": node.kind == "root",
        "token_prob": 0.0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _tracer_link(edge: Edge) -> dict[str, Any]:
    return {
        "source": edge.up.id,
        "target": edge.down.id,
        "weight": edge.weight,
        "side": edge.side,
        "vectors": list(edge.vectors),
    }
