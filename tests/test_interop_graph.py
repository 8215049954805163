"""Graph and feature files follow the schema that circuit-tracer's page reads, key by key."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorsa_lens.interop import Example, Graph, Link, Node, QKTracing, save_graph
from lorsa_lens.interop.graph_json import cantor, cumulative, graph_values
from lorsa_lens.interop.graph_schema import check_graph, check_slug, slug_of

TOKEN = Node(kind="token", pos=1, index=317, label=" Once", influence=0.9)
HEAD = Node(kind="head", pos=2, layer=4, index=6, label="L4.6", influence=0.31, activation=1.43)
ERROR = Node(kind="error", pos=2, layer=3)
LOGIT = Node(kind="logit", pos=2, index=42, label=' "a"', probability=0.12345, is_target=True)
LINKS = [
    Link(source=TOKEN, target=HEAD, weight=1.61),
    Link(source=ERROR, target=HEAD, weight=-0.5),
    Link(source=HEAD, target=LOGIT, weight=0.25),
]


def graph(**changes):
    values = {
        "slug": "timmy", "prompt_tokens": ["<s>", " Once", " upon"], "n_layers": 5,
        "nodes": [TOKEN, HEAD, ERROR, LOGIT], "links": LINKS,
    }  # fmt: skip
    return Graph(**{**values, **changes})


def test_the_files_are_those_of_the_schema(tmp_path):
    written = graph(node_threshold=0.8, pinned=[HEAD], supernodes={"names": [HEAD, TOKEN]})
    path = save_graph(tmp_path / "graphs", written)
    assert path == tmp_path / "graphs" / "timmy.json"
    metadata = {
        "slug": "timmy", "scan": "./data/features", "transcoder_list": [],
        "prompt_tokens": ["<s>", " Once", " upon"], "prompt": "<s> Once upon",
        "schema_version": 1, "node_threshold": 0.8,
    }  # fmt: skip
    common = {"run_idx": 0, "reverse_ctx_idx": 0}
    assert json.loads(path.read_text()) == {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": ["4_6_2"], "supernodes": [["names", "4_6_2", "E_317_1"]],
            "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": [
            {
                "node_id": "E_317_1", "feature": 1, "layer": "E", "ctx_idx": 1,
                "feature_type": "embedding", "token_prob": 0.0, "is_target_logit": False,
                "jsNodeId": "E_317-1", "clerp": " Once", "influence": 0.9, "activation": None,
                **common,
            },
            {
                "node_id": "4_6_2", "feature": 61, "layer": "4", "ctx_idx": 2,
                "feature_type": "cross layer transcoder", "token_prob": 0.0,
                "is_target_logit": False, "jsNodeId": "4_6-2", "clerp": "L4.6",
                "influence": 0.31, "activation": 1.43, **common,
            },
            {
                "node_id": "error_mlp_3_2", "feature": -1, "layer": "3", "ctx_idx": 2,
                "feature_type": "mlp reconstruction error", "token_prob": 0.0,
                "is_target_logit": False, "jsNodeId": "3_0-2", "clerp": "", "influence": None,
                "activation": None, **common,
            },
            {
                "node_id": "6_42_2", "feature": 42, "layer": "6", "ctx_idx": 2,
                "feature_type": "logit", "token_prob": 0.12345, "is_target_logit": True,
                "jsNodeId": "6_42-2", "clerp": 'Output " "a"" (p=0.123)', "influence": None,
                "activation": None, **common,
            },
        ],
        "links": [
            {"source": "E_317_1", "target": "4_6_2", "weight": 1.61},
            {"source": "error_mlp_3_2", "target": "4_6_2", "weight": -0.5},
            {"source": "4_6_2", "target": "6_42_2", "weight": 0.25},
        ],
    }  # fmt: skip
    index = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())
    assert index == {"graphs": [metadata]}


def test_features_hold_z_patterns(tmp_path):
    example = Example(
        tokens=["<s>", " Lily", " saw", " Lily"], z_pattern=[0.1, 2.0, 0.0, 0.0], query=3
    )
    other = Example(tokens=["a"], z_pattern=[-0.5], query=0)
    save_graph(tmp_path, graph(), examples={(4, 6): [example, other]})
    feature = json.loads((tmp_path / "features" / "61.json").read_text())
    assert set(feature) == {
        "transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min",
        "act_max", "quantile_values", "histogram", "activation_frequency",
    }  # fmt: skip
    assert feature["index"] == 61
    assert (feature["act_min"], feature["act_max"]) == (-0.5, 2.1)
    (quantile,) = feature["examples_quantiles"]
    assert quantile["examples"][0] == {
        "tokens": ["<s>", " Lily", " saw", " Lily"], "tokens_acts_list": [0.1, 2.0, 0.0, 0.0],
        "train_token_ind": 3, "is_repeated_datapoint": False,
    }  # fmt: skip


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_a_feature_number_can_be_undone(layer, head):
    number = cantor(layer, head)
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    found = number - diagonal * (diagonal + 1) // 2
    assert (diagonal - found, found) == (layer, head)


def test_graphs_are_added_and_replaced(tmp_path):
    for slug in ("one", "two", "one"):
        save_graph(tmp_path, graph(slug=slug))
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [entry["slug"] for entry in index["graphs"]] == ["two", "one"]
    assert {p.name for p in tmp_path.iterdir()} == {"one.json", "two.json", "graph-metadata.json"}


STRANGE = Node(kind="head", pos=0, layer=0, index=0)
REFUSED = {
    "slug": ({"slug": "../x"}, "slug = '../x': letters, digits, - and _ only"),
    "twice": ({"nodes": [TOKEN, TOKEN], "links": []}, "node E_317_1 is there 2 times"),
    "position": ({"prompt_tokens": ["<s>", "a"]}, "node 4_6_2 is at position 2 of 2, from 0"),
    "end of a link": (
        {"links": [Link(source=STRANGE, target=HEAD, weight=1.0)]},
        "a link's source 0_0_0 is no node of the graph",
    ),
    "weight": (
        {"links": [Link(source=TOKEN, target=HEAD, weight=math.nan)]},
        "the weight of E_317_1 to 4_6_2 is nan",
    ),
    "influence": (
        {"nodes": [Node(kind="head", pos=0, influence=1.5)], "links": []},
        "node 0_0_0: influence = 1.5 is a share, 0 to 1",
    ),
    "activation": (
        {"nodes": [Node(kind="head", pos=0, activation=math.inf)], "links": []},
        "node 0_0_0: activation is inf",
    ),
    "pinned": ({"pinned": [STRANGE]}, "0_0_0 is pinned or grouped, but is no node of the graph"),
    "grouped": ({"supernodes": {"x": [STRANGE]}}, "0_0_0 is pinned or grouped"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_page_cannot_draw_is_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_graph(tmp_path / "graphs", graph(**changes))
    assert not (tmp_path / "graphs").exists()


def test_slugs_are_made_of_any_name():
    names = {
        "Qwen3-1.7B": "Qwen3-1-7B",
        "../a b/": "a-b",
        "gpt2": "gpt2",
        "": "graph",
        "é": "graph",
    }
    assert {name: slug_of(name) for name in names} == names
    for slug in names.values():
        check_slug(slug)


TRACED = {"pairs": [("a", "b", 1.0)], "queries": [("a", 0.5)], "keys": [("b", -0.5)]}


def test_qk_tracing_stands_with_its_head():
    traced = graph_values(graph(qk_tracing={HEAD: QKTracing(**TRACED)}))
    check_graph(traced)
    (results,) = [n["qk_tracing_results"] for n in traced["nodes"] if "qk_tracing_results" in n]
    assert results == {
        "pair_wise": [["a", "b", 1.0]],
        "top_q_marginal": [["a", 0.5]],
        "top_k_marginal": [["b", -0.5]],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [("a", 1.0)]}, r"pair_wise holds \['a', 1.0\], not 2 names and a number"),
        ({"keys": [(3, 1.0)]}, r"top_k_marginal holds \[3, 1.0\], not 1 names and a number"),
        ({"queries": [("a", math.inf)]}, "node 4_6_2: top_q_marginal of a is inf"),
    ],
)
def test_qk_tracing_that_is_none_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        check_graph(graph_values(graph(qk_tracing={HEAD: QKTracing(**{**TRACED, **changes})})))


def test_every_kind_of_node_has_a_name_of_its_own():
    kinds = [
        Node(kind="head", pos=2, layer=0, index=3),
        Node(kind="feature", pos=2, layer=0, index=3),
        Node(kind="attention_head", pos=2, layer=0, index=3),
        Node(kind="attention_head", pos=2, layer=0, index=3, source=1),
        Node(kind="mlp", pos=2, layer=0),
        *(Node(kind=kind, pos=2, layer=3, module=module)
          for kind in ("bias", "error") for module in ("attn", "mlp")),
        Node(kind="offset", pos=2, layer=3),
        Node(kind="position", pos=2),
        TOKEN,
        LOGIT,
    ]  # fmt: skip
    values = graph_values(graph(nodes=kinds, links=[]))
    check_graph(values)
    assert len({(n["layer"], n["feature"], n["ctx_idx"]) for n in values["nodes"]}) == len(kinds)
    errors = [n["node_id"] for n in values["nodes"] if "error" in n["feature_type"]]
    assert errors == ["error_attn_3_2", "error_mlp_3_2"]


def test_cumulative_counts_from_the_largest():
    assert cumulative([1.0, 5.0, 0.0, 2.0]) == pytest.approx([1.0, 0.625, 1.0, 0.875])
    assert cumulative([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_pattern": [1.0]}, "example 0 of feature 61 has 2 tokens, but 1 values"),
        ({"query": 2}, "example 0 of feature 61 marks token 2 of 2, from 0"),
        ({"z_pattern": [1.0, math.nan]}, "example 0 of feature 61 is nan"),
    ],
)
def test_examples_that_do_not_fit_are_refused(tmp_path, changes, message):
    example = Example(**{"tokens": ["a", "b"], "z_pattern": [1.0, 2.0], "query": 1, **changes})
    with pytest.raises(ValueError, match=message):
        save_graph(tmp_path / "graphs", graph(), examples={(4, 6): [example]})
    assert not (tmp_path / "graphs").exists()
