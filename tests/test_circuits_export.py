"""Graphs in other forms: read back as they are, and as the schema of circuit-tracer asks."""

import json
import math
import re
from itertools import pairwise

import circuits_graphs as made
import networkx
import pytest
import torch
import zoo
from circuits_graphs import INDUCTION, LOGIT, PREVIOUS, T, small_details, small_graph
from typer.testing import CliRunner

from lorsa_lens import Lorsa
from lorsa_lens.analysis.contexts import ContextStore, collect_contexts
from lorsa_lens.circuits.attention_links import (
    attention_links,
    trace_heads,
    with_attention_nodes,
)
from lorsa_lens.circuits.attribution import attribution_graph
from lorsa_lens.circuits.details import Details, z_patterns
from lorsa_lens.circuits.export import (
    save_circuit_tracer,
    save_graphml,
    to_circuit_tracer,
    to_networkx,
)
from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.paths import path_table, strongest_paths
from lorsa_lens.circuits.prompt import target_of
from lorsa_lens.circuits.replacement import local_replacement
from lorsa_lens.circuits.supernodes import with_supernodes
from lorsa_lens.cli import app
from lorsa_lens.recording import record_attention


def all_ways(graph):
    """Every way from a node without inputs up to a target, with its influence, naively."""
    gross = graph.gross.tolist()

    def below(i):
        sources = graph.edges[i].nonzero()[:, 0].tolist()
        if not sources:
            return [([graph.nodes[i]], 1.0)]
        found = []
        for j in sources:
            share = abs(graph.edges[i, j].item()) / gross[i]
            found += [([*way, graph.nodes[i]], part * share) for way, part in below(j)]
        return found

    return [way for target in graph.targets for way in below(graph.index(target))]


# --- NetworkX and GraphML ------------------------------------------------------------------------


def test_networkx_holds_every_node_and_edge():
    graph = small_graph()
    found = to_networkx(graph)
    assert networkx.is_directed_acyclic_graph(found)
    assert set(found.nodes) == {node.id for node in graph.nodes}
    edges = {(u, v): data["weight"] for u, v, data in found.edges(data=True)}
    assert edges == {(s.id, t.id): weight for s, t, weight in made.EDGES}
    head = found.nodes[INDUCTION.id]
    assert (head["kind"], head["layer"], head["pos"], head["index"]) == ("head", 1, 7, 42)
    assert (head["label"], head["supernode"], head["token"]) == ("induction", "induction", " Lily")
    assert head["pre_activation"] == pytest.approx(2.1 + 0.7 + 0.9 + 0.3 + 0.03)
    assert found.nodes[LOGIT.id]["probability"] == 0.93
    leaf = found.nodes[T[0].id]
    assert not {"pre_activation", "source", "module", "probability", "supernode"} & set(leaf)
    through = math.fsum(part for way, part in all_ways(graph) if INDUCTION in way)
    assert head["influence"] == pytest.approx(3.0 / graph.gross[graph.index(LOGIT)].item())
    assert head["influence"] >= through > 0.9 * head["influence"]  # the rest begins in `missing`


def test_graphml_is_read_back_and_holds_no_control_characters(tmp_path):
    graph = small_graph()
    read = networkx.read_graphml(save_graphml(graph, tmp_path / "deep" / "g.graphml"))
    assert {(u, v): data["weight"] for u, v, data in read.edges(data=True)} == {
        (s.id, t.id): weight for s, t, weight in made.EDGES
    }
    assert read.nodes[made.SAME.id]["label"] == "same <token>"
    assert read.nodes[T[3].id]["token"] == "</script><b>x"
    bell = small_graph(labels={INDUCTION: "a\x00b\x07\ud800"})
    read = networkx.read_graphml(save_graphml(bell, tmp_path / "g.graphml"))
    assert read.nodes[INDUCTION.id]["label"] == "a b  "


# --- circuit-tracer ------------------------------------------------------------------------------

METADATA = {
    "slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str,
    "node_threshold": float, "schema_version": int,
}  # fmt: skip
Q_PARAMS = {
    "pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str,
}  # fmt: skip
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
    "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int,
    "jsNodeId": str, "clerp": str, "influence": float, "activation": (float, type(None)),
}  # fmt: skip


def assert_follows_the_schema(values):
    """What the page of circuit-tracer reads, as its own code and models say."""

    def has(part, kinds):
        assert all(isinstance(part[key], kind) for key, kind in kinds.items())

    assert set(values) == {"metadata", "qParams", "nodes", "links"}
    has(values["metadata"], METADATA)
    has(values["qParams"], Q_PARAMS)
    ids = [node["node_id"] for node in values["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in values["nodes"]:
        has(node, NODE)
        assert 0 <= node["influence"] <= 1
        assert 0 <= node["ctx_idx"] < len(values["metadata"]["prompt_tokens"])
        assert node["layer"] == "E" or node["layer"].isdigit()
        if node["feature_type"] == "logit":  # split at `(p=`
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == round(
                node["token_prob"], 3
            )
        if node["feature_type"] == "cross layer transcoder":
            layer, index, pos = map(int, node["node_id"].split("_"))
            assert (layer, index) == unpaired(node["feature"])
            assert (str(layer), pos) == (node["layer"], node["ctx_idx"])
    for link in values["links"]:
        assert {link["source"], link["target"]} <= set(ids)
        assert math.isfinite(link["weight"])
    shown = values["qParams"]["pinnedIds"]
    assert set(shown) <= set(ids)
    for group in values["qParams"]["supernodes"]:
        assert set(group[1:]) <= set(shown)  # others are not drawn
    # Labels are joined by layer, number and position.
    joined = [(n["layer"], n["feature"], n["ctx_idx"]) for n in values["nodes"]]
    assert len(set(joined)) == len(joined)


def unpaired(number):
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


def test_the_folder_follows_the_schema(tmp_path):
    graph = small_graph()
    path = save_circuit_tracer(graph, tmp_path, slug="lily", details=small_details(graph))
    values = json.loads(path.read_text())
    assert_follows_the_schema(values)
    assert values["metadata"]["prompt_tokens"] == list(made.TOKENS)
    assert len(values["nodes"]) == len(graph.nodes)
    assert len(values["links"]) == len(made.EDGES)
    nodes = {node["node_id"]: node for node in values["nodes"]}
    assert (nodes["1_42_7"]["clerp"], nodes["1_1000042_7"]["clerp"]) == (
        "L1.42 (induction) at ·Lily (7)", "L1 f42 at ·Lily (7)",
    )  # fmt: skip
    assert nodes["3_317_7"]["clerp"] == 'Output " s"aw" (p=0.930)'
    weights = {(link["source"], link["target"]): link["weight"] for link in values["links"]}
    assert weights["0_12_2", "1_42_7"] == 2.1
    assert weights["E_100_0", "1_7_7"] == -0.8
    assert values["qParams"]["supernodes"] == [
        ["previous <b>", "0_12_2", "0_14_2"], ["induction", "1_42_7", "1_43_7"],
    ]  # fmt: skip
    assert nodes["1_42_7"]["qk_tracing_results"] == {
        "pair_wise": [
            ["0_3_7", "0_12_2", 4.2], ["E_107_7", "0_12_2", 2.2], ["<i>other</i>", "E_102_2", -0.4]
        ],
        "top_q_marginal": [["E_107_7", 3.3]],
        "top_k_marginal": [["0_12_2", 5.1]],
    }  # fmt: skip
    assert not any("qk_tracing_results" in node for name, node in nodes.items() if name != "1_42_7")


def test_influence_is_what_the_slider_keeps():
    """The fewest nodes that reach a share are those whose number is not above it."""
    graph = small_graph()
    written = to_circuit_tracer(graph, slug="x")
    order = sorted(written.nodes, key=lambda node: node.influence)
    assert order[0].kind == "logit"
    assert order[-1].influence == pytest.approx(1.0)
    sizes = dict(zip(map(str, graph.nodes), influence_of(graph), strict=True))
    total = math.fsum(sizes.values())
    ranked = sorted(sizes.values(), reverse=True)
    sums = [math.fsum(ranked[: n + 1]) / total for n in range(len(ranked))]
    assert sorted(node.influence for node in written.nodes) == pytest.approx(sums)


def influence_of(graph):
    """Of every node: its weight, and what it gives to others times theirs, from above."""
    found = graph.target_weights.tolist()
    for i in reversed(range(len(graph.nodes))):
        for j in range(i):
            if graph.edges[i, j]:
                found[j] += found[i] * abs(graph.edges[i, j].item()) / graph.gross[i].item()
    return found


def test_feature_files_hold_z_patterns_and_contexts(tmp_path):
    graph = small_graph()
    details = small_details(graph)
    save_circuit_tracer(graph, tmp_path, slug="lily", details=details)
    names = {path.stem for path in (tmp_path / "features").iterdir()}
    assert {unpaired(int(name)) for name in names} == {(1, 42), (0, 12)}
    number = next(name for name in names if unpaired(int(name)) == (1, 42))
    feature = json.loads((tmp_path / "features" / f"{number}.json").read_text())
    own, *contexts = feature["examples_quantiles"][0]["examples"]
    assert own["tokens"] == list(made.TOKENS)
    assert own["train_token_ind"] == 7
    assert math.fsum(own["tokens_acts_list"]) == pytest.approx(4.03)
    assert [example["tokens"][1] for example in contexts] == [" cat", " cat"]


def test_without_supernodes_the_strongest_are_pinned():
    written = to_circuit_tracer(small_graph(supernodes={}), slug="x")
    assert len(written.pinned) == 12
    least = max(node.influence for node in written.pinned)
    assert sum(node.influence <= least for node in written.nodes) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_patterns": {INDUCTION: [1.0]}}, "z pattern of head.L1.42@7 has 1 values, the prompt"),
        ({"z_patterns": {INDUCTION: [math.nan] * 8}}, "holds a value that is not finite"),
        ({"z_patterns": {LOGIT: [0.0] * 8}}, "z_patterns has logit.317@7, which is no head"),
        ({"qk": {Node("head", 1, 7, 5): {}}}, "qk has head.L1.5@7, which is no head of the graph"),
    ],
)
def test_details_of_other_nodes_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_circuit_tracer(small_graph(), tmp_path, slug="x", details=Details(**change))
    assert not list(tmp_path.iterdir())


def test_a_graph_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens: their page shows a graph below its prompt"):
        to_circuit_tracer(small_graph(tokens=()), slug="x")


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 100])
def test_the_strongest_paths_are_those_of_all(n):
    graph = small_graph()
    expected = sorted(all_ways(graph), key=lambda way: -way[1])
    found = strongest_paths(graph, n)
    assert [path.influence for path in found] == pytest.approx([part for _, part in expected][:n])
    assert len(found) == min(n, len(expected))
    every = {tuple(way): part for way, part in expected}
    assert all(every[path.nodes] == pytest.approx(path.influence) for path in found)


def test_signs_of_paths():
    """By the sign of what a source writes along the path, a negative head on the way or not."""
    graph = small_graph()
    for path in strongest_paths(graph, 100):
        effect = 1.0
        for source, target in pairwise(path.nodes):
            effect *= graph.edge(source, target)
            if target.kind != "logit":
                effect /= graph.activations[graph.index(target)].item()
        assert path.sign == math.copysign(1, effect), path
    ways = {path.nodes: path.sign for path in strongest_paths(graph, 100)}
    assert ways[T[0], made.SINK, LOGIT] == 1  # it makes a negative activation, which is z
    assert ways[PREVIOUS.__class__("position", -1, 7), made.SINK, LOGIT] == -1
    table = path_table(graph, 1)
    assert table.rows[0][0].startswith("token ·Lily (1) → L0.12 (previous token) at ·saw (2) → ")
    with pytest.raises(ValueError, match="n = 0 must be positive"):
        strongest_paths(graph, 0)


# --- of a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replaced():
    model = zoo.by_name("learned").build(torch.float32)
    lorsas = {layer: Lorsa.from_attention(model, layer, n_ov_heads=16, k=4) for layer in (0, 1)}
    return model, lorsas


def test_z_patterns_are_those_of_the_lorsa(replaced):
    model, lorsas = replaced
    tokens = zoo.tokens(1, 10)
    replacement = local_replacement(model, lorsas.values(), tokens)
    graph = attribution_graph(replacement, n_nodes="all")
    found = z_patterns(replacement, graph)
    heads = [node for node in graph.nodes if node.kind == "head"]
    assert set(found) == set(heads)
    assert len(heads) > 40
    for node in heads:
        assert math.fsum(found[node]) == pytest.approx(graph.activations[graph.index(node)].item())
    x = record_attention(model, tokens, [0])[0].x
    with torch.no_grad():
        expected = lorsas[0].z_pattern(x, range(16))[0]
    for node in heads:
        if node.layer == 0:
            own = torch.tensor(found[node])
            torch.testing.assert_close(own, expected[node.index, node.pos], rtol=1e-3, atol=1e-5)


def test_targets_of_text(replaced):
    model, _ = replaced
    token = int(model.to_tokens("w5", prepend_bos=False)[0, 0])
    other = int(model.to_tokens("w6", prepend_bos=False)[0, 0])
    assert target_of(model, "w5").token_ids == (token,)
    assert target_of(model, "w5", "w6").token_ids == (token, other)
    assert target_of(model).kind == "top_probability"
    with pytest.raises(ValueError, match="against = 'w6' needs a target"):
        target_of(model, None, "w6")
    with pytest.raises(ValueError, match="target = 'w1 w2' is 2 tokens"):
        target_of(model, "w1 w2")


# --- why heads attend ----------------------------------------------------------------------------


def test_what_decides_where_heads_attend_comes_back():
    deciding, weak = Node("head", 0, 5, 8), Node("head", 0, 5, 9)
    inputs = [(T[1], deciding, 0.8), (T[2], deciding, -0.9), (T[7], deciding, 0.1)]
    whole = made.made_graph([*made.EDGES, *inputs, (T[1], weak, 1.0)], labels={LOGIT: " saw"})
    few = torch.tensor([node in (INDUCTION, LOGIT, T[2]) for node in whole.nodes])
    pruned = with_supernodes(whole.keeping(few), {"all": [INDUCTION]})
    traced = {
        INDUCTION: {
            "pair_wise": [],
            "top_q_marginal": [["bias.reading", 9.0], [T[7].id, -1.5]],
            "top_k_marginal": [[deciding.id, 4.0], [weak.id, 0.4], ["head.L0.99@5", 1.0]],
        }
    }
    assert attention_links(whole, traced) == [
        (T[7], INDUCTION, "query", -1.5), (deciding, INDUCTION, "key", 4.0),
    ]  # fmt: skip
    found = with_attention_nodes(whole, pruned, traced)
    assert set(found.nodes) == {INDUCTION, LOGIT, T[2], T[7], deciding, T[1]}
    edges = {(s.id, t.id): w["weight"] for s, t, w in _edges(found)}
    assert edges == {
        (T[2].id, INDUCTION.id): 0.9, (INDUCTION.id, LOGIT.id): 3.0,
        (T[1].id, deciding.id): 0.8, (T[2].id, deciding.id): -0.9,
    }  # fmt: skip
    torch.testing.assert_close(
        found.edges.sum(1) + found.constants + found.missing, found.pre_activations
    )
    assert (found.supernodes, found.labels) == ({"all": (INDUCTION,)}, {LOGIT: " saw"})


def _edges(graph):
    by_id = {node.id: node for node in graph.nodes}
    found = to_networkx(graph).edges(data=True)
    return [(by_id[source], by_id[target], values) for source, target, values in found]


def test_heads_are_traced_where_all_below_are_nodes(replaced):
    model, lorsas = replaced
    tokens = zoo.tokens(1, 8)
    both = local_replacement(model, lorsas.values(), tokens)
    graph = attribution_graph(both, n_nodes="all")
    traced = trace_heads(both, graph, 60)
    assert {node.layer for node in traced} == {0, 1}
    strongest = [node for node in traced if node.layer == 1]
    for node in strongest[:3]:
        values = traced[node]
        # By itself: the score of the pattern that the Lorsa has.
        x = record_attention(model, tokens, [1])[1].x
        with torch.no_grad():
            circuit = node.index // lorsas[1].cfg.group_size
            pattern = lorsas[1].pattern(x, [circuit])[0, 0, node.pos]
        assert values["key"] == int(pattern.argmax())
        assert values["weight"] == pytest.approx(pattern.max().item(), rel=1e-4)
    upper = local_replacement(model, [lorsas[1]], tokens)
    assert trace_heads(upper, attribution_graph(upper, n_nodes="all")) == {}
    heads = local_replacement(model, [lorsas[1]], tokens, attention="heads")
    assert len(trace_heads(heads, attribution_graph(heads, n_nodes="all"), 2)) == 2


# --- the command ---------------------------------------------------------------------------------

PROMPT = "w1 w2 w3 w4 w1 w2 w3"


@pytest.fixture
def command(monkeypatch, replaced, tmp_path):
    model, lorsas = replaced
    monkeypatch.setattr("lorsa_lens.hosts.loading.load_host", lambda name: model)
    for layer, lorsa in lorsas.items():
        lorsa.save_pretrained(tmp_path / "some" / f"layer{layer}")
    base = ["graph", "--model", "tiny", "--lorsas", str(tmp_path / "some")]

    def run(*arguments):
        found = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "out"), *arguments])
        return found, " ".join(re.sub(r"[│╭╮╰╯─]", " ", found.output).split())

    return run


def test_the_command_writes_all_forms(command, tmp_path):
    result, text = command("--prompt", PROMPT, "--target", "w5", "--against", "w6")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "graph.html", "graph.json", "graph.graphml", "circuit-tracer",
    }  # fmt: skip
    graph = AttributionGraph.load(out / "graph.json")
    assert graph.tokens[-7:] == tuple(PROMPT.split())
    assert graph.meta["replaced_layers"] == [0, 1]
    assert_follows_the_schema(json.loads((out / "circuit-tracer" / "tiny.json").read_text()))
    assert "logit of w5 - w6 at w3 (7)" in text
    assert f"{len(graph.nodes)} of " in text
    best = path_table(graph).rows[0][0]
    assert best in text


def test_the_command_replaces_chosen_layers(command, tmp_path):
    result, _ = command("--prompt", PROMPT, "--layers", "1", "--original-heads", "--slug", "one")
    assert result.exit_code == 0, result.output
    graph = AttributionGraph.load(tmp_path / "out" / "graph.json")
    assert {node.layer for node in graph.nodes if node.kind == "head"} == {1}
    assert {node.layer for node in graph.nodes if node.kind == "attention_head"} == {0}
    assert (tmp_path / "out" / "circuit-tracer" / "one.json").is_file()


def test_names_and_contexts_of_heads_are_shown(command, tmp_path, replaced):
    model, lorsas = replaced
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{int(token)}" for token in zoo.tokens(1, 300)[0] - 4))
    tables = tmp_path / "heads"
    collect_contexts(
        model, lorsas.values(), str(text), tables / "contexts.sqlite", context_size=12
    ).close()
    rows = [
        {"kind": "ov", "layer": 1, "head": head, "behaviour": behaviour, "score": score}
        for head in range(16)
        for behaviour, score in (("weak", 0.1), (f"name {head % 2}", 0.9), ("none", 0.5))
    ]
    rows.append({**rows[1], "kind": "qk", "score": 1.0, "behaviour": "of a circuit"})
    (tables / "named.json").write_text(json.dumps(rows))
    result, _ = command("--prompt", PROMPT, "--tables", str(tables), "--node-threshold", "1")
    assert result.exit_code == 0, result.output
    graph = AttributionGraph.load(tmp_path / "out" / "graph.json")
    heads = [node for node in graph.nodes if node.kind == "head"]
    assert {graph.labels.get(node) for node in heads if node.layer == 0} == {None}
    upper = [node for node in heads if node.layer == 1]
    assert upper
    assert all(graph.labels[node] == f"name {node.index % 2}" for node in upper)
    for name, group in graph.supernodes.items():
        assert len(group) > 1
        assert {f"{graph.labels[node]}, L1@{node.pos}" for node in group} == {name}
    assert graph.supernodes
    page = (tmp_path / "out" / "graph.html").read_text()
    with ContextStore(tables / "contexts.sqlite") as store:
        for node in heads:
            (best, *_) = store.head(node.layer, node.index).top
            assert f'id="contexts-{node.layer}.{node.index}"' in page
            assert f"z = {best.activation:+.3g} at position {best.query} (framed)" in page


def test_the_command_says_what_is_wrong(command, tmp_path, replaced):
    cases = {
        ("--prompt", ""): "prompt is empty",
        ("--prompt", PROMPT, "--target", "w1 w2"): "2 tokens",
        ("--prompt", PROMPT, "--layers", "7"): "has no Lorsa of layer 7: it has [0, 1]",
        (
            "--prompt",
            PROMPT,
            "--tables",
            "nowhere",
        ): "there is no nowhere/named.json: run lorsa-lens heads",
        ("--prompt", PROMPT, "--lorsas", str(tmp_path / "empty")): "there are no Lorsas in",
        ("--prompt", PROMPT, "--slug", "a b"): "letters, digits, - and _ only",
    }
    (tmp_path / "empty").mkdir()
    for arguments, message in cases.items():
        result, text = command(*arguments)
        assert result.exit_code == 2, arguments
        assert message in text
    replaced[1][0].save_pretrained(tmp_path / "some" / "again")
    result, text = command("--prompt", PROMPT)
    assert "holds two Lorsas of layer 0" in text
