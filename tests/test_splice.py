"""Lorsas in place in real hosts: hooks, caches, error terms, gradients, and leaving no trace."""

import copy
import functools

import pytest
import torch
import zoo

from lorsa_lens import (
    Lorsa,
    run_with_cache_with_lorsas,
    run_with_hooks_with_lorsas,
    run_with_lorsas,
    splice,
    spliced_lorsas,
    zero_heads,
)
from lorsa_lens.hosts import UnsupportedAttentionError, host_of

TOKENS = zoo.tokens(batch=2, pos=12)
HOOKS = [
    "hook_q",
    "hook_k",
    "hook_rot_q",
    "hook_rot_k",
    "hook_attn_scores",
    "hook_pattern",
    "hook_values",
    "hook_acts_pre",
    "hook_acts_post",
    "hook_recons",
]
NAMES = ["learned", "llama", "gemma2", "shortformer", "bridge-gpt2", "bridge-llama",
         "bridge-gemma3", "bridge-native"]  # fmt: skip
SOME = [param for param in zoo.kind_params if param.values[0].name in NAMES]


@functools.cache
def host_model(kind, dtype=torch.float32):
    return kind.build(dtype)


@pytest.fixture(params=SOME)
def model(request):
    return host_model(request.param)


def sparse_lorsa(model, layer=1, **changes):
    """A Lorsa that is far from its layer."""
    return Lorsa.from_attention(model, layer, **{"n_ov_heads": 64, "k": 3, **changes})


def lifted(model):
    return [Lorsa.from_attention(model, layer) for layer in range(host_of(model).n_layers)]


def fingerprint(model):
    """Everything that a splice must leave as it was."""
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = {name: id(hook) for name, hook in model.hook_dict.items()}
    # A model keeps private notes of its first hooks and passes; everything else must not change.
    own = {id(m): {n for n in m.__dict__ if n[0] != "_"} for m in model.modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        return modules, hooks, own, parameters, list(model.state_dict()), model(TOKENS)


def assert_same(before, after):
    *others, logits = before
    *others_after, logits_after = after
    assert others == others_after
    assert torch.equal(logits, logits_after)


# ------------------------------------------------------------------------------- leaving no trace


@pytest.mark.parametrize("kind", zoo.kind_params)
def test_the_host_is_bit_identical_after_a_splice(kind):
    model = host_model(kind)
    with torch.no_grad():
        model(TOKENS)  # hosts that keep something of their first pass have done so
    before = fingerprint(model)
    lorsas = lifted(model)
    with splice(model, lorsas, error_term=True), torch.no_grad():
        model.run_with_cache(TOKENS)
        assert set(spliced_lorsas(model)) == set(range(len(lorsas)))
    assert_same(before, fingerprint(model))
    assert spliced_lorsas(model) == {}
    assert lorsas[0].hook_q.name == "hook_q"


def test_the_host_is_restored_after_an_exception(model):
    before = fingerprint(model)
    with pytest.raises(KeyError, match="stop"), splice(model, lifted(model)):  # noqa: PT012
        model.add_hook("blocks.1.attn.lorsa.hook_recons", lambda t, hook: t)
        raise KeyError("stop")
    assert_same(before, fingerprint(model))


def test_nothing_is_attached_when_one_of_several_does_not_fit(model):
    before = fingerprint(model)
    good, bad = sparse_lorsa(model, 0), sparse_lorsa(model, 1)
    bad.cfg = bad.cfg.replace(layer=7)
    with pytest.raises(ValueError, match="layer = 7, but the model has layers 0 to"):
        splice(model, [good, bad])
    assert_same(before, fingerprint(model))


def test_a_handle_outlives_its_line_and_can_be_removed_twice(model):
    before = fingerprint(model)
    handle = splice(model, sparse_lorsa(model))
    assert repr(handle) == "Splice(layers=[1], error_term=False)"
    assert list(handle.lorsas) == [1]
    assert not torch.equal(model(TOKENS), before[-1])
    handle.remove()
    handle.remove()
    assert_same(before, fingerprint(model))
    with pytest.raises(RuntimeError, match="was removed"):
        handle.__enter__()


def test_splices_of_different_layers_nest_and_end_in_any_order(model):
    before = fingerprint(model)
    first, second = sparse_lorsa(model, 0), sparse_lorsa(model, 1)
    with splice(model, [first, second]):
        both = model(TOKENS)
    outer = splice(model, first)
    inner = splice(model, second)
    torch.testing.assert_close(model(TOKENS), both)
    outer.remove()
    with splice(model, first):
        torch.testing.assert_close(model(TOKENS), both)
    inner.remove()
    assert_same(before, fingerprint(model))


def test_a_copy_of_a_spliced_model_is_spliced_with_a_copy(model):
    lorsa = sparse_lorsa(model)
    with torch.no_grad(), splice(model, lorsa):
        expected = model(TOKENS)
        twin = copy.deepcopy(model)
    with torch.no_grad():
        lorsa.W_O.zero_()
        torch.testing.assert_close(twin(TOKENS), expected)
    assert spliced_lorsas(twin)[1] is not lorsa


# ------------------------------------------------------------------------------- hooks and caches


def test_every_hook_is_cached_under_its_name(model):
    lorsa = sparse_lorsa(model)
    with torch.no_grad(), splice(model, lorsa):
        logits, cache = model.run_with_cache(TOKENS)
        torch.testing.assert_close(model(TOKENS), logits)
        acts = "blocks.1.attn.lorsa.hook_acts_post"
        _, filtered = model.run_with_cache(TOKENS, names_filter=[acts])
        assert set(filtered) == {acts}
        _, chosen = model.run_with_cache(TOKENS, names_filter=lambda name: "lorsa" in name)
        assert set(chosen) == {f"blocks.1.attn.lorsa.{hook}" for hook in HOOKS}
    n_heads = lorsa.cfg.n_qk_heads
    assert cache["blocks.1.attn.lorsa.hook_pattern"].shape == (2, n_heads, 12, 12)
    assert cache[acts].shape == (2, 12, 64)
    assert (cache[acts] != 0).sum(-1).eq(3).all()
    assert "blocks.1.attn.hook_pattern" not in cache  # the original attention did not run
    assert "blocks.0.attn.hook_pattern" in cache
    assert "blocks.1.hook_attn_out" in cache
    assert "blocks.1.attn.lorsa.hook_recons" in cache


def test_hooks_of_every_sort_change_the_output(model):
    lorsa = sparse_lorsa(model)
    name = "blocks.1.attn.lorsa.hook_acts_post"
    hook = zero_heads(range(64))
    with torch.no_grad(), splice(model, lorsa):
        plain = model(TOKENS)
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, hook)])
        assert not torch.allclose(edited, plain)
        with model.hooks(fwd_hooks=[(name, hook)]):
            assert torch.equal(model(TOKENS), edited)
        assert torch.equal(model(TOKENS), plain)
        model.add_hook(name, hook)
        assert torch.equal(model(TOKENS), edited)
        model.reset_hooks()
        assert torch.equal(model(TOKENS), plain)
        by_filter = model.run_with_hooks(TOKENS, fwd_hooks=[(lambda n: n == name, hook)])
        assert torch.equal(by_filter, edited)


def test_hook_attn_out_fires_once_and_can_be_edited(model):
    fired = []
    with torch.no_grad(), splice(model, sparse_lorsa(model), error_term=True):
        model.run_with_hooks(
            TOKENS,
            fwd_hooks=[("blocks.1.hook_attn_out", lambda t, hook: fired.append(t.shape))],
        )
        zeroed = model.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", lambda t, hook: t * 0)]
        )
        assert not torch.allclose(zeroed, model(TOKENS))
    assert fired == [(2, 12, 32)]


def test_stop_at_layer(model):
    with torch.no_grad(), splice(model, sparse_lorsa(model, 0)):
        residual = model(TOKENS, stop_at_layer=1)
        _, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(residual, cache["blocks.0.hook_resid_post"])


def test_a_batch_dimension_can_be_removed_and_positions_sliced(model):
    with torch.no_grad(), splice(model, sparse_lorsa(model)):
        _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
        assert cache["blocks.1.attn.lorsa.hook_acts_post"].shape == (12, 64)
        _, last = model.run_with_cache(TOKENS, pos_slice=-1)
        assert last["blocks.1.attn.lorsa.hook_acts_post"].shape == (2, 1, 64)


def test_the_convenience_verbs(model):
    lorsa = sparse_lorsa(model)
    before = fingerprint(model)
    with torch.no_grad():
        with splice(model, lorsa):
            expected = model(TOKENS)
        assert torch.equal(run_with_lorsas(model, TOKENS, lorsas=lorsa), expected)
        logits, cache = run_with_cache_with_lorsas(model, TOKENS, lorsas=[lorsa])
        torch.testing.assert_close(logits, expected)
        name = "blocks.1.attn.lorsa.hook_acts_post"
        assert name in cache
        edited = run_with_hooks_with_lorsas(
            model, TOKENS, lorsas=lorsa, fwd_hooks=[(name, zero_heads(range(64)))]
        )
        assert not torch.allclose(edited, expected)
        exact = run_with_lorsas(model, TOKENS, lorsas=lorsa, error_term=True)
        torch.testing.assert_close(exact, before[-1], rtol=1e-5, atol=1e-5)
    assert_same(before, fingerprint(model))


def test_gradients_flow_through_a_splice_to_the_lorsa_and_to_earlier_layers(model):
    lorsa = sparse_lorsa(model)
    seen = []
    with splice(model, lorsa):
        model.add_hook("blocks.0.hook_resid_pre", lambda t, hook: t.requires_grad_(True))
        model.add_hook(
            "blocks.1.attn.lorsa.hook_acts_post",
            lambda grad, hook: seen.append(grad.clone()),
            dir="bwd",
        )
        model(TOKENS).square().sum().backward()
        model.reset_hooks()
    assert all(p.grad is not None for p in (lorsa.W_O, lorsa.W_V, lorsa.b_O))
    assert seen[0].shape == (2, 12, 64)
    assert seen[0].abs().sum() > 0
    model.zero_grad()


# ------------------------------------------------------------------------------- the error term


@pytest.mark.parametrize("output_site", ["attn_out", "hook_attn_out"])
@pytest.mark.parametrize("kind", zoo.kind_params)
def test_with_the_error_term_logits_are_the_hosts(kind, output_site):
    model = host_model(kind)
    lorsas = [
        sparse_lorsa(model, layer, output_site=output_site)
        for layer in range(host_of(model).n_layers)
    ]
    with torch.no_grad():
        expected = model(TOKENS)
        with splice(model, lorsas):
            assert not torch.allclose(model(TOKENS), expected, atol=1e-3)
        with splice(model, lorsas, error_term=True):
            torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
            logits, cache = model.run_with_cache(TOKENS)  # the same while everything is hooked
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            name = "blocks.0.attn.lorsa"
            total = cache[f"{name}.hook_recons"] + cache[f"{name}.hook_error"]
            torch.testing.assert_close(
                total, cache["blocks.0.hook_attn_out"] if output_site == "hook_attn_out" else total
            )
            assert cache[f"{name}.hook_error"].abs().max() > 1e-3


@pytest.mark.parametrize("output_site", ["attn_out", "hook_attn_out"])
def test_an_edit_changes_the_output_by_exactly_the_heads_contribution(model, output_site):
    lorsa = sparse_lorsa(model, output_site=output_site)
    acts, out = "blocks.1.attn.lorsa.hook_acts_post", "blocks.1.hook_attn_out"
    if output_site == "attn_out" and host_of(model).post_norm(1) is not None:
        pytest.skip("the norm after attention is between the edit and hook_attn_out")
    with torch.no_grad(), splice(model, lorsa, error_term=True):
        _, clean = model.run_with_cache(TOKENS)
        head = int(clean[acts][0, -1].abs().argmax())
        with model.hooks(fwd_hooks=[(acts, zero_heads([head], [-1]))]):
            _, edited = model.run_with_cache(TOKENS)
    change = edited[out] - clean[out]
    contribution = clean[acts][:, -1, head, None] * lorsa.W_O[head]
    torch.testing.assert_close(change[:, -1], -contribution.detach(), rtol=1e-4, atol=1e-5)
    assert change[:, :-1].abs().max() < 1e-5


def test_the_error_has_no_gradient_and_can_be_removed(model):
    lorsa = sparse_lorsa(model)
    error = "blocks.1.attn.lorsa.hook_error"
    with torch.no_grad():
        with splice(model, lorsa):
            without = model(TOKENS)
        with splice(model, lorsa, error_term=True):
            removed = model.run_with_hooks(TOKENS, fwd_hooks=[(error, lambda t, hook: t * 0)])
    torch.testing.assert_close(removed, without)
    seen = []
    with splice(model, lorsa, error_term=True):
        model.run_with_hooks(
            TOKENS, fwd_hooks=[(error, lambda t, hook: seen.append(t.requires_grad))]
        )
    assert seen == [False]


# ------------------------------------------------------------------------------- generation


def generated(model, prompt, **changes):
    arguments = {
        "max_new_tokens": 10, "do_sample": False, "stop_at_eos": False, "prepend_bos": False,
        "return_type": "tokens", "verbose": False, **changes,
    }  # fmt: skip
    return model.generate(prompt, **arguments)


GENERATORS = [param for param in zoo.kind_params if param.values[0].generates]


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_cache_changes_no_token(kind, error_term):
    model = host_model(kind)
    lorsas = [sparse_lorsa(model, layer) for layer in range(host_of(model).n_layers)]
    prompt = TOKENS[:, :5]
    with splice(model, lorsas, error_term=error_term):
        cached = generated(model, prompt)
        assert torch.equal(cached, generated(model, prompt, use_past_kv_cache=False))
    if error_term:
        assert torch.equal(cached, generated(model, prompt))


def test_sampling_with_a_seed_gives_the_same_tokens(model):
    with splice(model, sparse_lorsa(model)):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn.append(
                generated(model, TOKENS[:, :5], do_sample=True, use_past_kv_cache=use_cache)
            )
    assert torch.equal(*drawn)


def padded_prompts(model):
    """Two prompts of different length as one batch, padded on the left, and the mask."""
    pad = zoo.PAD
    short, long = TOKENS[0, :4], TOKENS[1, :7]
    batch = torch.stack((torch.cat((torch.full((3,), pad), short)), long))
    mask = torch.stack((torch.tensor([0] * 3 + [1] * 4), torch.ones(7, dtype=torch.long)))
    return batch, mask, short[None]


def test_padding_on_the_left_changes_no_logit(model):
    batch, mask, short = padded_prompts(model)
    if host_of(model).model.cfg.positional_embedding_type == "shortformer":
        pytest.skip("TransformerLens does not shift shortformer positions past the padding")
    with torch.no_grad(), splice(model, [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]):
        padded = model(batch, attention_mask=mask)
        torch.testing.assert_close(padded[0, 3:], model(short)[0], rtol=1e-4, atol=1e-4)


def test_batched_generation_with_padding_on_the_left(model):
    """A batch of strings of different length: what the host does, the lifted host does."""
    model.tokenizer.padding_side = "left"
    prompts = ["w1 w7 w3 w9 w5 w2", "w4 w8 w6"]
    arguments = {"return_type": "str", "max_new_tokens": 8}
    cached = generated(model, prompts, **arguments)
    plain = generated(model, prompts, **arguments, use_past_kv_cache=False)
    with splice(model, lifted(model)):
        assert generated(model, prompts, **arguments) == cached
        assert generated(model, prompts, **arguments, use_past_kv_cache=False) == plain
    if cached != plain:  # TransformerLens 2 forgets the padding once there is a cache
        pytest.skip("this host itself gives other tokens with a cache")
    with splice(model, [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]):
        sparse = generated(model, prompts, **arguments)
        assert sparse == generated(model, prompts, **arguments, use_past_kv_cache=False)
    assert sparse != cached


@pytest.mark.parametrize(
    "name", ["bridge-gpt2", "bridge-llama", "bridge-mistral", "bridge-gptneox"]
)
def test_beams_reorder_the_lorsas_cache(name):
    model = host_model(zoo.by_name(name))
    arguments = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    prompt = TOKENS[:, :5]
    with splice(model, lifted(model)):
        beams = model.original_model.generate(prompt, **arguments)
    assert torch.equal(beams, model.original_model.generate(prompt, **arguments))
    with splice(model, sparse_lorsa(model, 0)):
        cached = model.original_model.generate(prompt, **arguments)
        plain = model.original_model.generate(prompt, use_cache=False, **arguments)
    assert torch.equal(cached, plain)


def empty_cache(model):
    """TransformerLens's own cache, by its name of 3.x or of 2.x."""
    import transformer_lens

    name = "TransformerLensKeyValueCache"
    if not hasattr(transformer_lens, name):
        name = "HookedTransformerKeyValueCache"
    return getattr(transformer_lens, name).init_cache(model.cfg, "cpu", 2)


def test_a_cache_filled_before_the_splice_is_refused():
    model = host_model(zoo.by_name("learned"))
    cache = empty_cache(model)
    with torch.no_grad():
        model(TOKENS[:, :4], past_kv_cache=cache)
        with (
            splice(model, sparse_lorsa(model)),
            pytest.raises(RuntimeError, match="4 tokens that layer 1 saw without this splice"),
        ):
            model(TOKENS[:, 4:6], past_kv_cache=cache)


def test_a_frozen_cache_stays_as_it_is():
    model = host_model(zoo.by_name("llama"))
    with torch.no_grad(), splice(model, [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]):
        whole = model(TOKENS)
        cache = empty_cache(model)
        model(TOKENS[:, :8], past_kv_cache=cache)
        cache.freeze()
        for _ in range(2):
            rest = model(TOKENS[:, 8:], past_kv_cache=cache)
            torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- sites and norms


@pytest.mark.parametrize("name", ["learned", "rotary", "bridge-gpt2", "bridge-llama"])
def test_a_lorsa_of_the_normalized_stream_fits_folded_and_unfolded_hosts(name):
    """Published Lorsas read `ln1.hook_normalized`; on an unfolded host the affine is undone."""
    model = host_model(zoo.by_name(name))
    norm = host_of(model).input_norm(1)
    assert norm is not None
    lorsa = Lorsa.from_attention(model, 1)
    with torch.no_grad():  # fold the affine into the Lorsa: it now reads the normalized stream
        for name in ("Q", "K"):
            weight, bias = getattr(lorsa, f"W_{name}"), getattr(lorsa, f"b_{name}")
            bias += torch.einsum("m,qmd->qd", norm.bias, weight)
            weight *= norm.gain[None, :, None]
        lorsa.b_V += lorsa.W_V @ norm.bias
        lorsa.W_V *= norm.gain
        lorsa.cfg = lorsa.cfg.replace(input_site="ln1_normalized", fold_ln=None)
        expected = model(TOKENS)
        with splice(model, lorsa):
            torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        lorsa.cfg = lorsa.cfg.replace(input_site="attn_in", fold_ln=True)
        with splice(model, lorsa):
            torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_lorsa_of_an_unfolded_model_is_refused_by_a_folded_one():
    model = host_model(zoo.by_name("learned-processed"))
    lorsa = Lorsa.from_attention(model, 0)
    assert lorsa.cfg.fold_ln is True
    lorsa.cfg = lorsa.cfg.replace(fold_ln=False)
    with pytest.raises(ValueError, match="layer norms were not folded"):
        splice(model, lorsa)


def test_another_precision_than_the_hosts_works(model):
    with torch.no_grad():
        expected = model(TOKENS)
        with splice(model, [lorsa.double() for lorsa in lifted(model)]):
            logits = model(TOKENS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- refusals


def refused(message, kind=ValueError):
    return pytest.raises(kind, match=message)


def test_what_does_not_fit_is_refused(model):
    before = fingerprint(model)
    lorsa = sparse_lorsa(model)
    with splice(model, lorsa):
        with refused("layer 1 is spliced already"):
            splice(model, sparse_lorsa(model))
        with refused("this Lorsa is in place already"):
            moved = lorsa.cfg
            lorsa.cfg = lorsa.cfg.replace(layer=0)
            splice(model, lorsa)
        lorsa.cfg = moved
    with refused("holds 2 Lorsas for layer 1"):
        splice(model, [lorsa, sparse_lorsa(model)])
    wide = Lorsa(lorsa.cfg.replace(d_model=48))
    with refused("d_model = 48, but the model has d_model = 32"):
        splice(model, wide)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with refused(r"cfg.layer is None"):
        splice(model, lorsa)
    assert_same(before, fingerprint(model))


def test_something_else_than_a_model_is_refused():
    with refused("model is a Linear", TypeError):
        host_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_in"])
def test_separate_inputs_for_each_head_are_refused(option):
    model = zoo.by_name("learned").build(torch.float32)
    lorsa = sparse_lorsa(model)
    getattr(model, f"set_{option}")(True)
    with refused(f"the model has {option} = True"):
        splice(model, lorsa)
    getattr(model, f"set_{option}")(False)
    with splice(model, lorsa):
        getattr(model, f"set_{option}")(True)
        with refused("an input for each head"):
            model(TOKENS)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("learned", "process_weights_"),
        ("learned", "fold_layer_norm"),
        ("learned", "load_and_process_state_dict"),
        ("bridge-gpt2", "enable_compatibility_mode"),
        ("bridge-gpt2", "process_weights"),
    ],
)
def test_methods_that_rewrite_weights_are_refused_while_spliced(name, method):
    model = zoo.by_name(name).build(torch.float32)
    with splice(model, sparse_lorsa(model, 0)):
        with splice(model, sparse_lorsa(model, 1)):
            pass
        with refused(f"{method} changes the model's weights", RuntimeError):
            getattr(model, method)()
    assert getattr(model, method).__self__ is model


def test_an_override_on_top_of_the_splice_is_not_thrown_away():
    model = zoo.by_name("learned").build(torch.float32)
    handle = splice(model, sparse_lorsa(model))
    attention = model.blocks[1].attn
    ours = attention.forward
    attention.forward = lambda **kwargs: ours(**kwargs) * 2
    with refused("was overridden by something else", RuntimeError):
        handle.remove()
    attention.__dict__["forward"] = ours
    handle.remove()
    assert "forward" not in attention.__dict__


@pytest.mark.parametrize("name", ["learned", "bridge-llama"])
def test_an_override_below_the_splice_runs_for_the_error_term_and_comes_back(name):
    model = zoo.by_name(name).build(torch.float32)
    attention = model.blocks[1].attn
    before = attention.forward

    def doubling(*args, **kwargs):
        out = before(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    attention.__dict__["forward"] = doubling
    with torch.no_grad():
        doubled = model(TOKENS)
        with splice(model, sparse_lorsa(model)):
            assert not torch.equal(model(TOKENS), doubled)
        with splice(model, sparse_lorsa(model), error_term=True):
            torch.testing.assert_close(model(TOKENS), doubled, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(TOKENS), doubled)


def test_an_encoder_decoder_is_refused():
    transformers = pytest.importorskip("transformers")
    zoo.by_name("bridge-gpt2")
    cfg = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    with zoo.quiet():
        model = zoo.boot(transformers.T5ForConditionalGeneration(cfg).eval())
    with pytest.raises(UnsupportedAttentionError, match="encoder-decoder"):
        Lorsa.from_attention(model, 0)


def test_unsupported_attention_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    zoo.by_name("bridge-gpt2")
    cfg = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    with zoo.quiet():
        model = zoo.boot(transformers.BloomForCausalLM(cfg).eval())
    with pytest.raises(UnsupportedAttentionError, match=r"(?s)layer 0.*Bloom"):
        Lorsa.from_attention(model, 0)
