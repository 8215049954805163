"""A graph of a name in a story: the pretrained model of TinyStories, where it is at hand."""

import pytest
import torch
import zoo
from test_stories import bridge

from lorsa_lens import Lorsa
from lorsa_lens.circuits import (
    Replay,
    Target,
    ablate,
    attribution_graph,
    first_order_effects,
    graph_scores,
    graph_size,
    intervene,
    local_replacement,
    prune,
    trust_report,
)

STORY = (
    "Once upon a time, there was a little girl named Lily. She had a friend named Ben. One day, "
    "Ben and"
)


def test_a_graph_of_a_name_in_a_story(assets):
    """Exact lifts with the 16 strongest of 64 dimensions: errors carry the rest."""
    with zoo.quiet():
        model = bridge(assets / "stories260k").eval()
    lorsas = [Lorsa.from_attention(model, layer, k=16) for layer in range(5)]
    replacement = local_replacement(model, lorsas, model.to_tokens(STORY))
    name = int(replacement.stream.logits[-1].argmax())
    assert model.tokenizer.convert_ids_to_tokens(name).strip("▁") == "Lily"
    assert replacement.tokens[-1].strip("▁") == "and"
    target = Target.logit(name)
    assert graph_size(replacement, n_nodes=400).n_bytes < 2 * 2**30
    graph = attribution_graph(replacement, target, n_nodes=400)
    total = graph.edges.sum(1) + graph.constants + graph.missing
    largest = float(graph.pre_activations.abs().max())
    torch.testing.assert_close(total, graph.pre_activations, rtol=1e-4, atol=1e-4 * largest)
    assert 0 < graph_scores(graph).replacement < 1
    assert len(prune(graph).nodes) < len(graph.nodes) / 2
    report = trust_report(replacement, graph, target, n_edges=1, n_nodes=20)
    assert report.nodes_first_order.sign_agreement >= 0.8


@pytest.mark.parametrize(
    ("story", "token"),
    [
        (STORY, "▁Lily"),
        ("Once upon a time there was a boy called Ben. Ben loved to play with his friend Mia. Mia"
         " and", "▁B"),
        ("There was a boy named Sam. Sam had a red ball. One day, Sam's mom said to", "▁S"),
    ],
)  # fmt: skip
def test_ablating_the_top_heads_lowers_the_name_as_predicted(story, token, assets):
    """In exact lifts with the 16 strongest of 64 dimensions: errors carry the rest."""
    with zoo.quiet():
        model = bridge(assets / "stories260k").eval()
    lorsas = [Lorsa.from_attention(model, layer, k=16) for layer in range(5)]
    replacement = local_replacement(model, lorsas, model.to_tokens(story))
    name = int(replacement.stream.logits[-1].argmax())
    assert model.tokenizer.convert_ids_to_tokens(name) == token
    replay = Replay(replacement, Target.logit(name))
    heads = first_order_effects(replay).top(20, kinds=["head"])
    effects = [intervene(replacement, ablate([node]), replay=replay, live=True) for node in heads]
    measured = [float(effect.measured[-1]) for effect in effects]
    assert len(measured) == 20
    assert sum(change < 0 for change in measured) >= 16
