"""A small attribution graph made by hand, whose tokens and labels would like to be markup."""

import torch

from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import AttributionGraph, Node, sorted_nodes
from lorsa_lens.views import Excerpt

TOKENS = ("<bos>", " Lily", " saw", "</script><b>x", "\n", " Tim", "\x07and", " Lily")
T = [Node("token", -1, pos, 100 + pos) for pos in range(8)]
POSITION = Node("position", -1, 7)
PREVIOUS, PREVIOUS2 = Node("head", 0, 2, 12), Node("head", 0, 2, 14)
INDUCTION, INDUCTION2 = Node("head", 1, 7, 42), Node("head", 1, 7, 43)
SAME, SINK = Node("head", 0, 7, 3), Node("head", 1, 7, 7)
MLP, FEATURE = Node("mlp", 0, 7), Node("feature", 1, 7, 42)  # of the number of INDUCTION
ERROR, BIAS = Node("error", 0, 7, module="attn"), Node("bias", 1, 7, module="mlp")
MLP_ERROR = Node("error", 0, 7, module="mlp")
ORIGINAL, ORIGINAL2 = Node("attention_head", 1, 7, 2, 0), Node("attention_head", 1, 7, 2, 3)
LOGIT = Node("logit", 2, 7, 317)

EDGES = [
    (T[1], PREVIOUS, 1.6), (T[1], PREVIOUS2, 0.6), (T[2], PREVIOUS, 0.2), (T[0], SINK, -0.8),
    (T[7], SAME, 1.0), (POSITION, SINK, 0.1), (T[7], MLP, 1.2), (SAME, MLP, 0.4),
    (PREVIOUS, INDUCTION, 2.1), (PREVIOUS2, INDUCTION, 0.7), (T[2], INDUCTION, 0.9),
    (T[2], INDUCTION2, 0.5), (PREVIOUS, INDUCTION2, -0.3), (SAME, INDUCTION, 0.3),
    (ERROR, FEATURE, 0.3), (MLP_ERROR, FEATURE, 0.2), (MLP, FEATURE, 0.8), (T[0], ORIGINAL, 0.5),
    (T[3], ORIGINAL2, 0.4), (INDUCTION, LOGIT, 3.0), (INDUCTION2, LOGIT, 1.1), (SINK, LOGIT, 0.9),
    (FEATURE, LOGIT, 0.7), (MLP, LOGIT, -0.4), (BIAS, LOGIT, 0.2), (ERROR, LOGIT, 0.15),
    (ORIGINAL, LOGIT, 0.1), (ORIGINAL2, LOGIT, 0.05),
]  # fmt: skip
LABELS = {
    PREVIOUS: "previous token", PREVIOUS2: "previous token", INDUCTION: "induction",
    INDUCTION2: "induction", SAME: "same <token>", LOGIT: ' s"aw',
}  # fmt: skip
SUPERNODES = {"previous <b>": (PREVIOUS, PREVIOUS2), "induction": (INDUCTION, INDUCTION2)}


def made_graph(edges, *, tokens=TOKENS, n_layers=2, **more):
    """A graph of edges `(source, target, weight)`; pre-activations are their sums and 0.03."""
    nodes = sorted_nodes(node for source, target, _ in edges for node in (source, target))
    place = {node: i for i, node in enumerate(nodes)}
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for source, target, weight in edges:
        matrix[place[target], place[source]] = weight
    leaf = torch.tensor([node.is_leaf for node in nodes])
    zero, one = torch.zeros(len(nodes), dtype=torch.float64), torch.ones(())
    constants = zero.masked_fill(~leaf, 0.05)
    missing = zero.masked_fill(~leaf, -0.02)
    total = torch.where(leaf, zero, matrix.sum(1) + constants + missing)
    return AttributionGraph(
        nodes=nodes,
        activations=torch.where(leaf, one.double(), total),
        edges=matrix,
        constants=constants,
        missing=missing,
        pre_activations=total,
        target_weights=torch.tensor([node.kind == "logit" for node in nodes]).double(),
        tokens=tokens,
        n_layers=n_layers,
        **more,
    )


def small_graph(**changes):
    """The graph of an induction circuit, with one node of every kind."""
    values = {
        "probabilities": {LOGIT: 0.93}, "labels": LABELS, "supernodes": SUPERNODES,
        "meta": {"model": "<i>hand-made</i>", "completeness": 0.97, "nested": {"x": 1}},
    }  # fmt: skip
    return made_graph(EDGES, **{**values, **changes})


def small_details(graph):
    """z patterns that sum to activations, a context, and QK tracing of the induction head."""

    def moved(node, source):
        pattern = [0.0] * len(TOKENS)
        pattern[0], pattern[source] = 0.25, graph.activations[graph.index(node)].item() - 0.25
        return pattern

    context = Excerpt(
        ["the", " cat", "</script>", " and", " the"], 4, 2.5, [0.0, 2.4, 0.1, 0.0, 0.0]
    )
    traced = {
        "pair_wise": [
            [SAME.id, PREVIOUS.id, 4.2],
            [T[7].id, PREVIOUS.id, 2.2],
            ["<i>other</i>", T[2].id, -0.4],
        ],
        "top_q_marginal": [[T[7].id, 3.3]],
        "top_k_marginal": [[PREVIOUS.id, 5.1]],
    }  # fmt: skip
    return Details(
        z_patterns={INDUCTION: moved(INDUCTION, 2), PREVIOUS: moved(PREVIOUS, 1)},
        contexts={(1, 42): [context, context]},
        qk={INDUCTION: traced},
    )
