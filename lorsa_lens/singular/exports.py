"""Circuits for other programs: NetworkX, GraphML, and the attribution graphs of circuit-tracer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens import interop
from lorsa_lens.interop.graph_json import cumulative, graph_values
from lorsa_lens.interop.graph_parts import NodeKind
from lorsa_lens.interop.graph_schema import check_graph
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.singular.graph import Circuit, Node

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

    A node's influence is made of the weights of the edges out of it. Links also hold `side` and
    `vectors`.

    Args:
        circuit: of one prompt.
        slug: the graph's name: letters, digits, `-` and `_`.
        scan: the name of the model, in its vocabulary.

    Raises:
        ValueError: if it is a merged circuit, which has no prompt, or the slug is no plain name.
    """
    if not circuit.tokens:
        raise ValueError("circuit has no tokens: merged circuits have no prompt to show")
    weights = dict.fromkeys(circuit.nodes, 0.0)
    for edge in circuit.edges:
        weights[edge.up] += abs(edge.weight)
    influence = cumulative(list(weights.values()))
    shown = {
        node: _tracer_node(circuit, node, reached)
        for node, reached in zip(weights, influence, strict=True)
    }
    links = [
        interop.Link(
            source=shown[edge.up],
            target=shown[edge.down],
            weight=edge.weight,
            more={"side": edge.side, "vectors": list(edge.vectors)},
        )
        for edge in circuit.edges
    ]
    values = graph_values(
        interop.Graph(
            slug=slug,
            prompt_tokens=circuit.tokens,
            n_layers=max(node.layer for node in circuit.nodes),
            nodes=list(shown.values()),
            links=links,
            scan=scan,
        )
    )
    check_graph(values)
    return values


def save_circuit_tracer(
    circuit: Circuit, path: str | Path, *, slug: str, scan: str = "lorsa-lens"
) -> Path:
    """Write `to_circuit_tracer` as a file, atomically."""
    values = to_circuit_tracer(circuit, slug=slug, scan=scan)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


_KINDS: dict[str, NodeKind] = {
    "root": "logit",
    "head": "attention_head",
    "mlp": "mlp",
    "bias": "bias",
    "offset": "offset",
    "position": "position",
}


def _tracer_node(circuit: Circuit, node: Node, influence: float) -> interop.Node:
    source = "" if node.src in (None, node.dest) else f" from {circuit.tokens[node.src]!r}"
    label = f"{node.label} at {circuit.tokens[node.dest]!r}{source}"
    is_root = node.kind == "root"
    return interop.Node(
        kind=_KINDS.get(node.kind, "token"),
        pos=node.dest,
        layer=node.layer,
        index=node.head or 0,
        source=node.src if node.kind == "head" else None,
        module="attn",
        label=str(circuit.meta.get("answer", "traced")) if is_root else label,
        influence=influence,
        activation=circuit.attention.get(node),
        is_target=is_root,
    )
