"""Attribution graphs as circuit-tracer and Neuronpedia read them (their JSON, schema version 1).

A folder holds `graph-metadata.json`, one `<slug>.json` for each graph, and `features/<number>.json`
with the examples of a head. `circuit-tracer start-server --graph_file_dir FOLDER` shows them, from
an environment of its own: circuit-tracer pins other releases than ours.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorsa_lens.interop.graph_parts import Example, Graph, Node
from lorsa_lens.interop.graph_schema import check_features, check_graph
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.io.sources import read_json

FEATURE_TYPES = {
    "head": "cross layer transcoder",  # the only type whose examples their page shows
    "feature": "cross layer transcoder",
    "attention_head": "attention head",
    "mlp": "mlp",
    "bias": "bias",
    "offset": "bias",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "position": "position",
    "logit": "logit",
}

FEATURES_FROM = 1_000_000
"""MLP features are numbered from here, Lorsa heads from 0: both may be active in one layer."""


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
        "scan": graph.scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.prompt_tokens),
        "prompt": "".join(graph.prompt_tokens),
        "schema_version": 1,
    }
    if graph.node_threshold is not None:
        metadata["node_threshold"] = graph.node_threshold
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
        "nodes": [_node_values(node, place, graph) for place, node in enumerate(graph.nodes)],
        "links": [
            {
                "source": node_id(link.source, graph.n_layers),
                "target": node_id(link.target, graph.n_layers),
                "weight": link.weight,
                **link.more,
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
    """A node's name in the files.

    Heads, features, tokens and logits are named as circuit-tracer names them. Its errors are not:
    `0_{layer}_{pos}` is also the name of a head of layer 0.
    """
    source = "" if node.source is None else f"_{node.source}"
    return {
        "head": f"{node.layer}_{node.index}_{node.pos}",
        "feature": f"{node.layer}_{FEATURES_FROM + node.index}_{node.pos}",
        "attention_head": f"attention_{node.layer}_{node.index}_{node.pos}{source}",
        "mlp": f"mlp_{node.layer}_{node.pos}",
        "offset": f"offset_{node.layer}_{node.pos}",
        "bias": f"bias_{node.module}_{node.layer}_{node.pos}",
        "error": f"error_{node.module}_{node.layer}_{node.pos}",
        "token": f"E_{node.index}_{node.pos}",
        "position": f"P_{node.pos}",
        "logit": f"{n_layers + 1}_{node.index}_{node.pos}",
    }[node.kind]


def cumulative(sizes: Sequence[float]) -> list[float]:
    """The share of the sum that each one and all larger ones have together: `Node.influence`."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    total = math.fsum(sizes) or 1.0
    found, reached = [0.0] * len(sizes), 0.0
    for i in order:
        reached += sizes[i] / total
        found[i] = min(1.0, reached)
    return found


def cantor(layer: int, head: int) -> int:
    """One number for a layer and a head: `(l + h)(l + h + 1) / 2 + h`, which their page undoes."""
    return (layer + head) * (layer + head + 1) // 2 + head


def _node_values(node: Node, place: int, graph: Graph) -> dict[str, Any]:
    layer = {"token": "E", "position": "E", "logit": str(graph.n_layers + 1)}.get(
        node.kind, str(node.layer)
    )
    label = node.label
    if node.kind == "logit":  # their page takes the label apart
        label = f'Output "{node.label}" (p={node.probability:.3f})'
    values = {
        "node_id": node_id(node, graph.n_layers),
        "feature": _number(node, place),
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": _feature_type(node),
        "token_prob": node.probability,
        "is_target_logit": node.is_target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{node.index}-{node.pos}",
        "clerp": label,
        "influence": node.influence,
        "activation": node.activation,
    }
    traced = graph.qk_tracing.get(node)
    if traced is not None:
        values["qk_tracing_results"] = {
            "pair_wise": [list(pair) for pair in traced.pairs],
            "top_q_marginal": [list(part) for part in traced.queries],
            "top_k_marginal": [list(part) for part in traced.keys],
        }
    return values


def _number(node: Node, place: int) -> int:
    """The feature number: their page joins labels of nodes that share layer, position and it."""
    numbers = {
        "head": cantor(node.layer, node.index),
        "feature": cantor(node.layer, FEATURES_FROM + node.index),
        "token": node.pos,
        "logit": node.index,
    }
    if node.kind == "error" and node.module == "mlp":
        return -1
    return numbers.get(node.kind, -2 - place)


def _feature_type(node: Node) -> str:
    if node.kind == "error" and node.module == "attn":
        return "attention reconstruction error"
    return FEATURE_TYPES[node.kind]


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
