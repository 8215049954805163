"""Numbers of the published programs, on the two models that are beside the repository."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import quiet

from lorsa_lens.singular import (
    AugmentedFiring,
    Cumulative,
    Edge,
    Firing,
    Greedy,
    Node,
    Relative,
    RelativeFiring,
    break_down,
    intervene,
    logit_seeds,
    probability_seeds,
    record_stream,
    select_cumulative,
    select_relative,
    signal,
    trace,
    trace_firings,
)
from lorsa_lens.singular.augmented import augmented_basis
from lorsa_lens.singular.graph import firing_node

FOLDER = Path(__file__).parents[2] / "shared" / "reference" / "singular_vectors"
NAMES = ["pythiaish", "trained_recall"]

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference numbers are not beside the repository"
)


class Reference:
    """A model, its prompts taken apart, and what the published programs say of it."""

    def __init__(self, name):
        transformer_lens = pytest.importorskip("transformer_lens")
        if not hasattr(transformer_lens, "HookedTransformer"):
            pytest.skip("the reference models are HookedTransformers")
        self.name = name
        arrays = np.load(FOLDER / "models" / f"{name}.npz")
        fields = json.loads(str(arrays["__cfg__"]))
        with quiet():
            cfg = transformer_lens.HookedTransformerConfig(**fields, device="cpu")
            model = transformer_lens.HookedTransformer(cfg).eval()
        weights = {k: torch.tensor(arrays[k]) for k in arrays.files if k[:2] != "__"}
        model.load_state_dict(weights, strict=False)
        self.n_heads = model.cfg.n_heads
        self.streams = [record_stream(model, row) for row in torch.tensor(arrays["__tokens__"])]

    def read(self, method):
        path = FOLDER / f"{method}_{self.name}.json"
        if not path.exists():
            pytest.skip(f"{method} was not run on {self.name}")
        return json.loads(path.read_text()), np.load(path.with_suffix(".npz"))

    def number(self, component):
        """The id that the files give a component."""
        special = {"mlp": 0, "bias": 1, "embedding": 2, "offset": 3}
        return (
            component.head if component.kind == "head" else self.n_heads + special[component.kind]
        )

    def label(self, node):
        if node.kind == "root":
            return f"('root', 't{node.dest}')"
        names = {"mlp": "MLP", "embedding": "Embedding", "bias": "AH bias", "offset": "AH offset"}
        return str((node.layer, names.get(node.kind, node.head), f"t{node.dest}", f"t{node.src}"))


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    return Reference(request.param)


def keyed(firings):
    """The stored firings, with their keys as tuples."""
    return [(ast.literal_eval(key), key, stored) for key, stored in firings.items()]


def test_singular_values(reference):
    _, arrays = reference.read("accpp")
    stored = arrays["singular_values"]
    for layer, head in np.ndindex(stored.shape[:2]):
        S = reference.streams[0].reading(layer, head).head.basis.S
        np.testing.assert_allclose(S, stored[layer, head], atol=1e-4)


def test_greedy_sets_and_weights_of_every_firing(reference):
    values, _ = reference.read("accpp")
    for (prompt, layer, head, dest, src), _, stored in keyed(values["firings"]):
        stream = reference.streams[prompt]
        reading = stream.reading(layer, head)
        assert Greedy().fires(stream, Firing(layer, head, dest, src))
        for side, position in (("dest", dest), ("src", src)):
            found = Greedy().explain_side(stream, reading, dest, src, side)

            def key(component, position=position):
                source = component.source if component.kind == "head" else position
                return str((component.layer, reference.number(component), source))

            sets = {key(c): list(vectors) for c, vectors in found.vectors.items()}
            assert sets == stored[f"svs_{side}"]
            weights = {key(c): weight for c, weight in found.weights.items()}
            assert weights == pytest.approx(stored[f"ew_{side}"], abs=1e-3)
            raw = reading.raw[dest, : dest + 1].numpy()
            np.testing.assert_allclose(raw, stored[f"sum_scores_{side}"], atol=1e-3)


@pytest.mark.parametrize("side", ["dest", "src"])
def test_breakdown_and_integrated_gradients(reference, side):
    values, arrays = reference.read("accpp")
    with_arrays = [key for key in values["firings"] if f"{key}|ig_{side}" in arrays.files]
    assert len(with_arrays) == 4
    for key in with_arrays:
        prompt, layer, head, dest, src = ast.literal_eval(key)
        stream, position = reference.streams[prompt], dest if side == "dest" else src
        shape = values["firings"][key]["shape"]
        terms = break_down(stream, Firing(layer, head, dest, src), side)
        reading = stream.reading(layer, head)
        gradients = terms.weighted(Greedy().softmax(reading, dest, src).gradient(terms.raw))
        gradients = gradients.reshape(-1, terms.n_vectors)
        mine, mine_ig = np.zeros((*shape, dest + 1)), np.zeros(shape)
        for number, c in enumerate(terms.components):
            at = (c.layer, reference.number(c), slice(None))
            at = (*at, c.source if c.kind == "head" else position)
            mine[at], mine_ig[at] = terms.part(number)[:, : dest + 1], gradients[number]
        stored = arrays[f"{key}|breakdown_{side}"].reshape(mine.shape)
        np.testing.assert_allclose(mine, stored, atol=1e-3)
        stored = arrays[f"{key}|ig_{side}"].reshape(shape)
        np.testing.assert_allclose(mine_ig, stored, atol=1e-4)


@pytest.mark.parametrize("seeding", ["linear", "prob"])
def test_greedy_seeds_and_graphs(reference, seeding):
    values, _ = reference.read("accpp")
    stream, (answer, wrong) = reference.streams[0], values["logit_pair"]
    seeds = logit_seeds(stream, answer, wrong)
    if seeding == "prob":
        seeds = probability_seeds(stream, answer)
    stored = {(a, b, c): weight for a, b, c, weight in values[f"seeds_{seeding}"]}
    found = {}
    for component, position, weight in seeds:
        source = component.source if component.kind == "head" else position
        found[component.layer, reference.number(component), source] = weight
    assert found == pytest.approx(stored, abs=1e-3)
    circuit = trace(stream, seeds)
    check_graph(reference, circuit, values[f"graph_{seeding}"])


def check_graph(reference, circuit, graph):
    nodes = {reference.label(node): circuit.attention.get(node, -1.0) for node in circuit.nodes}
    assert nodes == pytest.approx(dict(graph["nodes"]), abs=1e-3)
    edges = {
        (reference.label(e.up), reference.label(e.down), e.side[0]): (
            e.weight,
            str(list(e.vectors)) if e.vectors else None,
        )
        for e in circuit.edges
    }
    assert len(edges) == len(circuit.edges)
    stored = {(up, down, side): (w, svs) for up, down, side, w, svs in graph["edges"]}
    assert {k: v[1] for k, v in edges.items()} == {k: v[1] for k, v in stored.items()}
    weights = {k: v[0] for k, v in edges.items()}
    assert weights == pytest.approx({k: v[0] for k, v in stored.items()}, abs=1e-3)


def test_relative_sets_contributions_and_components(reference):
    values, arrays = reference.read("acc")
    for (_, layer, head, dest, src), key, stored in keyed(values["firings"]):
        firing = Firing(layer, head, dest, src)
        assert Relative().fires(reference.streams[0], firing)
        relative = RelativeFiring(reference.streams[0], firing)
        for side, position in (("dest", dest), ("src", src)):
            contributions = relative.contributions(side)
            np.testing.assert_allclose(contributions, arrays[f"{key}|sv_{side}"], atol=3e-3)
            selected = select_relative(contributions)
            assert selected == stored[f"S_{side}"]
            components, amounts = relative.upstream(side, selected)
            expected = arrays[f"{key}|up_{side}"]
            mine = np.zeros_like(expected)
            for component, amount in zip(components, amounts.tolist(), strict=True):
                if component.kind == "embedding":
                    assert amount == pytest.approx(stored[f"start_{side}"], abs=3e-3)
                    continue
                source = component.source if component.kind == "head" else position
                mine[component.layer, reference.number(component), source] = amount
            np.testing.assert_allclose(mine, expected, atol=3e-3)


def test_relative_graph(reference):
    values, _ = reference.read("acc")
    stream = reference.streams[0]
    circuit = trace(stream, logit_seeds(stream, *values["logit_pair"]), method=Relative())
    edges = {(reference.label(e.up), reference.label(e.down), e.side[0]): e for e in circuit.edges}
    stored = {(up, down, side): weight for up, down, side, weight in values["graph_edges"]}
    assert {k: e.weight for k, e in edges.items()} == pytest.approx(stored, abs=1e-3)
    assert len(circuit.nodes) == values["n_nodes"]


def test_cumulative_terms_sets_and_contributions(reference):
    values, arrays = reference.read("sad")
    stored_S = arrays["singular_values"]
    for layer, head in np.ndindex(stored_S.shape[:2]):
        S = augmented_basis(reference.streams[0].reading(layer, head).head).S
        np.testing.assert_allclose(S, stored_S[layer, head], atol=1e-4)
    for number, (prompt, *firing) in enumerate(arrays["firing_keys"].tolist()):
        stream, firing = reference.streams[prompt], Firing(*firing)
        stored = values["firings"][str((prompt, *firing))]
        assert Cumulative().fires(stream, firing)
        augmented = AugmentedFiring(stream, firing)
        np.testing.assert_allclose(augmented.terms, arrays["products"][number], atol=3e-3)
        assert select_cumulative(augmented.terms) == stored["S"]
        for side in ("dest", "src"):
            upstream = augmented.upstream(side, stored["S"])
            np.testing.assert_allclose(upstream, stored[f"contrib_{side}"], atol=3e-3)


def test_cumulative_fires_where_it_was_published(reference):
    _, arrays = reference.read("sad")
    stored = {tuple(key) for key in arrays["firing_keys"].tolist()}
    fires = set()
    for prompt, stream in enumerate(reference.streams):
        for layer in range(len(stream.layers)):
            for head, dest, src in (stream.layers[layer].pattern > 0.4).nonzero().tolist():
                if Cumulative().fires(stream, Firing(layer, head, dest, src)):
                    fires.add((prompt, layer, head, dest, src))
    assert fires == stored


def test_cumulative_traces(reference):
    values, _ = reference.read("sad")
    assert values["traces"]
    for (prompt, *firing), _, stored in keyed(values["traces"]):
        edges = trace_firings(reference.streams[prompt], [Firing(*firing)], Cumulative())
        found = {
            (*edge.down[1:3], *edge.up[1:3], edge.down.src, edge.down.dest, edge.side[0]): edge
            for edge in edges
        }
        expected = {(*row[:6], row[7]): row[6] for row in stored["edges"]}
        assert {k: e.weight for k, e in found.items()} == pytest.approx(expected, abs=3e-3)


def test_published_interventions(reference):
    values, _ = reference.read("accpp")
    stream, (answer, wrong) = reference.streams[0], values["logit_pair"]
    assert len(values["interventions"]) in (28, 48)
    for stored in values["interventions"]:
        report = intervene(
            stream,
            edge_of(reference, stored["edge"]),
            mode=stored["type"],
            boost=stored["boost"],
            answer=answer,
            wrong=wrong,
        )
        (effect,) = report.effects
        found = {
            "attn_clean": effect.attention_before,
            "attn_interv": effect.attention_after,
            "cos": effect.cosine,
            "norm_ratio": effect.norm_ratio,
            "delta_norm": effect.delta_norm,
            "logit_diff_clean": report.logit_difference_before,
            "logit_diff_interv": report.logit_difference_after,
        }
        assert found == pytest.approx({name: stored[name] for name in found}, abs=1e-2)


def edge_of(reference, row):
    """An edge as the files write it: down layer, head, dest, src, up layer, id, dest, src, ..."""
    layer, head, dest, src, up_layer, number, up_dest, up_src, side, vectors = row
    kinds = ["mlp", "bias", "embedding"]
    kind = "head" if number < reference.n_heads else kinds[number - reference.n_heads]
    up_head = number if kind == "head" else None
    return Edge(
        up=Node(kind, up_layer, up_head, up_dest, up_src),
        down=firing_node(Firing(layer, head, dest, src)),
        side={"d": "dest", "s": "src"}[side],
        weight=0.0,
        vectors=tuple(vectors),
    )


def test_signals_in_three_flavours(reference):
    values, arrays = reference.read("accpp")
    edges = [edge_of(reference, stored["edge"]) for stored in values["interventions"]]
    names = {
        "read": "signal_rotated_normalized",
        "normalized": "signal_normalized",
        "raw": "signal_raw",
    }
    for flavour, name in names.items():
        found = [signal(reference.streams[0], edge, flavour=flavour).numpy() for edge in edges]
        nearest = min(np.abs(vector - arrays[name]).max() for vector in found)
        assert nearest < 1e-4
