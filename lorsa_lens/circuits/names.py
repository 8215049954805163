"""What people read for a node: short on a picture, long in a sentence."""

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.views.tokens import display_token


def short_name(graph: AttributionGraph, node: Node) -> str:
    """As `L1.42` (Lorsa head), `L1H3` (attention head), `L1 f7` (feature), `MLP 1`, `·the`."""
    if node.kind == "token":
        return display_token(graph.tokens[node.pos])
    if node.kind == "logit":
        label = graph.labels.get(node, f"target {node.index}")
        parts = label.split(" - ") if node not in graph.probabilities else [label]
        return " - ".join(map(display_token, parts))  # a difference of two tokens, or one
    if node.kind == "attention_head":
        source = "" if node.source is None else f"←{node.source}"
        return f"L{node.layer}H{node.index}{source}"
    module = {"attn": " attn", "mlp": " MLP", None: ""}[node.module]
    return {
        "position": f"position {node.pos}",
        "head": f"L{node.layer}.{node.index}",
        "feature": f"L{node.layer} f{node.index}",
        "mlp": f"MLP {node.layer}",
        "bias": f"bias{module} {node.layer}",
        "error": f"error{module} {node.layer}",
    }[node.kind]


def long_name(graph: AttributionGraph, node: Node) -> str:
    """As `L1.42 (induction) at ·the (7)`: with its label, its token and its position."""
    label = graph.labels.get(node)
    named = "" if label is None or node.kind in ("token", "logit") else f" ({label})"
    name = f"{short_name(graph, node)}{named}"
    if node.kind == "token":
        return f"token {name} ({node.pos})"
    if node.kind == "position":
        return name
    said = "logit of " if node.kind == "logit" else ""
    return f"{said}{name} at {display_token(graph.tokens[node.pos])} ({node.pos})"
