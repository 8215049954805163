"""Edges sum to what they claim, and interventions do what is predicted, on hosts of every kind."""

import jaxtyping
import pytest
import torch
import zoo

from lorsa_lens import Lorsa
from lorsa_lens.circuits import (
    Node,
    Replay,
    Target,
    ablate,
    attention_effects,
    attribution_graph,
    edge_effects,
    first_order_effects,
    graph_size,
    head_loadings,
    intervene,
    local_replacement,
    path_effect,
    steer,
    top_edges,
)
from lorsa_lens.hosts import UnsupportedAttentionError
from lorsa_lens.recording import record_attention

HOSTS = [
    "learned", "rotary-adjacent", "llama", "gemma2", "qk-norm", "bridge-gpt2", "bridge-gptneox",
    "bridge-llama", "bridge-gemma2", "bridge-qwen3",
]  # fmt: skip
"""GPT-2, parallel (GPT-J and GPT-NeoX), grouped queries, norms after modules, QK norm; on either
host. Hugging Face's RMS norms round to float32."""
DIFFERENCE = Target.difference(5, 9)


class HandMade:
    """A transcoder of anybody's own, with a ReLU."""

    def __init__(self, seed=0, d_sae=40):
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {
            "W_enc": (zoo.D_MODEL, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, zoo.D_MODEL),
            "b_dec": (zoo.D_MODEL,),
        }.items():  # fmt: skip
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, 0.3 * weight)


def build(name):
    return zoo.by_name(name).build(torch.float64)


def mixed(model, **options):
    """A Lorsa at layer 0, the heads of layer 1; a transcoder at layer 1, the MLP of layer 0."""
    lorsa = Lorsa.from_attention(model, 0, k=3)
    return local_replacement(model, lorsa, zoo.tokens(1, 6), **options)


def one_of_each(nodes):
    kinds = {(node.kind, node.layer, node.module): node for node in nodes}
    return list(kinds.values())


# -------------------------------------------------------------------------------------- the sums


@pytest.mark.parametrize("name", [*HOSTS, "olmo2", "shortformer", "bridge-gpt2-processed"])
def test_edges_sum_to_what_the_host_computes(name):
    model, tokens = build(name), zoo.tokens(1, 6)
    lorsas = [Lorsa.from_attention(model, layer, k=3) for layer in (0, 1)]
    replacement = local_replacement(model, lorsas, tokens, transcoders={1: HandMade()})
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    assert {node.kind for node in graph.nodes} >= {
        "token", "head", "feature", "mlp", "bias", "error", "logit",
    }  # fmt: skip
    total = graph.edges.sum(1) + graph.constants
    read = torch.tensor([not node.is_leaf for node in graph.nodes])
    torch.testing.assert_close(total[read], graph.pre_activations[read], rtol=1e-5, atol=1e-6)
    # What the pre-activations are, by the package's own modules and the host's logits.
    records = record_attention(model, tokens, [0, 1])
    for lorsa in lorsas:
        seen = records[lorsa.cfg.layer].seen_by(lorsa)
        acts = lorsa.outputs(seen.x, **seen.context).acts_pre[0]
        for node in graph.nodes:
            if node.kind == "head" and node.layer == lorsa.cfg.layer:
                value = float(graph.pre_activations[graph.index(node)])
                assert value == pytest.approx(acts[node.pos, node.index].item(), abs=1e-5)
    resid = replacement.stream.resid_final[None]
    norm = model.ln_final
    with torch.no_grad():
        logits = model.unembed(norm(resid))[0, -1]
    assert float(graph.pre_activations[-1]) == pytest.approx(
        (logits[5] - logits[9]).item(), abs=1e-5
    )


@pytest.mark.parametrize("attention", ["frozen", "heads", "heads_by_source"])
@pytest.mark.parametrize("name", ["learned", "gemma2", "bridge-gptneox"])
def test_original_attention_in_any_form(name, attention):
    model = build(name)
    replacement = mixed(model, attention=attention)
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    heads = [node for node in graph.nodes if node.kind == "attention_head"]
    assert bool(heads) == (attention != "frozen")
    assert all((node.source is not None) == (attention == "heads_by_source") for node in heads)
    total = graph.edges.sum(1) + graph.constants
    read = torch.tensor([not node.is_leaf for node in graph.nodes])
    torch.testing.assert_close(total[read], graph.pre_activations[read], rtol=1e-7, atol=1e-7)
    # All that is written together is the stream.
    written = sum(stage.writers.total() for stage in replacement.stages)
    if attention == "frozen":
        stage = replacement.stages[replacement.before_attention(1) + 1]
        written = written + stage.respond(replacement.stream.layers[1].resid_pre)[1]
    torch.testing.assert_close(written, replacement.stream.resid_final, rtol=1e-7, atol=1e-7)


def test_gradients_say_the_same():
    """The oracle of one edge: autograd, with the scale of the norm and the pattern detached."""
    model = build("attn-only")
    lorsas = [Lorsa.from_attention(model, layer, k=4) for layer in (0, 1)]
    replacement = local_replacement(model, lorsas, zoo.tokens(1, 6))
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    sources = [node for node in graph.nodes if node.kind in ("token", "head") and node.layer < 1]
    target = next(node for node in graph.nodes if node.kind == "head" and node.layer == 1)
    stream, lorsa = replacement.stream, lorsas[1]
    resid = stream.layers[1].resid_pre.clone().requires_grad_(True)
    ln = model.blocks[1].ln1
    centred = resid - resid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + ln.eps).sqrt().detach()
    x = centred / scale * ln.w + ln.b
    pattern = lorsa.pattern(x.detach()[None], [target.index // lorsa.cfg.group_size])[0, 0]
    z = (pattern[target.pos] @ (x @ lorsa.W_V[target.index] + lorsa.b_V[target.index])).sum()
    (gradient,) = torch.autograd.grad(z, resid)
    for source in sources:
        expected = float(gradient[source.pos] @ replacement.vector(source))
        assert graph.edge(source, target) == pytest.approx(expected, abs=1e-9)


def test_growth_keeps_the_sums_and_says_what_is_missing():
    replacement = mixed(build("learned"), attention="heads")
    whole = attribution_graph(replacement, n_nodes="all")
    small = attribution_graph(replacement, n_nodes=7, batch_size=3)
    units = [node for node in small.nodes if not node.is_leaf and node.kind != "logit"]
    assert len(units) == 7
    for node in small.targets:
        row, full = small.index(node), whole.index(node)
        kept = [whole.index(other) for other in small.nodes]
        torch.testing.assert_close(small.edges[row], whole.edges[full][kept])
        left_out = whole.edges[full].sum() - whole.edges[full][kept].sum()
        assert float(small.missing[row]) == pytest.approx(float(left_out))
        assert float(small.gross[row]) == pytest.approx(float(whole.edges[full].abs().sum()))
    assert sum(small.probabilities.values()) > 0
    # One batch at a time gives the same edges as all at once.
    at_once = attribution_graph(replacement, n_nodes="all", batch_size=1000)
    torch.testing.assert_close(at_once.edges, whole.edges)


# -------------------------------------------------------------------------------- head loadings


@pytest.mark.parametrize("name", ["learned", "gemma2", "bridge-llama"])
def test_loadings_sum_to_the_edge(name):
    model = build(name)
    replacement = local_replacement(model, [], zoo.tokens(1, 6))
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    answer = graph.targets[0]
    for source in one_of_each(graph.nodes):
        if source.kind == "logit":
            continue
        loadings = head_loadings(replacement, source, answer, DIFFERENCE)
        edge = graph.edge(source, answer)
        assert loadings.edge == pytest.approx(edge, rel=1e-5, abs=1e-9)
        layers = {layer for layer, _ in loadings.heads}
        later = {-1: {0, 1}, 0: {1}, 1: set()}[source.layer]
        assert layers == (later if source.kind != "mlp" or source.layer == 0 else set())
        # By hand, for the last layer: what the head moves of the source, read by the target.
        part, stream = replacement.stream.layers[1], replacement.stream
        if 1 not in layers:
            continue
        alone = torch.zeros_like(part.resid_pre)
        alone[source.pos] = replacement.vector(source)
        direction = stream.W_U[:, 5] - stream.W_U[:, 9]
        for head in range(zoo.N_HEADS):
            values = part.norm.share(alone) @ part.weights.W_V[head].double()
            moved = part.post_norm.share(
                part.pattern[head] @ values @ part.weights.W_O[head].double()
            )
            if replacement.mlps:  # the MLP above is a node: nothing passes through it
                load = float(stream.final_norm.share(moved)[-1] @ direction)
                assert loadings.heads[1, head] == pytest.approx(load, rel=1e-5, abs=1e-9)
    strongest = loadings.strongest
    assert [abs(load) for _, load in strongest] == sorted(map(abs, loadings.heads.values()))[::-1]


# -------------------------------------------------------------------------------- interventions


@pytest.mark.parametrize("name", HOSTS)
def test_frozen_effects_are_those_predicted(name):
    model = build(name)
    replacement = mixed(model, attention="heads", transcoders={1: HandMade()})
    replay = Replay(replacement, DIFFERENCE)
    for node in one_of_each(replacement.nodes):
        activation = float(replacement.activations[replacement.places[node]])
        effects = intervene(replacement, {node: 0.4 * activation}, replay=replay)
        scale = float(effects.predicted.abs().max())
        torch.testing.assert_close(
            effects.measured, effects.predicted, rtol=0, atol=1e-4 * scale + 1e-9
        )
    several = steer(replacement, one_of_each(replacement.nodes)[1:], 0.3)
    effects = intervene(replacement, several, replay=replay)
    assert float(effects.predicted.abs().max()) > 0.01
    torch.testing.assert_close(effects.measured, effects.predicted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "bridge-gptneox"])
@pytest.mark.parametrize("attention", ["frozen", "heads_by_source"])
def test_edges_and_paths_are_what_is_measured(name, attention):
    replacement = mixed(build(name), attention=attention)
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    replay = Replay(replacement, DIFFERENCE)
    edges = top_edges(graph, 12)
    effects = edge_effects(graph, replay, edges)
    torch.testing.assert_close(effects.measured, effects.predicted, rtol=1e-4, atol=1e-6)
    live = edge_effects(graph, replay, edges, live=True)
    assert not torch.allclose(live.measured, live.predicted, rtol=1e-2)  # norms answer
    answer = graph.targets[0]
    path = next(
        (first, second, answer) for first, second in top_edges(graph, 400)
        if second.kind != "logit" and graph.edge(second, answer) != 0
    )  # fmt: skip
    found = path_effect(graph, replay, path)
    assert found.measured == pytest.approx(found.predicted, rel=1e-4)


def test_an_unchanged_run_is_the_host():
    replacement = mixed(build("learned"))
    replay = Replay(replacement, DIFFERENCE)
    logits = replacement.stream.logits[-1]
    for live in (False, True):
        assert float(replay.run({}, live=live).targets) == pytest.approx(
            float(logits[5] - logits[9]), abs=1e-9
        )
    assert not replacement.stream.model.blocks[0].attn.__dict__.get("forward")  # nothing stays


def test_live_effects_are_those_of_editing_the_host():
    """Ablating a token's embedding, live, against the model with that embedding zeroed."""
    model = build("learned")
    exact = [Lorsa.from_attention(model, layer) for layer in (0, 1)]
    tokens = zoo.tokens(1, 6)
    replacement = local_replacement(model, exact, tokens)
    node = replacement.nodes[4]
    assert node.kind in ("token", "position")
    effects = intervene(replacement, ablate([node]), DIFFERENCE, live=True)

    def zero(resid, hook):
        resid[0, node.pos] -= replacement.vector(node)
        return resid

    with torch.no_grad():
        changed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", zero)])[0, -1]
    before = replacement.stream.logits[-1]
    expected = (changed[5] - changed[9]) - (before[5] - before[9])
    _, measured = effects.of(effects.nodes[-1])
    assert measured == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------------------------------------------ attention effects


@pytest.mark.parametrize("name", ["learned", "gemma2", "shortformer", "bridge-qwen3"])
def test_attention_effects_sum_to_what_the_pattern_does(name):
    model = build(name)
    lorsas = [Lorsa.from_attention(model, layer, k=3) for layer in (0, 1)]
    replacement = local_replacement(model, lorsas, zoo.tokens(1, 6))
    heads = [node for node in replacement.nodes if node.kind == "head" and node.layer == 1][-3:]
    effects = attention_effects(replacement, heads)
    sides = effects.query.sum(1) + effects.key.sum(1) + effects.bias
    torch.testing.assert_close(sides, effects.total, rtol=1e-4, atol=1e-5)
    for row, head in enumerate(heads):
        later = [i for i, node in enumerate(replacement.nodes) if node.layer >= 1]
        assert not effects.query[row, later].any()
        assert not effects.key[row, later].any()
        (node, value), *_ = effects.strongest(head, 1)
        assert effects.effect(node, head) == pytest.approx(value)
    if name == "learned":  # without cap, window or ALiBi the flat pattern is the mean of the values
        lorsa, head = lorsas[1], heads[-1]
        x = record_attention(model, zoo.tokens(1, 6), [1])[1].x[0]
        values = (x @ lorsa.W_V[head.index] + lorsa.b_V[head.index])[: head.pos + 1]
        activation = float(replacement.activations[replacement.places[head]])
        flat = activation - float(effects.total[-1])
        assert flat == pytest.approx(values.mean().item(), abs=1e-6)


# ------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize("name", HOSTS)
def test_first_order_effects_are_live_effects_of_small_edits(name):
    replacement = mixed(build(name), attention="heads", transcoders={1: HandMade()})
    replay, step = Replay(replacement, DIFFERENCE), 1e-3
    effects = first_order_effects(replay)
    nodes = one_of_each(replacement.nodes)
    if "gemma2" in name:  # behind a norm, which is held for the node's own writing
        nodes = [node for node in nodes if node.kind in ("token", "position")]
    predicted, measured = [], []
    for node in nodes:
        activation = float(replacement.activations[replacement.places[node]])
        ends = [
            float(replay.run({node: activation * (1 + part)}, live=True).targets)
            for part in (-step, step)
        ]
        predicted.append(effects.of(node))
        measured.append((ends[0] - ends[1]) / (2 * step))
    assert max(map(abs, predicted)) > 0.01
    scale = max(map(abs, predicted))
    rounded = "bridge" in name  # Hugging Face's RMS norms
    assert predicted == pytest.approx(measured, rel=1e-4, abs=(2e-3 if rounded else 1e-6) * scale)
    needed = effects.top(3)
    assert [effects.of(node) for node in needed] == sorted(effects.of(node) for node in needed)
    assert all(effects.of(node) < 0 and not node.is_leaf for node in needed)
    with pytest.raises(ValueError, match="not at work"):
        effects.of(Node("head", 0, 0, 900))


def test_what_does_not_fit_is_refused(monkeypatch):
    model = build("learned")
    tokens, lorsa = zoo.tokens(1, 6), Lorsa.from_attention(model, 0, k=3)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="two Lorsas are for layer 0"):
        local_replacement(model, [lorsa, lorsa], tokens)
    with pytest.raises(ValueError, match=r"transcoders\[7\]: the model has layers 0 to 1"):
        local_replacement(model, lorsa, tokens, transcoders={7: HandMade()})
    with pytest.raises(ValueError, match="attention = 'live': one of"):
        local_replacement(model, lorsa, tokens, attention="live")
    with pytest.raises(ValueError, match="str_tokens has 2 entries for 6 tokens"):
        local_replacement(model, lorsa, tokens, str_tokens=["a", "b"])
    with pytest.raises(ValueError, match="layer 1 has no MLP"):
        local_replacement(build("attn-only"), [], tokens, transcoders={1: HandMade()})
    replacement = local_replacement(model, lorsa, tokens)
    with pytest.raises(ValueError, match=r"target token 640: the model has tokens 0 to 63"):
        attribution_graph(replacement, Target.logit(640))
    with pytest.raises(ValueError, match="target pos = 9, but the prompt has 6 tokens"):
        attribution_graph(replacement, Target.logit(4, pos=9))
    with pytest.raises(ValueError, match=r"target direction has shape \[3\]: \[32\]"):
        attribution_graph(replacement, Target.direction(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"mass = 1\.2"):
        Target.top_probability(1.2)
    with pytest.raises(ValueError, match="n_nodes = 0 must be positive"):
        attribution_graph(replacement, n_nodes=0)
    needed = graph_size(replacement, n_nodes="all").n_bytes
    with pytest.raises(ValueError, match="lower n_nodes, shorten the prompt, or raise max_bytes"):
        attribution_graph(replacement, n_nodes="all", max_bytes=needed - 1)
    with pytest.raises(ValueError, match=r"head\.L0\.900@0 is not at work on this prompt"):
        intervene(replacement, ablate([Node("head", 0, 0, 900)]))
    with pytest.raises(ValueError, match="edits is empty"):
        intervene(replacement, {})
    leaf = replacement.nodes[0]
    with pytest.raises(ValueError, match="is nothing that reads"):
        head_loadings(replacement, leaf, leaf)


def test_a_direction_and_the_most_probable_tokens_are_targets():
    replacement = mixed(build("learned"))
    vector = torch.randn(zoo.D_MODEL, dtype=torch.float64)
    graph = attribution_graph(replacement, Target.direction(vector, label="mine", pos=2))
    stream = replacement.stream
    normalized = stream.final_norm.share(stream.resid_final) + stream.final_norm.bias
    assert float(graph.pre_activations[-1]) == pytest.approx(float(normalized[2] @ vector))
    assert graph.labels[graph.targets[0]] == "mine"
    assert graph.targets[0].pos == 2
    likely = attribution_graph(replacement, Target.top_probability(0.3))
    expected = stream.logits[-1].softmax(-1).sort(descending=True).values
    n = len(likely.targets)
    assert float(expected[:n].sum()) >= 0.3 > float(expected[: n - 1].sum())
    weights = [float(likely.target_weights[likely.index(node)]) for node in likely.targets]
    assert sorted(weights) == pytest.approx(sorted(expected[:n].tolist()))
    assert weights == pytest.approx([likely.probabilities[node] for node in likely.targets])


def test_transcoders_that_cannot_be_read_are_refused():
    model = build("learned")

    def refused(match, **changes):
        made = HandMade()
        for name, value in changes.items():
            setattr(made, name, value)
        with pytest.raises(ValueError, match=match):
            mixed(model, transcoders={1: made})

    refused("without W_dec", W_dec=None)
    refused("skip connection", W_skip=torch.zeros(2))
    refused(r"transcoders\[1\]\.b_dec has shape \[3\]", b_dec=torch.zeros(3))
    halved = HandMade()
    refused(
        "not x W_enc \\+ b_enc",
        encode=lambda x: 0.5 * (x @ halved.W_enc + halved.b_enc).relu(),
    )


def test_a_transcoder_of_saelens():
    sae_lens = pytest.importorskip("sae_lens")
    cfg = sae_lens.TranscoderConfig(
        d_in=zoo.D_MODEL, d_out=zoo.D_MODEL, d_sae=64, dtype="float64", apply_b_dec_to_input=False,
        metadata=sae_lens.saes.sae.SAEMetadata(
            hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out"
        ),
    )  # fmt: skip
    transcoder = sae_lens.Transcoder(cfg)
    replacement = mixed(build("learned"), transcoders={1: transcoder})
    graph = attribution_graph(replacement, DIFFERENCE, n_nodes="all")
    features = [node for node in graph.nodes if node.kind == "feature"]
    x = replacement.mlps[1].x
    expected = transcoder.encode(x[None])[0]
    assert len(features) == int((expected > 0).sum())
    for node in features:
        value = float(graph.activations[graph.index(node)])
        assert value == pytest.approx(expected[node.pos, node.index].item())
    total = graph.edges.sum(1) + graph.constants
    read = torch.tensor([not node.is_leaf for node in graph.nodes])
    torch.testing.assert_close(total[read], graph.pre_activations[read])
    transcoder.cfg.metadata.hook_name = "blocks.0.mlp.hook_in"
    with pytest.raises(ValueError, match=r"hook_name = 'blocks\.0\.mlp\.hook_in'"):
        mixed(build("learned"), transcoders={1: transcoder})


def test_an_mlp_that_is_no_module_is_refused():
    with pytest.raises(UnsupportedAttentionError, match="its MLP is no module"):
        local_replacement(build("bridge-opt"), [], zoo.tokens(1, 6))
