"""A graph of a name in a story: the pretrained model of TinyStories, where it is at hand."""

import torch
import zoo
from test_stories import bridge

from lorsa_lens import Lorsa
from lorsa_lens.circuits import (
    Replay,
    Target,
    ablate,
    attribution_graph,
    graph_scores,
    graph_size,
    intervene,
    local_replacement,
    node_influence,
    prune,
)

STORY = (
    "Once upon a time, there was a little girl named Lily. She had a friend named Ben. One day, "
    "Ben and"
)


def test_ablating_the_top_heads_moves_the_name_as_predicted(assets):
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
    scores = node_influence(graph)
    heads = [node for node in graph.nodes if node.kind == "head"]
    heads = sorted(heads, key=lambda node: -float(scores[graph.index(node)]))[:20]
    replay, right = Replay(replacement, target), 0
    for node in heads:
        effects = intervene(replacement, ablate([node]), replay=replay, live=True)
        predicted, measured = effects.of(graph.targets[0])
        right += (predicted < 0) == (measured < 0)
    assert right >= 16
