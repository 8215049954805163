"""Attribution graphs as circuit-tracer and Neuronpedia read them (their JSON, schema version 1).

A folder holds `graph-metadata.json`, one `<slug>.json` for each graph, and `features/<number>.json`
with the examples of a head. `circuit-tracer start-server --graph_file_dir FOLDER` shows them, from
an environment of its own: circuit-tracer pins other releases than ours.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorsa_lens.interop.graph_schema import check_features, check_graph
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.io.sources import read_json

NodeKind = Literal["head", "error", "token", "logit"]

FEATURE_TYPES = {
    "head": "cross layer transcoder",  # the only type whose examples their page shows
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph."""

    kind: NodeKind
    """`head` (of a Lorsa, or any feature), `error`, `token` or `logit`."""

    pos: int
    """Position in the prompt."""

    layer: int = 0
    """Of a head or an error; 0 for others."""

    index: int = 0
    """Of a head: which; of a token or a logit: its token id."""

    label: str = ""
    """For people. Of a logit: the token's string."""

    influence: float | None = None
    """Share of all influence that this node and the stronger ones have together, 0 to 1."""

    activation: float | None = None
    """Of a head."""

    probability: float = 0.0
    """Of a logit."""

    is_target: bool = False
    """Of a logit: whether the graph was traced from it."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The direct effect of one node on another."""

    source: Node
    target: Node
    weight: float
    """Signed."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An attribution graph of one prompt."""

    slug: str
    """Its file's name: letters, digits, `-` and `_`."""

    prompt_tokens: Sequence[str]
    """The prompt, token by token."""

    n_layers: int
    """Of the model: logits are drawn above them."""

    nodes: Sequence[Node]
    links: Sequence[Link]

    node_threshold: float | None = None
    """The share of influence that pruning kept; their page then shows a slider."""

    pinned: Sequence[Node] = field(default=())
    """Nodes that the page begins with."""

    supernodes: Mapping[str, Sequence[Node]] = field(default_factory=dict)
    """Groups of nodes by name."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context of a head: what each source token gives to its activation at one token."""

    tokens: Sequence[str]
    """The context."""

    z_pattern: Sequence[float]
    """`A[q, k] v[k]` at the shown token, over all tokens."""

    query: int
    """Which token that is."""


def save_graph(
    folder: str | Path,
    graph: Graph,
    *,
    examples: Mapping[tuple[int, int], Sequence[Example]] | None = None,
) -> Path:
    """Write a graph, and the examples of its heads, for circuit-tracer's page.

    Graphs that the folder holds already stay; one of the same slug is replaced.

    Args:
        folder: where to.
        graph: what to write.
        examples: by layer and head, contexts of heads, strongest first.

    Raises:
        ValueError: if it is none that their page can draw; nothing is written then.

    Returns:
        The graph's file.
    """
    folder = Path(folder)
    values = graph_values(graph)
    check_graph(values)
    features = {
        cantor(layer, head): feature_values(layer, head, shown)
        for (layer, head), shown in (examples or {}).items()
    }
    for feature in features.values():
        check_features(feature)
    index = folder / "graph-metadata.json"
    others = read_json(index).get("graphs", []) if index.is_file() else []
    others = [other for other in others if other.get("slug") != graph.slug]
    for number, feature in features.items():
        _write(folder / "features" / f"{number}.json", feature)
    _write(folder / f"{graph.slug}.json", values)
    _write(index, {"graphs": [*others, values["metadata"]]})
    return folder / f"{graph.slug}.json"


def graph_values(graph: Graph) -> dict[str, Any]:
    """The content of a graph's file."""
    metadata: dict[str, Any] = {
        "slug": graph.slug,
        "scan": "./data/features",  # so that their server delivers `features/` of this folder
        "transcoder_list": [],
        "prompt_tokens": list(graph.prompt_tokens),
        "prompt": "".join(graph.prompt_tokens),
        "schema_version": 1,
    }
    if graph.node_threshold is not None:
        metadata["node_threshold"] = graph.node_threshold
    ids = {node: node_id(node, graph.n_layers) for node in graph.nodes}
    return {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [node_id(node, graph.n_layers) for node in graph.pinned],
            "supernodes": [
                [name, *(node_id(node, graph.n_layers) for node in nodes)]
                for name, nodes in graph.supernodes.items()
            ],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node_values(node, ids[node], graph) for node in graph.nodes],
        "links": [
            {
                "source": node_id(link.source, graph.n_layers),
                "target": node_id(link.target, graph.n_layers),
                "weight": link.weight,
            }
            for link in graph.links
        ],
    }


def feature_values(layer: int, head: int, examples: Sequence[Example]) -> dict[str, Any]:
    """The content of a head's file: its contexts, each coloured by the z pattern of one token."""
    sums = [math.fsum(example.z_pattern) for example in examples]
    return {
        "transcoder_id": f"lorsa.{layer}",
        "index": cantor(layer, head),
        "examples_quantiles": [
            {
                "quantile_name": "z pattern: what each token gives to the marked one",
                "examples": [
                    {
                        "tokens": list(example.tokens),
                        "tokens_acts_list": [float(value) for value in example.z_pattern],
                        "train_token_ind": example.query,
                        "is_repeated_datapoint": False,
                    }
                    for example in examples
                ],
            }
        ],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": min(sums, default=0.0),
        "act_max": max(sums, default=0.0),
        "quantile_values": [],
        "histogram": [],
        "activation_frequency": 0.0,
    }


def node_id(node: Node, n_layers: int) -> str:
    """A node's name in the files."""
    return {
        "head": f"{node.layer}_{node.index}_{node.pos}",
        "error": f"0_{node.layer}_{node.pos}",
        "token": f"E_{node.index}_{node.pos}",
        "logit": f"{n_layers + 1}_{node.index}_{node.pos}",
    }[node.kind]


def cantor(layer: int, head: int) -> int:
    """One number for a layer and a head: `(l + h)(l + h + 1) / 2 + h`, which their page undoes."""
    return (layer + head) * (layer + head + 1) // 2 + head


def _node_values(node: Node, name: str, graph: Graph) -> dict[str, Any]:
    layer = {"token": "E", "logit": str(graph.n_layers + 1)}.get(node.kind, str(node.layer))
    feature = {"head": cantor(node.layer, node.index), "error": -1, "token": node.pos}
    label = node.label
    if node.kind == "logit":  # their page takes the label apart
        label = f'Output "{node.label}" (p={node.probability:.3f})'
    return {
        "node_id": name,
        "feature": feature.get(node.kind, node.index),
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": FEATURE_TYPES[node.kind],
        "token_prob": node.probability,
        "is_target_logit": node.is_target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{node.index}-{node.pos}",
        "clerp": label,
        "influence": node.influence,
        "activation": node.activation,
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
