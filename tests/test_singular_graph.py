"""Circuits as data: JSON, GraphML, circuit-tracer, pages; merged, pruned, grouped, compared."""

import json
import re
import xml.etree.ElementTree as ET

import networkx
import pytest
import torch
import zoo

from lorsa_lens.singular import (
    IOI_CIRCUIT,
    IOI_HEADS,
    Circuit,
    Component,
    Edge,
    Firing,
    Greedy,
    Node,
    Seed,
    circuit_view,
    cluster,
    direction_seeds,
    edge_table,
    jaccard,
    logit_seeds,
    match_heads,
    merge,
    probability_seeds,
    prune_by_effect,
    prune_by_frequency,
    record_stream,
    save_circuit_tracer,
    save_graphml,
    save_page,
    to_circuit_tracer,
    to_networkx,
    trace,
)
from lorsa_lens.singular.graph import circuit_of
from lorsa_lens.views import Drawing

ROOT = Node("root", 2, None, 5, 5)
INDUCTION = Node("head", 1, 2, 5, 3)
PREVIOUS = Node("head", 0, 0, 3, 2)
EMBEDDING = Node("embedding", 0, None, 5, 5)
MLP = Node("mlp", 0, None, 3, 3)


def edge(up, down, side="dest", weight=0.5, vectors=(1,), n_prompts=1):
    return Edge(up=up, down=down, side=side, weight=weight, vectors=vectors, n_prompts=n_prompts)


def circuit(*edges, tokens=("<b>", "a", "b & c", "d", "e", "f"), attention=0.9):
    given = {node: attention for e in edges for node in (e.up, e.down) if node.head is not None}
    return circuit_of(edges, attention=given, tokens=tokens, meta={"method": "greedy"})


def textbook():
    return circuit(
        edge(INDUCTION, ROOT, weight=2.5, vectors=()),
        edge(PREVIOUS, INDUCTION, "src", 0.8, (4, 1)),
        edge(EMBEDDING, INDUCTION, "dest", 0.7, (1,)),
    )


# --------------------------------------------------------------------------------------- data


def test_a_circuit_survives_json(tmp_path):
    given = textbook()
    assert Circuit.load(given.save(tmp_path / "deep" / "c.json")) == given
    assert given.heads == {(1, 2), (0, 0)}
    assert [node.id for node in given.nodes] == [
        "embedding.5",
        "head.L0.0.3.2",
        "head.L1.2.5.3",
        "root.5",
    ]
    again = circuit(*reversed(given.edges))
    assert again == given  # whatever the order


def test_what_is_no_circuit_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Circuit.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, no circuit"):
        Circuit.load(path)
    values = textbook().to_dict()
    with pytest.raises(ValueError, match="format = 'x'"):
        Circuit.from_dict({**values, "format": "x"})
    with pytest.raises(ValueError, match="format_version = 2: this release"):
        Circuit.from_dict({**values, "format_version": 2})
    values["nodes"][0]["kind"] = "ghost"
    with pytest.raises(ValueError, match="kind 'ghost'"):
        Circuit.from_dict(values)


def test_graphml_and_networkx(tmp_path):
    graph = to_networkx(textbook())
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph["head.L0.0.3.2"]["head.L1.2.5.3"]["src"]["vectors"] == "[4, 1]"
    read = networkx.read_graphml(save_graphml(textbook(), tmp_path / "c.graphml"))
    assert set(read.nodes) == {node.id for node in textbook().nodes}
    assert read.nodes["head.L1.2.5.3"]["attn"] == 0.9
    assert read.nodes["head.L1.2.5.3"]["src"] == 3
    assert "head" not in read.nodes["embedding.5"]
    weights = {(u, v): data["weight"] for u, v, data in read.edges(data=True)}
    assert weights["head.L0.0.3.2", "head.L1.2.5.3"] == 0.8


def test_circuit_tracer_json(tmp_path):
    path = save_circuit_tracer(textbook(), tmp_path / "c.json", slug="recall", scan="tiny")
    values = json.loads(path.read_text())
    assert values["metadata"]["slug"] == "recall"
    assert values["metadata"]["prompt_tokens"] == list(textbook().tokens)
    nodes = {node["node_id"]: node for node in values["nodes"]}
    assert all(link["source"] in nodes and link["target"] in nodes for link in values["links"])
    head = nodes["attention_1_2_5_3"]
    assert (head["feature_type"], head["layer"], head["ctx_idx"]) == ("attention head", "1", 5)
    assert head["influence"] == pytest.approx(2.5 / 4)  # the strongest; all edges weigh 4
    assert head["clerp"] == "L1.2 at 'f' from 'd'"
    assert nodes["3_0_5"]["is_target_logit"]
    assert nodes["E_0_5"]["layer"] == "E"
    links = {(link["source"], link["target"]): link for link in values["links"]}
    link = links["attention_0_0_3_2", "attention_1_2_5_3"]
    assert (link["weight"], link["side"], link["vectors"]) == (0.8, "src", [4, 1])
    with pytest.raises(ValueError, match="letters, digits, - and _ only"):
        to_circuit_tracer(textbook(), slug="../x")
    with pytest.raises(ValueError, match="merged circuits have no prompt"):
        to_circuit_tracer(merge([textbook()]), slug="x")


# -------------------------------------------------------------------------------------- pages


def test_the_drawing_shows_every_node_and_edge():
    drawing = circuit_view(textbook())
    root = ET.fromstring(drawing.svg)
    names = "{http://www.w3.org/2000/svg}"
    paths = root.findall(f"{names}path")
    assert len(paths) == 3
    assert len(root.findall(f"{names}g")) == 4
    by_side = {path.get("data-side"): path for path in paths if path.get("stroke") != "#b3261e"}
    assert by_side["src"].get("stroke-dasharray")
    assert not by_side["dest"].get("stroke-dasharray")
    assert by_side["src"].get("stroke") != by_side["dest"].get("stroke")
    tip = by_side["src"].find(f"{names}title").text
    assert "weight 0.800, singular vectors 4, 1" in tip
    assert "L0.0 at 'd' (3) from" in tip
    tips = [g.find(f"{names}title").text for g in root.findall(f"{names}g")]
    assert any("attention weight 0.900" in text for text in tips)


def test_tokens_lie_along_x_and_layers_along_y():
    root = ET.fromstring(circuit_view(textbook()).svg)
    names = "{http://www.w3.org/2000/svg}"
    places = {}
    for group in root.findall(f"{names}g"):
        rect = group.find(f"{names}rect")
        places[group.find(f"{names}title").text.split(" at ")[0]] = (
            float(rect.get("x")),
            float(rect.get("y")),
        )
    assert places["L0.0"][0] < places["L1.2"][0] == places["root"][0]
    assert places["root"][1] < places["L1.2"][1] < places["L0.0"][1] < places["embedding"][1]


def test_the_page_needs_nothing_from_outside(tmp_path):
    text = save_page(textbook(), tmp_path / "page.html", title="Recall").read_text()
    assert "<svg" in text
    assert not re.search(r"(src|href)\s*=|url\(|@import", text)
    assert "<b>" not in text.split("</style>", 1)[1]  # tokens are escaped
    assert "script-src 'none'" in text
    assert edge_table(textbook()).rows[0][3] == 2.5
    with pytest.raises(ValueError, match="circuit is empty"):
        circuit_view(circuit())


def test_a_merged_circuit_can_be_drawn(tmp_path):
    merged = merge([textbook(), textbook()])
    assert "Merged circuit" in save_page(merged, tmp_path / "m.html").read_text()


# ---------------------------------------------------------------------- merging and comparing


def test_merging_takes_means_and_counts():
    other = circuit(
        edge(INDUCTION, ROOT, weight=1.5, vectors=()),
        edge(PREVIOUS, INDUCTION, "src", 0.4, (4, 7)),
        edge(MLP, INDUCTION, "src", 0.1, (2,)),
        attention=0.5,
    )
    merged = merge([textbook(), other])
    edges = {(e.up, e.down, e.side): e for e in merged.edges}
    source = edges[PREVIOUS, INDUCTION, "src"]
    assert source.weight == pytest.approx(0.6)
    assert source.vectors == (4, 1, 7)
    assert source.n_prompts == 2
    assert edges[MLP, INDUCTION, "src"].n_prompts == 1
    assert merged.attention[INDUCTION] == pytest.approx(0.7)
    assert merged.meta["n_prompts"] == 2
    with pytest.raises(ValueError, match="circuits is empty"):
        merge([])


def test_pruning_by_frequency_keeps_what_reaches_the_root():
    rare = circuit(
        edge(INDUCTION, ROOT, vectors=()),
        edge(MLP, INDUCTION, "src"),
        edge(PREVIOUS, Node("head", 1, 0, 5, 3), "src"),
    )
    merged = merge([textbook(), textbook(), rare])
    pruned = prune_by_frequency(merged, 0.5)
    assert MLP not in pruned.nodes
    assert PREVIOUS in pruned.nodes
    assert all(e.down != Node("head", 1, 0, 5, 3) for e in pruned.edges)
    assert prune_by_frequency(merged, 0.0).nodes != pruned.nodes
    with pytest.raises(ValueError, match="was not merged"):
        prune_by_frequency(textbook(), 0.5)
    with pytest.raises(ValueError, match="share = 2"):
        prune_by_frequency(merged, 2.0)


def test_pruning_by_effect_drops_edges_and_all_behind_them():
    behind = edge(EMBEDDING._replace(dest=3, src=3), PREVIOUS, "dest")
    given = circuit(*textbook().edges, behind)
    effects = {PREVIOUS: -0.01, EMBEDDING: -0.6}
    pruned = prune_by_effect(given, lambda e: effects.get(e.up, 9.0), 0.1)
    assert {node.id for node in pruned.nodes} == {"embedding.5", "head.L1.2.5.3", "root.5"}


def test_clustering_separates_two_templates():
    one, two = textbook(), circuit(edge(INDUCTION, ROOT, vectors=()), edge(MLP, INDUCTION, "src"))
    near = circuit(*one.edges, edge(MLP, INDUCTION, "src"))
    assert cluster([two, one, near, one, two], 2) == [0, 1, 1, 1, 0]
    assert cluster([one, near], 1) == [0, 0]
    assert cluster([one, two, near], 3, edges=True) == [0, 1, 2]
    with pytest.raises(ValueError, match="n_clusters = 3 must be 1 to 2"):
        cluster([one, two], 3)


def test_jaccard():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard([], []) == 1.0
    assert jaccard([1], []) == 0.0


def test_the_published_ioi_circuit():
    assert len(IOI_HEADS) == 26 == sum(len(heads) for heads in IOI_CIRCUIT.values())
    assert (9, 9) in IOI_CIRCUIT["name mover"]
    assert all(0 <= layer < 12 and 0 <= head < 12 for layer, head in IOI_HEADS)


def test_precision_recall_and_f1():
    match = match_heads({(9, 9), (0, 1), (11, 11), (5, 0)})
    assert match.precision == 0.5
    assert match.recall == 2 / 26
    assert match.f1 == pytest.approx(2 * 0.5 * (2 / 26) / (0.5 + 2 / 26))
    assert match_heads([]) == (0.0, 0.0)
    assert match_heads([]).f1 == 0.0
    with pytest.raises(ValueError, match="known is empty"):
        match_heads([(0, 0)], [])


# ------------------------------------------------------------------------- seeds and edge cases


@pytest.fixture(scope="module")
def stream():
    return record_stream(zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 7))


def test_linear_seeds_are_shares_of_the_logit_difference(stream):
    every = direction_seeds(stream, stream.W_U[:, 5] - stream.W_U[:, 6])
    total = (stream.final_norm.share(stream.resid_final)[-1]) @ (
        stream.W_U[:, 5] - stream.W_U[:, 6]
    )
    opposite = logit_seeds(stream, 6, 5)
    assert bool(every) != bool(opposite)  # the difference is positive one way only
    seeds, sign = (every, 1) if every else (opposite, -1)
    assert all(seed.weight > 0 for seed in seeds)
    assert sum(seed.weight for seed in seeds) > sign * total.item() or len(seeds) > 1
    assert [s.weight for s in seeds] == sorted((s.weight for s in seeds), reverse=True)


def test_seeds_from_the_stream_before_a_layer(stream):
    direction = stream.layers[1].resid_pre[3]
    seeds = direction_seeds(stream, direction, layer=1, position=3)
    assert seeds
    assert {seed.component.layer for seed in seeds} == {0}
    assert {seed.position for seed in seeds} == {3}


def test_probability_seeds_take_away_most_of_the_answers_probability(stream):
    answer = int(stream.logits[-1].argmax())
    few = probability_seeds(stream, answer, share=0.3)
    many = probability_seeds(stream, answer, share=0.9)
    assert len(few) <= len(many)
    assert few == many[: len(few)]
    assert all(seed.weight > 0 for seed in many)


def test_seed_errors(stream):
    with pytest.raises(ValueError, match=r"direction has shape \(3,\): give \[32\]"):
        direction_seeds(stream, torch.zeros(3))
    with pytest.raises(ValueError, match="layer = 3 must be 0 to 2"):
        direction_seeds(stream, torch.zeros(32), layer=3)
    with pytest.raises(ValueError, match="share = 0"):
        probability_seeds(stream, 5, share=0.0)
    with pytest.raises(ValueError, match="wrong = "):
        logit_seeds(stream, 5, [])
    with pytest.raises(ValueError, match="tokens has 1 strings, but the prompt 7 tokens"):
        trace(stream, [], tokens=["a"])


def test_nothing_to_trace_gives_an_empty_circuit(stream):
    empty = trace(stream, [])
    assert empty.nodes == empty.edges == ()
    direction = -direction_of(stream)
    assert direction_seeds(stream, direction) == []


def direction_of(stream):
    """A direction along which the stream is positive."""
    return stream.final_norm.share(stream.resid_final)[-1]


@pytest.mark.parametrize("n_pos", [1, 2])
def test_the_shortest_prompts(n_pos):
    stream = record_stream(zoo.by_name("rotary").build(torch.float32), zoo.tokens(1, n_pos))
    answer = int(stream.logits[-1].argmax())
    for seeds in (probability_seeds(stream, answer), direction_seeds(stream, direction_of(stream))):
        assert seeds
        circuit = trace(stream, seeds)
        assert len(circuit.nodes) >= 2


def test_the_first_token_and_weak_attention_are_not_traced(stream):
    assert not Greedy().fires(stream, Firing(1, 0, 0, 0))
    assert not Greedy().fires(stream, Firing(0, 0, 3, 1))
    pattern = stream.layers[1].pattern
    head, dest, src = (pattern < 0.05).nonzero()[-1].tolist()
    assert not Greedy().fires(stream, Firing(1, head, dest, src))
    reading = stream.reading(1, head)
    explanation = Greedy().explain_side(stream, reading, 6, int(pattern[head, 6].argmin()), "src")
    assert explanation.vectors == {}


def test_every_firing_is_explained_once_and_weights_sum_to_the_fall(stream):
    seeds = [Seed(Component(1, "head", h, 0), 6, 1.0) for h in range(4)]
    circuit = trace(stream, seeds)
    assert len({(e.up, e.down, e.side) for e in circuit.edges}) == len(circuit.edges)
    for head in range(4):
        reading = stream.reading(1, head)
        for side in ("dest", "src"):
            found = Greedy().explain_side(stream, reading, 6, 0, side)
            fall = found.removal.before - found.removal.after
            assert sum(found.weights.values()) == pytest.approx(fall)


def test_a_drawing_is_one_svg_element():
    with pytest.raises(ValueError, match="svg must be one <svg> element, got '<p>'"):
        Drawing("<p>", "a legend")
    assert "a &lt;b&gt;" in Drawing("<svg></svg>", "a <b>").to_html()
