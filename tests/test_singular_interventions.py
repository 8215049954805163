"""Interventions against the host's own hooks: what is said to change does change."""

import pytest
import torch
import zoo

from lorsa_lens.hosts import host_of
from lorsa_lens.singular import (
    Edge,
    Firing,
    Node,
    break_down,
    edited,
    intervene,
    random_control,
    record_stream,
    signal,
)
from lorsa_lens.singular.edits import Edit
from lorsa_lens.singular.graph import firing_node, node_of
from lorsa_lens.singular.interventions import delta_of

KINDS = ["learned", "rotary-partial", "rotary-adjacent", "llama", "gemma2", "qk-norm", "olmo2"]
BRIDGES = [
    "bridge-gpt2",
    "bridge-gptneox",
    "bridge-gptj",
    "bridge-llama",
    "bridge-gemma2-processed",
]
DEST, SRC = 7, 3


def edge(stream, side, *, head=1, component=None, vectors=(0, 2, 5)):
    """An edge into a head of the last layer from an upstream head, or a given component."""
    layer = len(stream.layers) - 1
    position = DEST if side == "dest" else SRC
    up = Node("head", 0, 2, position, position - 1)
    if component is not None:
        up = node_of(component, position)
    down = firing_node(Firing(layer, head, DEST, SRC))
    return Edge(up=up, down=down, side=side, weight=0.5, vectors=vectors)


def attributed(stream, given):
    """What the edge's terms are in the breakdown."""
    firing = given.down.firing
    terms = break_down(stream, firing, given.side)
    component = next(
        number
        for number, c in enumerate(terms.components)
        if c.kind == given.up.kind
        and c.layer == given.up.layer
        and c.head == given.up.head
        and (c.source == given.up.src or given.up.kind != "head")
    )
    return terms.part(component)[list(given.vectors), SRC].sum().item()


@pytest.mark.parametrize("side", ["dest", "src"])
@pytest.mark.parametrize("boost", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_exact_ablation_in_the_hosts_own_hooks(name, boost, side):
    """Put into `hook_rot_q` / `hook_rot_k` by hand, the vector changes the cached score as said.

    The logits then are those of the report: the edit is the same, made in another way.
    """
    model, tokens = zoo.by_name(name).build(torch.float64), zoo.tokens(1, 9)
    stream = record_stream(model, tokens)
    given, layer = edge(stream, side), len(stream.layers) - 1
    rotary = stream.layers[layer].weights.spec.positional_embedding_type == "rotary"
    normed = stream.layers[layer].weights.spec.qk_norm is not None
    if normed and not rotary:
        pytest.skip("such a host shows no query after its norm")
    n_groups = len({W.sum().item() for W in stream.layers[layer].weights.W_K})
    head = 1 if side == "dest" else 1 // (len(stream.layers[layer].pattern) // n_groups)
    delta = (1 if boost else -1) * delta_of(stream, given, "exact")

    def change(vectors, hook):
        vectors[:, DEST if side == "dest" else SRC, head] += delta
        return vectors

    letter = "q" if side == "dest" else "k"
    hook = f"blocks.{layer}.attn.hook_{'rot_' if rotary else ''}{letter}"
    seen = {}
    with torch.no_grad():
        logits = model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (hook, change),
                (f"blocks.{layer}.attn.hook_attn_scores", lambda t, hook: seen.update(s=t)),
            ],
        )
    measured, cap = seen["s"][0, 1, DEST, SRC], model.cfg.attn_scores_soft_cap
    if cap > 0:
        measured = cap * torch.atanh(measured / cap)
    before = stream.reading(layer, 1).raw[DEST, SRC].item()
    amount = attributed(stream, given)
    expected = before + amount if boost else before - amount
    assert measured.item() == pytest.approx(expected, abs=1e-4)
    assert abs(amount) > 1e-5  # else the test would say nothing

    report = intervene(stream, given, boost=boost, answer=5, wrong=6)
    (effect,) = report.effects
    assert effect.score_after == pytest.approx(expected, abs=1e-4)
    assert effect.attributed == pytest.approx(amount, abs=1e-6)
    if n_groups == len(stream.layers[layer].pattern) or side == "dest":
        expected = (logits[0, -1, 5] - logits[0, -1, 6]).item()
        assert report.logit_difference_after == pytest.approx(expected, abs=1e-5)
    assert report.logit_difference_before == pytest.approx(
        (stream.logits[-1, 5] - stream.logits[-1, 6]).item()
    )


@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.parametrize("side", ["dest", "src"])
def test_exact_ablation_on_bridges(name, side):
    """The pattern that the report expects is the one that the layer's output is made with."""
    model = zoo.by_name(name).build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, 9))
    given, layer = edge(stream, side), len(stream.layers) - 1
    (effect,) = intervene(stream, given).effects
    amount = attributed(stream, given)
    assert effect.score_after == pytest.approx(effect.score_before - amount, abs=1e-4)
    reading = stream.reading(layer, 1)
    raw = reading.raw.clone()
    raw[DEST, SRC] -= amount
    if side == "src":  # of one row, only this score changes
        weight = torch.softmax(reading.scores(raw)[DEST], -1)[SRC].item()
        assert effect.attention_after == pytest.approx(weight, abs=1e-5)


@pytest.mark.parametrize("name", ["learned", "llama", "gemma2", "bridge-gptneox", "bridge-gemma2"])
def test_an_edit_moves_attentions_output_by_the_change_of_the_pattern(name):
    model, tokens = zoo.by_name(name).build(torch.float32), zoo.tokens(1, 9)
    stream = record_stream(model, tokens)
    delta = torch.linspace(-1, 1, stream.reading(1, 2).q.shape[-1], dtype=torch.float64)
    edit = Edit(layer=1, head=2, side="src", position=SRC, rotated=delta)
    with edited(stream, [edit]) as measured:
        changed = record_stream_attention(model, tokens)
    plain = record_stream_attention(model, tokens)
    before, after = stream.reading(1, 2), measured[1, 2]
    k = before.k.clone()
    k[SRC] += delta
    raw = before.q @ k.mT / before.head.divisor
    torch.testing.assert_close(after.raw, raw, atol=1e-5, rtol=1e-5)
    layer = stream.layers[1]
    values = layer.x @ layer.weights.W_V[2].double()
    moved = (torch.softmax(before.scores(raw), -1) - before.pattern) @ values
    expected = moved @ layer.weights.W_O[2].double()
    torch.testing.assert_close(changed - plain, expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 1e-2


def record_stream_attention(model, tokens):
    """What the last attention module returns, seen from outside of it."""
    seen = {}
    attention = host_of(model).attention(1)
    forward = attention.forward

    def watch(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen["out"] = out[0] if isinstance(out, tuple) else out
        return out

    before = attention.__dict__.get("forward")
    attention.__dict__["forward"] = watch
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        del attention.__dict__["forward"]
        if before is not None:
            attention.__dict__["forward"] = before
    return seen["out"][0].double()


def test_the_model_is_as_before():
    model, tokens = zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 9)
    stream = record_stream(model, tokens)
    intervene(stream, [edge(stream, "dest"), edge(stream, "src")], boost=True)
    assert "forward" not in model.blocks[1].attn.__dict__
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0].double(), stream.logits)


def test_several_edges_at_once():
    """Edges into one query add up; an edge upstream changes what is read downstream."""
    model = zoo.by_name("rotary").build(torch.float64)
    stream = record_stream(model, zoo.tokens(1, 9))
    one, two = edge(stream, "dest", vectors=(0,)), edge(stream, "dest", vectors=(3, 4))
    both = edge(stream, "dest", vectors=(0, 3, 4))
    together = intervene(stream, [one, two], answer=5)
    alone = intervene(stream, both, answer=5)
    assert len(together.effects) == 2
    for effect in together.effects:
        assert effect.score_after == pytest.approx(alone.effects[0].score_after)
    assert together.logit_difference_after == pytest.approx(alone.logit_difference_after)


@pytest.mark.parametrize("mode", ["local", "global"])
def test_grouped_keys_change_for_the_whole_group_when_local(mode):
    model = zoo.by_name("llama").build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, 9))
    layer = len(stream.layers) - 1
    W_K = stream.layers[layer].weights.W_K
    assert torch.equal(W_K[0], W_K[1])
    given = edge(stream, "src", head=0)
    logits = {
        m: intervene(stream, given, mode=m, answer=5).logit_difference_after
        for m in ("exact", mode)
    }
    assert logits["exact"] != pytest.approx(logits[mode], abs=1e-6)


def test_random_controls_come_from_the_complement():
    stream = record_stream(zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 9))
    given = edge(stream, "src", vectors=(0, 1, 2))
    control = random_control(stream, given, seed=1)
    assert len(control.vectors) == 3
    assert not set(control.vectors) & set(given.vectors)
    assert control.vectors == random_control(stream, given, seed=1).vectors
    drawn = {random_control(stream, given, seed=s).vectors for s in range(8)}
    assert len(drawn) > 4
    most = edge(stream, "src", vectors=tuple(range(7)))  # of 8
    assert random_control(stream, most).vectors == (7,)
    assert intervene(stream, control).effects[0].edge == control


def test_a_signal_read_is_what_counts_for_the_score():
    stream = record_stream(zoo.by_name("rotary").build(torch.float64), zoo.tokens(1, 9))
    for side in ("dest", "src"):
        given = edge(stream, side)
        reading = stream.reading(1, 1)
        U, S, V = reading.head.basis[:3]
        read = signal(stream, given)
        vectors = list(given.vectors)
        if side == "dest":
            terms = (read @ U[:, vectors]) * S[vectors] * reading.b[SRC][vectors]
        else:
            terms = (read @ V[:, vectors]) * reading.a[DEST][vectors]
        amount = terms.sum().item() / reading.head.divisor
        assert amount == pytest.approx(attributed(stream, given), abs=1e-8)


def test_errors_say_what_would_be_right(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    stream = record_stream(zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 9))
    good = edge(stream, "dest")
    root = Node("root", 2, None, 8, 8)
    with pytest.raises(ValueError, match="edges is empty"):
        intervene(stream, [])
    with pytest.raises(ValueError, match="mode = 'soft' must be one of"):
        intervene(stream, good, mode="soft")
    with pytest.raises(ValueError, match=r"goes to root\.8, which attends to nothing"):
        intervene(stream, Edge(up=good.up, down=root, side="dest", weight=1.0))
    offset = Edge(
        up=Node("offset", 0, None, DEST, DEST),
        down=good.down,
        side="dest",
        weight=1.0,
        vectors=(0,),
    )
    with pytest.raises(ValueError, match="use mode = 'exact'"):
        intervene(stream, offset, mode="local")
    assert intervene(stream, offset).effects[0].attention_after > 0
    with pytest.raises(ValueError, match="answer = 999 must be token ids from 0 to 63"):
        intervene(stream, good, answer=999)
    with pytest.raises(ValueError, match="position = 9, but the prompt has 9 tokens"):
        intervene(stream, good, answer=5, position=9)
    whole = Edge(
        up=Node("head", 0, 1, DEST, None), down=good.down, side="dest", weight=1.0, vectors=(0,)
    )
    with pytest.raises(ValueError, match="whole head"):
        intervene(stream, whole)
    with pytest.raises(ValueError, match="flavour = 'loud'"):
        signal(stream, good, flavour="loud")
