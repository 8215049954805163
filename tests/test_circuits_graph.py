"""Graphs as data, made by hand: files, influence, pruning, scores, groups."""

import json
from dataclasses import replace

import jaxtyping
import pytest
import torch

from lorsa_lens.circuits import (
    AttributionGraph,
    Node,
    agreement,
    edge_influence,
    graph_scores,
    group_by_label,
    node_influence,
    nodes_for,
    prune,
    stability,
    supernode_graph,
    top_nodes,
    with_supernodes,
)

TOKEN, POSITION = Node("token", -1, 0, 7), Node("position", -1, 0)
LOW, ERROR = Node("head", 0, 1, 3), Node("error", 0, 1, module="attn")
HIGH, OTHER = Node("head", 1, 2, 5), Node("feature", 1, 2, 9)
FIRST, SECOND = Node("logit", 2, 2, 11), Node("logit", 2, 2, 12)
NODES = (TOKEN, POSITION, ERROR, LOW, HIGH, OTHER, FIRST, SECOND)
EDGES = {
    (TOKEN, LOW): 2.0, (POSITION, LOW): -1.0, (LOW, HIGH): 3.0, (ERROR, HIGH): 1.0,
    (TOKEN, OTHER): 0.5, (HIGH, FIRST): 4.0, (OTHER, FIRST): -1.0, (ERROR, SECOND): 2.0,
    (HIGH, SECOND): 2.0,
}  # fmt: skip


def graph(weights=(0.75, 0.25), nodes=NODES, edges=EDGES):
    nodes = tuple(sorted(nodes, key=lambda node: node.order))
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for (source, target), weight in edges.items():
        matrix[nodes.index(target), nodes.index(source)] = weight
    zeros = torch.zeros(len(nodes), dtype=torch.float64)
    target_weights = zeros.clone()
    target_weights[-2:] = torch.tensor(weights, dtype=torch.float64)
    return AttributionGraph(
        nodes=nodes,
        activations=torch.arange(1, len(nodes) + 1, dtype=torch.float64),
        edges=matrix,
        constants=zeros,
        missing=zeros,
        pre_activations=matrix.sum(1),
        target_weights=target_weights,
        probabilities={FIRST: 0.6, SECOND: 0.2},
        tokens=("a", "b", "c"),
        n_layers=2,
        labels={HIGH: "induction"},
        meta={"model": "by hand"},
    )


# --------------------------------------------------------------------------------------- as data


def test_nodes_have_ids_and_an_order():
    assert HIGH.id == "head.L1.5@2"
    assert Node("attention_head", 0, 7, 2, source=4).id == "attention-head.L0.2@7.4"
    assert Node("bias", 1, 7, module="mlp").id == "bias.L1.mlp@7"
    assert TOKEN.id == "token@0"
    assert FIRST.id == "logit.11@2"
    assert Node("mlp", 3, 5).id == "mlp.L3@5"
    after_attention = [Node("head", 0, 9, 4), Node("error", 0, 1, module="mlp"), Node("mlp", 0, 2)]
    assert sorted(after_attention[::-1], key=lambda node: node.order) == after_attention
    assert TOKEN.is_leaf
    assert not HIGH.is_leaf
    assert HIGH.is_attention


def test_a_graph_is_saved_and_loaded(tmp_path):
    made = with_supernodes(graph(), {"both": [LOW, HIGH]})
    loaded = AttributionGraph.load(made.save(tmp_path / "folder" / "graph.json"))
    for name in ("edges", "activations", "constants", "missing", "gross", "target_weights"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    for name in ("nodes", "tokens", "n_layers", "labels", "probabilities", "supernodes", "meta"):
        assert getattr(loaded, name) == getattr(made, name)
    assert loaded.edge(LOW, HIGH) == 3.0
    assert loaded.node("head.L1.5@2") == HIGH
    assert repr(loaded) == "AttributionGraph(n_nodes=8, n_edges=9)"


def test_what_is_no_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no JSON"):
        AttributionGraph.load(_written(tmp_path, "{"))
    with pytest.raises(ValueError, match="holds a list, no graph"):
        AttributionGraph.load(_written(tmp_path, "[]"))
    with pytest.raises(ValueError, match="a graph has 'lorsa-lens/attribution-graph'"):
        AttributionGraph.from_dict({"format": "else"})
    values = graph().to_dict()
    with pytest.raises(ValueError, match="Upgrade lorsa_lens"):
        AttributionGraph.from_dict({**values, "format_version": 99})
    strange = json.loads(json.dumps(values))
    strange["nodes"][0]["kind"] = "neuron"
    with pytest.raises(ValueError, match="a node has kind 'neuron'"):
        AttributionGraph.from_dict(strange)
    with pytest.raises(ValueError, match="nodes must be sorted"):
        replace(graph(), nodes=NODES[::-1])
    with pytest.raises(ValueError, match=r"head\.L4\.0@0 is named, but is no node"):
        replace(graph(), labels={Node("head", 4, 0): "none"})
    with pytest.raises(ValueError, match="the graph has no node 'x'"):
        graph().node("x")
    with pytest.raises(ValueError, match=r"head\.L4\.0@0 is no node of the graph"):
        graph().index(Node("head", 4, 0))


def test_columns_of_another_length_are_refused(monkeypatch):
    made = graph()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"activations has shape \[3\], but there are 8 nodes"):
        replace(made, activations=torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"edges has shape \[2, 8\]: \[8, 8\] for 8 nodes"):
        replace(made, edges=made.edges[:2], gross=None)


def _written(folder, text):
    path = folder / "broken.json"
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------- influence, pruning


def total_influence(made):
    """By the inverse instead of the series: `w (I - N)^-1`."""
    normalized = made.edges.abs() / made.gross.clamp(min=1e-30)[:, None]
    eye = torch.eye(len(made.nodes), dtype=torch.float64)
    return made.target_weights @ torch.linalg.inv(eye - normalized), normalized


def test_influence_by_the_inverse():
    made = graph()
    expected, normalized = total_influence(made)
    torch.testing.assert_close(node_influence(made), expected)
    torch.testing.assert_close(edge_influence(made), expected[:, None] * normalized)
    by_hand = 0.75 * 4 / 5 + 0.25 * 2 / 4
    assert node_influence(made)[made.index(HIGH)] == pytest.approx(by_hand)


def test_scores_are_those_of_circuit_tracer():
    made = graph()
    total, normalized = total_influence(made)
    errors = made.of_kind("error")
    inputs = made.of_kind("token", "position")
    replacement = total[inputs].sum() / (total[inputs].sum() + total[errors].sum())
    completeness = ((1 - normalized[:, errors].sum(1)) * total).sum() / total.sum()
    scores = graph_scores(made)
    assert scores.replacement == pytest.approx(float(replacement))
    assert scores.completeness == pytest.approx(float(completeness))
    assert 0 < scores.completeness < 1


def test_what_is_missing_is_not_complete():
    made = graph()
    whole = graph_scores(made).completeness
    fewer = made.keeping(torch.tensor([node != OTHER for node in made.nodes]))
    assert graph_scores(fewer).completeness < whole
    assert fewer.missing[fewer.index(FIRST)] == -1.0
    torch.testing.assert_close(
        fewer.edges.sum(1) + fewer.missing + fewer.constants, fewer.pre_activations
    )


def test_pruning_by_hand():
    made = graph()
    assert len(prune(made, node_threshold=1.0, edge_threshold=1.0).nodes) == len(NODES)
    small = prune(made, node_threshold=0.7, edge_threshold=1.0)
    assert OTHER not in small.nodes  # the weakest: 0.75 / 5
    assert {TOKEN, LOW, HIGH, FIRST, SECOND} <= set(small.nodes)
    assert small.meta["node_threshold"] == 0.7
    # Without the edge from LOW, nothing goes out of TOKEN and LOW; TOKEN stays, LOW does not.
    tiny = prune(made, node_threshold=1.0, edge_threshold=0.5)
    assert set(tiny.nodes) == {TOKEN, LOW, HIGH, FIRST, SECOND}
    assert tiny.edge(LOW, HIGH) == 3.0
    assert tiny.edge(HIGH, SECOND) == 0.0
    bare = prune(made, node_threshold=1.0, edge_threshold=0.0)
    assert set(bare.nodes) == {TOKEN, FIRST, SECOND}
    with pytest.raises(ValueError, match=r"node_threshold = 1\.5: a share of all influence"):
        prune(made, node_threshold=1.5)


def test_top_nodes_and_how_many_suffice():
    made = graph()
    assert set(top_nodes(made, 1).nodes) == {HIGH, FIRST, SECOND}
    assert len(top_nodes(made, 99).nodes) == len(NODES)
    needed = nodes_for(made, 0.6)
    assert graph_scores(top_nodes(made, needed)).completeness >= 0.6
    assert graph_scores(top_nodes(made, needed - 1)).completeness < 0.6
    assert nodes_for(made, 0.99) is None  # there are errors
    with pytest.raises(ValueError, match="n = 0 must be positive"):
        top_nodes(made, 0)
    with pytest.raises(ValueError, match="completeness = 2"):
        nodes_for(made, 2.0)


# ------------------------------------------------------------------------- paraphrases and groups


def test_stability_of_paraphrases():
    one = graph()
    other = graph(nodes=[node for node in NODES if node != OTHER],
                  edges={pair: w for pair, w in EDGES.items() if OTHER not in pair})  # fmt: skip
    moved = stability([one, one])
    assert (moved.units, moved.edges, moved.n_graphs) == (1.0, 1.0, 2)
    differing = stability([one, other])
    assert differing.units == pytest.approx(4 / 5)  # LOW, HIGH, FIRST, SECOND of these and OTHER
    assert differing.edges == pytest.approx(3 / 4)
    assert stability([one, other, one]).units == pytest.approx((4 / 5 + 1 + 4 / 5) / 3)
    with pytest.raises(ValueError, match="graphs has 1"):
        stability([one])


def test_groups_by_hand_and_by_label():
    made = with_supernodes(graph(), {"up": [LOW, HIGH], "inputs": [TOKEN, POSITION]})
    grouped = supernode_graph(made)
    up, inputs = grouped.names.index("up"), grouped.names.index("inputs")
    assert grouped.edges[up, inputs] == 1.0  # 2 - 1
    assert grouped.edges[up, up] == 3.0
    assert grouped.edges[grouped.names.index(FIRST.id), up] == 4.0
    labelled = group_by_label(graph(), {(1, 5): "induction", (0, 3): "previous token"})
    assert labelled.supernodes == {"previous token, L0@1": (LOW,), "induction, L1@2": (HIGH,)}
    anywhere = group_by_label(graph(), {(1, 5): "induction"}, by_position=False)
    assert anywhere.supernodes == {"induction, L1": (HIGH,)}
    with pytest.raises(ValueError, match="in supernodes 'a' and 'b'"):
        with_supernodes(graph(), {"a": [LOW], "b": [LOW]})
    with pytest.raises(ValueError, match="supernode 'a' is empty"):
        with_supernodes(graph(), {"a": []})


def test_agreement_against_numpy_like_numbers():
    predicted = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    measured = torch.tensor([1.5, -2.0, -3.0, 5.0], dtype=torch.float64)
    found = agreement(predicted, measured)
    expected = torch.corrcoef(torch.stack([predicted, measured]))[0, 1]
    assert found.correlation == pytest.approx(float(expected))
    assert found.sign_agreement == 0.75
    assert found.largest_error == pytest.approx(1.0)
    assert agreement(predicted[:0], measured[:0]).n == 0
