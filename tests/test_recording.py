"""What is recorded is what the host's own hooks show, and recording leaves no trace."""

import functools

import jaxtyping
import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import AttentionRecord, record_attention

TOKENS = zoo.tokens(batch=5, pos=12)
NAMES = ["learned", "rotary", "shortformer", "alibi", "llama-processed", "gemma2", "olmo2",
         "bidirectional", "bert", "bridge-gpt2", "bridge-gpt2-processed", "bridge-llama",
         "bridge-mistral", "bridge-gemma2", "bridge-opt", "bridge-native",
         "bridge-native-rotary"]  # fmt: skip
kinds = pytest.mark.parametrize(
    "kind", [param for param in zoo.kind_params if param.values[0].name in NAMES]
)


@functools.cache
def host_model(kind):
    return kind.build(torch.float32)


def captured_calls(model, layer, tokens):
    """The keyword arguments that a HookedTransformer's attention gets, and what it returns."""
    calls = []

    def note(module, args, kwargs, out):
        names = ("query_input", "key_input", "value_input")  # HookedEncoder gives no keywords
        calls.append(dict(zip(names, args, strict=False)) | kwargs | {"out": out})

    handle = model.blocks[layer].attn.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        handle.remove()
    (call,) = calls
    return call


def state(model):
    """Everything that recording must leave as it was."""
    modules = {name: id(module) for name, module in model.named_modules()}
    own = {id(m): {n for n in m.__dict__ if n[0] != "_"} for m in model.modules()}
    hooks = {
        name: (len(m._forward_hooks), len(m._backward_hooks)) for name, m in model.named_modules()
    }
    with torch.no_grad():
        return modules, own, hooks, list(model.state_dict()), model(TOKENS)


def assert_same(before, after):
    *others, logits = before
    *others_after, logits_after = after
    assert others == others_after
    assert torch.equal(logits, logits_after)


# --------------------------------------------------------------------------------- what is recorded


@kinds
def test_what_is_recorded_is_what_the_hosts_hooks_show(kind):
    model = host_model(kind)
    record = record_attention(model, TOKENS, [1])[1]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    if kind.host == "bridge":
        assert torch.equal(record.x, cache["blocks.1.attn.hook_in"])
        assert torch.equal(record.out, cache["blocks.1.attn.hook_out"])
    else:
        call = captured_calls(model, 1, TOKENS)
        assert torch.equal(record.x, call["value_input"])
        assert torch.equal(record.out, call["out"])
    assert record.positions.tolist() == [list(range(12))]
    post_norm = host_of(model).post_norm(1)
    assert (record.attn_out is None) == (post_norm is None)
    written = record.out if post_norm is None else record.attn_out
    assert torch.equal(written, cache["blocks.1.hook_attn_out"])


def test_the_kinds_with_a_norm_after_attention_are_among_those_tested():
    names = {"gemma2", "olmo2", "bridge-gemma2"}
    for kind in zoo.KINDS:
        if kind.name in names:
            record = record_attention(host_model(kind), TOKENS, [0])[0]
            assert not torch.allclose(record.attn_out, record.out, atol=0.1)


def test_shortformer_queries_read_the_stream_with_positions():
    model = host_model(zoo.by_name("shortformer"))
    record = record_attention(model, TOKENS, [1])[1]
    call = captured_calls(model, 1, TOKENS)
    assert torch.equal(record.qk_input, call["query_input"])
    assert torch.equal(record.qk_input, call["key_input"])
    assert not torch.allclose(record.qk_input, record.x)
    others = record_attention(host_model(zoo.by_name("learned")), TOKENS, [1])[1]
    assert others.qk_input is None


@kinds
def test_several_batches_join_to_what_one_gives(kind):
    model = host_model(kind)
    whole = record_attention(model, TOKENS, [0, 1])
    for batch_size in (1, 2):
        parts = record_attention(model, TOKENS, [1, 0], batch_size=batch_size)
        assert list(parts) == [1, 0]
        for layer, record in parts.items():
            expected = whole[layer]
            for name in ("x", "out", "qk_input", "attn_out"):
                tensor = getattr(expected, name)
                if tensor is None:
                    assert getattr(record, name) is None
                else:
                    torch.testing.assert_close(getattr(record, name), tensor, rtol=1e-5, atol=1e-5)
            for name in ("positions", "keep"):  # the same for all sequences, so kept once
                tensor = getattr(expected, name)
                assert tensor is None or tensor.shape[0] == 1
                assert tensor is None or torch.equal(getattr(record, name), tensor)


def test_equal_sequences_stay_separate_rows():
    model = host_model(zoo.by_name("shortformer"))
    record = record_attention(model, TOKENS[:1].repeat(3, 1), [0], batch_size=1)[0]
    assert record.x.shape == record.out.shape == record.qk_input.shape == (3, 12, 32)


@kinds
def test_the_exact_lift_gives_what_was_recorded_from_every_slice_of_it(kind):
    model = host_model(kind)
    record = record_attention(model, TOKENS, [1], batch_size=2)[1]
    lorsa = Lorsa.from_attention(model, 1)
    for rows in (slice(1, 4), torch.tensor([4, 0, 4]), slice(2, 3)):
        part = record.batch(rows)
        assert torch.equal(part.out, record.out[rows])
        if record.attn_out is not None:
            assert torch.equal(part.attn_out, record.attn_out[rows])
        with torch.no_grad():
            out = lorsa(part.x, **part.context)
        torch.testing.assert_close(out, part.out, rtol=1e-4, atol=1e-4)


def test_masks_that_differ_are_kept_for_each_sequence():
    """Padding is not asked for, but a tokenizer that pads on the left makes a host mask it."""
    model = zoo.by_name("rotary").build(torch.float32)
    model.tokenizer.padding_side = "left"
    tokens = TOKENS.clone()
    tokens[3, :4] = zoo.PAD
    for batch_size in (1, 5):
        record = record_attention(model, tokens, [1], batch_size=batch_size)[1]
        assert record.keep.shape == (5, 1, 12)
        hidden = ~record.keep[:, 0]
        assert hidden.nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3]]
        assert record.positions[0].tolist() == list(range(12))
        assert record.positions[3].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
        assert record.batch(slice(3, 4)).keep.shape == (1, 1, 12)


# ------------------------------------------------------------------------- as a Lorsa meets it


@pytest.mark.parametrize("name", ["learned", "bridge-gpt2", "gemma2"])
def test_seen_by_a_lorsa_of_the_normalized_stream(name):
    model = host_model(zoo.by_name(name))
    record = record_attention(model, TOKENS, [1])[1]
    lorsa = Lorsa.from_attention(model, 1)
    assert torch.equal(record.seen_by(lorsa).x, record.x)
    lorsa.cfg = lorsa.cfg.replace(input_site="ln1_normalized", fold_ln=None)
    normalized = record.seen_by(lorsa).x
    # LayerNorm without gain and bias leaves mean 0 and variance 1, RMSNorm mean square 1
    assert normalized.square().mean(-1).sub(1).abs().max() < 1e-3
    if name != "gemma2":
        assert normalized.mean(-1).abs().max() < 1e-5
    gain, bias = host_of(model).input_norm(1)
    torch.testing.assert_close(normalized * gain + bias, record.x)
    again = record.seen_by(lorsa).seen_by(lorsa)
    assert torch.equal(again.x, normalized)


def test_seen_by_a_lorsa_that_replaces_what_the_post_norm_gives():
    model = host_model(zoo.by_name("gemma2"))
    record = record_attention(model, TOKENS, [1])[1]
    lorsa = Lorsa.from_attention(model, 1)
    assert torch.equal(record.target(lorsa), record.out)
    lorsa.cfg = lorsa.cfg.replace(output_site="hook_attn_out")
    assert torch.equal(record.target(lorsa), record.attn_out)
    assert torch.equal(record.seen_by(lorsa).out, record.attn_out)
    seen = record.seen_by(lorsa.double())
    assert seen.x.dtype == seen.out.dtype == torch.float64
    assert seen.positions.dtype == torch.int64


# ----------------------------------------------------------------------------------- no trace


@kinds
def test_the_host_is_bit_identical_afterwards(kind):
    model = host_model(kind)
    with torch.no_grad():
        model(TOKENS)  # hosts that keep something of their first pass have done so
    before = state(model)
    record_attention(model, TOKENS, range(host_of(model).n_layers), batch_size=2)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", ["learned", "gemma2", "bridge-gpt2", "bridge-gemma2"])
def test_the_host_is_restored_after_an_exception(name):
    model = host_model(zoo.by_name(name))
    before = state(model)

    def stop(tensor, hook):
        raise KeyError("stop")

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", stop)]),
        pytest.raises(KeyError, match="stop"),
    ):
        record_attention(model, TOKENS, [0, 1])
    assert_same(before, state(model))


def test_an_override_below_is_recorded_and_comes_back():
    model = zoo.by_name("learned").build(torch.float32)
    attention = model.blocks[1].attn
    clean = record_attention(model, TOKENS, [1])[1]
    own = attention.forward
    override = lambda **kwargs: own(**kwargs) * 2  # noqa: E731
    attention.forward = override
    assert torch.equal(record_attention(model, TOKENS, [1])[1].out, clean.out * 2)
    assert attention.forward is override


def test_no_gradient_is_kept():
    model = host_model(zoo.by_name("learned" if not zoo.lacks("learned") else "bridge-gpt2"))
    record = record_attention(model, TOKENS, [0])[0]
    assert not record.x.requires_grad
    assert not record.out.requires_grad


@pytest.mark.parametrize("name", ["learned", "gemma2", "bridge-gpt2", "bridge-gemma2"])
def test_other_layers_of_a_spliced_model_are_recorded(name):
    model = host_model(zoo.by_name(name))
    clean = record_attention(model, TOKENS, [0, 1])
    lorsa = Lorsa.from_attention(model, 0, n_ov_heads=64, k=2)
    with splice(model, lorsa):
        record = record_attention(model, TOKENS, [1], batch_size=3)[1]
        with torch.no_grad():
            _, cache = model.run_with_cache(TOKENS)
        with pytest.raises(ValueError, match="layer 0 is spliced"):
            record_attention(model, TOKENS, [1, 0])
    torch.testing.assert_close(
        record.target(lorsa) if record.attn_out is None else record.attn_out,
        cache["blocks.1.hook_attn_out"],
        rtol=1e-4,
        atol=1e-5,
    )
    assert not torch.allclose(record.x, clean[1].x, atol=1e-2)
    assert torch.equal(record_attention(model, TOKENS, [1])[1].x, clean[1].x)


# ----------------------------------------------------------------------------------- refusals


@pytest.fixture
def any_model():
    return host_model(zoo.KINDS[0])


def test_a_layer_that_does_not_exist_is_named(any_model):
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"layer = {layer}, but the model has layers 0 to 1"):
            record_attention(any_model, TOKENS, [0, layer])


def test_a_layer_asked_for_twice_is_recorded_once(any_model):
    before = state(any_model)
    twice = record_attention(any_model, TOKENS, [1, 0, 1])
    assert list(twice) == [1, 0]
    assert twice[1].x.shape == (5, 12, 32)
    assert_same(before, state(any_model))


def test_sizes_that_cannot_be_are_refused(any_model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="batch_size = 0 must be positive"):
        record_attention(any_model, TOKENS, [0], batch_size=0)
    for tokens in (TOKENS[:0], TOKENS[:, :0], TOKENS[0]):
        with pytest.raises(ValueError, match="tokens has shape"):
            record_attention(any_model, tokens, [0])


def test_a_record_made_by_hand_needs_no_norms():
    x = torch.randn(2, 3, 4)
    record = AttentionRecord(x, -x, None, torch.arange(3)[None], None)
    part = record.batch(slice(1, 2))
    assert torch.equal(part.out, -x[1:])
    assert part.context == {"qk_input": None, "positions": part.positions, "keep": None}
