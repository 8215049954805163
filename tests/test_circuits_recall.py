"""Circuits of models whose circuits are known, and of a small pretrained one."""

import runpy
from pathlib import Path

import pytest
import torch

from lorsa_lens import Lorsa, splice
from lorsa_lens.circuits import (
    Replay,
    Target,
    agreement,
    attention_effects,
    attribution_graph,
    edge_effects,
    graph_scores,
    group_by_label,
    local_replacement,
    nodes_for,
    prune,
    stability,
    strongest_chain,
    top_edges,
    trust_report,
)
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.training import TrainingConfig, train_on

EXAMPLES = Path(__file__).parents[1] / "examples"
recall_prompt = runpy.run_path(str(EXAMPLES / "trace_recall.py"))["recall_prompt"]
N_STEPS = 150


@pytest.fixture(scope="module", params=["recall", "induction"])
def replaced(request):
    """A model, its language, and Lorsas of both layers."""
    model, language = load_model(request.param), load_language(request.param)
    seen = language.sample(512, seed=1).tokens
    lorsas = {
        layer: Lorsa.from_attention(model, layer, n_qk_heads=8, n_ov_heads=256, k=8)
        for layer in (0, 1)
    }
    batch = 16 * seen.shape[1]
    config = TrainingConfig(
        train_batch_size_tokens=batch, context_size=seen.shape[1], training_tokens=N_STEPS * batch
    )
    train_on(lorsas, record_attention(model, seen, [0, 1]), config)
    return request.param, model, language, list(lorsas.values())


def prompts(name, language, n):
    """Prompts and their answers."""
    if name == "recall":
        return [recall_prompt(seed) for seed in range(n)]
    labels = language.sample(n, seed=50)
    found = []
    for row in range(n):
        query = int((labels.answer[row] >= 0).nonzero()[-1])
        found.append((labels.tokens[row, : query + 1], int(labels.answer[row, query])))
    return found


def against_the_next_best(replacement, answer):
    others = replacement.stream.logits[-1].clone()
    others[answer] = -torch.inf
    return Target.difference(answer, int(others.argmax()))


def looked_at(replacement, node):
    """The token that a Lorsa head attends to most, and how much."""
    stream, lorsa = replacement.stream, replacement.lorsas[node.layer]
    x = stream.layers[node.layer].x[None].float()
    row = lorsa.pattern(x, [node.index // lorsa.cfg.group_size])[0, 0, node.pos]
    return int(row.argmax())


def test_the_replaced_model_keeps_its_loss(replaced):
    _, model, language, lorsas = replaced
    labels = language.sample(64, seed=9)
    known = labels.answer >= 0

    def loss():
        with torch.no_grad():
            predicted = model(labels.tokens).log_softmax(-1)
        chosen = predicted.gather(-1, labels.answer.clamp(min=0)[..., None])[..., 0]
        return -chosen[known].mean().item()

    def averaged(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        mean = first.mean((0, 1), keepdim=True).expand_as(first)
        return (mean, *out[1:]) if isinstance(out, tuple) else mean

    whole = loss()
    with splice(model, lorsas):
        with_lorsas = loss()
    host = host_of(model)
    handles = [host.attention(layer).register_forward_hook(averaged) for layer in (0, 1)]
    ablated = loss()
    for handle in handles:
        handle.remove()
    assert ablated > 2
    assert (ablated - with_lorsas) / (ablated - whole) >= 0.99


def test_previous_token_head_induction_head_answer(replaced):
    """In the induction model attention to the previous token is spread over several offsets."""
    name, model, language, lorsas = replaced
    found = []
    for prompt, answer in prompts(name, language, 4):
        replacement = local_replacement(model, lorsas, prompt)
        assert int(replacement.stream.logits[-1].argmax()) == answer
        target = against_the_next_best(replacement, answer)
        graph = attribution_graph(replacement, target, n_nodes="all")
        last = len(prompt) - 1
        upper = [n for n in graph.nodes if n.kind == "head" and n.layer == 1 and n.pos == last]
        chain = strongest_chain(graph, attention_effects(replacement, upper))
        previous, induction, logit = chain.nodes
        assert (previous.layer, induction.layer, logit) == (0, 1, graph.targets[0])
        source = looked_at(replacement, induction)
        assert int(prompt[source]) == answer
        assert int(prompt[source - 1]) == int(prompt[last])  # what the query looks for
        assert previous.pos == source
        found.append(looked_at(replacement, previous) == source - 1)
        if name == "recall":
            assert chain.via == ("pattern", "values")
    assert sum(found) >= (4 if name == "recall" else 3)


def test_live_effects_follow_the_edges(replaced):
    name, model, language, lorsas = replaced
    if name != "recall":
        pytest.skip("stated for the recall model")
    predicted, measured = [], []
    for prompt, answer in prompts(name, language, 4):
        replacement = local_replacement(model, lorsas, prompt)
        target = against_the_next_best(replacement, answer)
        graph = attribution_graph(replacement, target, n_nodes="all")
        effects = edge_effects(graph, Replay(replacement, target), top_edges(graph, 50), live=True)
        predicted.append(effects.predicted)
        measured.append(effects.measured)
    assert agreement(torch.cat(predicted), torch.cat(measured)).correlation >= 0.9


def test_a_report_of_how_far_to_believe(replaced):
    name, model, language, lorsas = replaced
    prompt, answer = prompts(name, language, 1)[0]
    replacement = local_replacement(model, lorsas, prompt)
    target = against_the_next_best(replacement, answer)
    graph = attribution_graph(replacement, target, n_nodes="all")
    report = trust_report(replacement, graph, target, n_edges=20, n_nodes=5)
    assert report.edges_frozen.largest_error < 1e-4
    assert report.edges_frozen.correlation == pytest.approx(1.0)
    assert report.edges_live.largest_error > 1e-2  # norms and patterns do answer
    assert report.nodes_live.n == 5
    assert report.completeness == graph_scores(graph).completeness > 0.9
    assert "edges, frozen" in str(report)
    with pytest.raises(ValueError, match="n_edges = 0 must be positive"):
        trust_report(replacement, graph, target, n_edges=0)


def test_numbers_of_nodes_at_equal_completeness(replaced):
    """Lorsa heads against original heads split by source token: docs/circuits.md has more."""
    name, model, language, lorsas = replaced
    if name != "recall":
        pytest.skip("one model is enough: there are 1326 nodes")
    prompt, answer = prompts(name, language, 1)[0]
    replacement = local_replacement(model, lorsas, prompt)
    target = against_the_next_best(replacement, answer)
    graph = attribution_graph(replacement, target, n_nodes="all")
    original = local_replacement(model, [], prompt, attention="heads_by_source")
    split = attribution_graph(original, target, n_nodes="all")
    assert len(graph.nodes) < len(split.nodes)
    assert graph_scores(split).completeness == pytest.approx(1.0)  # there are no errors
    for completeness in (0.8, 0.9):
        assert nodes_for(graph, completeness) <= 15
        assert nodes_for(split, completeness) <= 4


def test_graphs_of_paraphrases_share_units(replaced):
    name, model, language, lorsas = replaced
    if name != "recall":
        pytest.skip("stated for the recall model")
    prompt, answer = prompts(name, language, 1)[0]
    source = int((prompt == answer).nonzero()[0])
    words = prompt.tolist()
    swapped = torch.tensor([words[0], *words[3:5], *words[1:3], *words[5:]])
    assert source > 4
    graphs = []
    for tokens in (prompt, swapped, prompts(name, language, 2)[1][0]):
        replacement = local_replacement(model, lorsas, tokens)
        target = Target.logit(int(replacement.stream.logits[-1].argmax()))
        graphs.append(prune(attribution_graph(replacement, target), node_threshold=0.7))
    same, other = stability(graphs[:2]), stability([graphs[0], graphs[2]])
    assert same.units > other.units  # two pairs before the one that matters changed places
    labels = {(node.layer, node.index): "any" for node in graphs[0].nodes if node.kind == "head"}
    grouped = group_by_label(graphs[0], labels)
    assert sum(map(len, grouped.supernodes.values())) == len(
        [node for node in graphs[0].nodes if node.kind == "head"]
    )
