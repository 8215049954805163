"""Attribution graphs for other programs: NetworkX, GraphML, circuit-tracer and Neuronpedia."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens import interop
from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import node_influence
from lorsa_lens.circuits.names import long_name, short_name
from lorsa_lens.interop.graph_json import cumulative, node_id, save_graph
from lorsa_lens.io.atomic import atomic_write

if TYPE_CHECKING:
    import networkx

N_PINNED = 12
"""Nodes that circuit-tracer's page begins with, where there are no supernodes: the strongest."""


def to_networkx(graph: AttributionGraph) -> "networkx.DiGraph":
    """A directed graph: nodes by their `id`, edges from source to target with their `weight`.

    Attributes of nodes: kind, layer, pos, index, source, module, token, name, label, activation,
    pre_activation, influence, probability, supernode; those that a node lacks are left out.

    Raises:
        ImportError: if NetworkX is missing.
    """
    try:
        import networkx
    except ImportError as error:  # pragma: no cover - torch requires it
        raise ImportError("this needs NetworkX: pip install networkx") from error
    made = networkx.DiGraph()
    home = {node: name for name, group in graph.supernodes.items() for node in group}
    influence = node_influence(graph).tolist()
    for i, node in enumerate(graph.nodes):
        values = {
            **node._asdict(),
            "token": graph.tokens[node.pos] if graph.tokens else None,
            "name": short_name(graph, node),
            "label": graph.labels.get(node),
            "activation": float(graph.activations[i]),
            "pre_activation": None if node.is_leaf else float(graph.pre_activations[i]),
            "influence": influence[i],
            "probability": graph.probabilities.get(node),
            "supernode": home.get(node),
        }
        made.add_node(node.id, **{name: v for name, v in values.items() if v is not None})
    targets, sources = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[targets, sources].tolist()
    ends = zip(sources.tolist(), targets.tolist(), weights, strict=True)
    made.add_weighted_edges_from((graph.nodes[s].id, graph.nodes[t].id, w) for s, t, w in ends)
    return made


def save_graphml(graph: AttributionGraph, path: str | Path) -> Path:
    """Write a GraphML file, atomically: for Cytoscape, Gephi, yEd.

    Control characters, which XML cannot hold, are written as spaces in names and tokens.
    """
    made = to_networkx(graph)
    import networkx

    for values in made.nodes.values():
        values.update({name: _xml(v) for name, v in values.items() if isinstance(v, str)})
    with atomic_write(Path(path)) as temporary:
        networkx.write_graphml_xml(made, temporary)
    return Path(path)


def to_circuit_tracer(
    graph: AttributionGraph, *, slug: str, details: Details | None = None
) -> interop.Graph:
    """The graph in circuit-tracer's form; `lorsa_lens.interop.save_graph` writes it.

    Args:
        graph: of one prompt.
        slug: its file's name: letters, digits, `-` and `_`.
        details: of it, QK tracing is kept with the heads.

    Raises:
        ValueError: if the graph has no prompt, or the details are not of its nodes.
    """
    if not graph.tokens:
        raise ValueError("the graph has no tokens: their page shows a graph below its prompt")
    details = details or Details()
    details.check(graph)
    influence = node_influence(graph)
    reached = cumulative(influence.tolist())
    shown = {node: _node(graph, node, i, reached[i]) for i, node in enumerate(graph.nodes)}
    targets, sources = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[targets, sources].tolist()
    links = [
        interop.Link(source=shown[graph.nodes[s]], target=shown[graph.nodes[t]], weight=weight)
        for s, t, weight in zip(sources.tolist(), targets.tolist(), weights, strict=True)
    ]
    grouped = [node for group in graph.supernodes.values() for node in group]
    strongest = [graph.nodes[i] for i in influence.argsort(descending=True)[:N_PINNED].tolist()]
    pinned = dict.fromkeys([*grouped, *graph.targets] if grouped else strongest)
    names = {node.id: node_id(shown[node], graph.n_layers) for node in graph.nodes}
    return interop.Graph(
        slug=slug,
        prompt_tokens=graph.tokens,
        n_layers=graph.n_layers,
        nodes=list(shown.values()),
        links=links,
        node_threshold=1.0,
        pinned=[shown[node] for node in pinned],
        supernodes={
            name: [shown[node] for node in group] for name, group in graph.supernodes.items()
        },
        qk_tracing={
            shown[node]: interop.QKTracing(
                pairs=_renamed(traced["pair_wise"], names),
                queries=_renamed(traced["top_q_marginal"], names),
                keys=_renamed(traced["top_k_marginal"], names),
            )
            for node, traced in details.qk.items()
        },
    )


def save_circuit_tracer(
    graph: AttributionGraph, folder: str | Path, *, slug: str, details: Details | None = None
) -> Path:
    """Write a folder that `circuit-tracer start-server --graph_file_dir FOLDER` shows.

    The file of a head holds its z patterns on this prompt, then its contexts.

    Args:
        graph: of one prompt; `prune` it first: their page draws every node.
        folder: where to; graphs that it holds already stay.
        slug: the graph's name there: letters, digits, `-` and `_`.
        details: z patterns, contexts and QK tracing of its heads.

    Raises:
        ValueError: as `to_circuit_tracer`; nothing is written then.

    Returns:
        The graph's file.
    """
    details = details or Details()
    written = to_circuit_tracer(graph, slug=slug, details=details)
    examples: dict[tuple[int, int], list[interop.Example]] = {}
    for node in sorted(details.z_patterns, key=lambda node: node.order):
        own = interop.Example(
            tokens=graph.tokens, z_pattern=details.z_patterns[node], query=node.pos
        )
        examples.setdefault((node.layer, node.index), []).append(own)
    for head, excerpts in details.contexts.items():
        examples.setdefault(head, []).extend(
            interop.Example(tokens=one.tokens, z_pattern=one.z_pattern, query=one.query)
            for one in excerpts
        )
    return save_graph(folder, written, examples=examples)


def _node(graph: AttributionGraph, node: Node, i: int, reached: float) -> interop.Node:
    kind: Any = node.kind
    label = short_name(graph, node) if node.kind == "logit" else long_name(graph, node)
    return interop.Node(
        kind=kind,
        pos=node.pos,
        layer=max(node.layer, 0),
        index=node.index,
        source=node.source,
        module=node.module or "mlp",
        label=graph.labels.get(node, label) if node.kind == "logit" else label,
        influence=reached,
        activation=None if node.kind == "logit" else float(graph.activations[i]),
        probability=graph.probabilities.get(node, 0.0),
        is_target=node.kind == "logit",
    )


def _renamed(entries: Sequence[Sequence[Any]], names: dict[str, str]) -> list[Any]:
    """Entries of QK tracing, with nodes of the graph by the names that the file gives them."""
    return [(*(names.get(name, name) for name in ends), value) for *ends, value in entries]


def _xml(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
