"""Any attention layer is a Lorsa: the exact lift against the host's own attention."""

import functools

import jaxtyping
import pytest
import torch
import zoo
from einops import einsum

from lorsa_lens import ConfigError, Lorsa, LorsaConfig, splice
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import record_attention

TOKENS = zoo.tokens(batch=2, pos=14)


@functools.cache
def host_model(kind, dtype):
    """Each model is built once; the tests leave it as it was."""
    return kind.build(dtype)


@pytest.mark.parametrize("kind", zoo.kind_params)
def test_the_lift_equals_the_layer_in_float32(kind):
    model = host_model(kind, torch.float32)
    for layer, record in record_attention(model, TOKENS, range(host_of(model).n_layers)).items():
        lorsa = Lorsa.from_attention(model, layer)
        error = (lorsa(record.x, **record.context) - record.out).abs().max()
        assert error < 2e-5 * record.out.abs().max()
        assert lorsa.cfg.k is None
        assert lorsa.cfg == LorsaConfig.from_attention(model, layer)


def float64_tolerance(kind):
    """1e-12, but 1e-6 where the host itself rounds to float32 whatever its weights are."""
    if kind.host == "hooked_transformer":  # processing rounds the tables of rotary positions
        rounds = kind.processed and not kind.name.startswith("learned")
    else:  # Hugging Face's softmax, or its tables of rotary positions
        rounds = not kind.name.startswith(("bridge-native", "bridge-gpt2", "bridge-gptneox"))
    return 1e-6 if rounds else 1e-12


@pytest.mark.parametrize("kind", zoo.kind_params)
def test_the_lift_equals_the_layer_in_float64(kind):
    model = host_model(kind, torch.float64)
    for layer, record in record_attention(model, TOKENS, range(host_of(model).n_layers)).items():
        lorsa = Lorsa.from_attention(model, layer)
        assert lorsa.W_O.dtype == torch.float64
        error = (lorsa(record.x, **record.context) - record.out).abs().max()
        assert error < float64_tolerance(kind) * record.out.abs().max()


@pytest.mark.parametrize("output_site", ["attn_out", "hook_attn_out"])
@pytest.mark.parametrize("kind", zoo.kind_params)
def test_all_layers_lifted_and_spliced_give_the_same_logits(kind, output_site):
    model = host_model(kind, torch.float32)
    n_layers = host_of(model).n_layers
    if output_site == "hook_attn_out" and any(host_of(model).post_norm(i) for i in range(n_layers)):
        pytest.skip("a norm follows attention: the lift is what goes into it")
    with torch.no_grad():
        expected, cache = model.run_with_cache(TOKENS)
        lorsas = [
            Lorsa.from_attention(model, layer, output_site=output_site) for layer in range(n_layers)
        ]
        with splice(model, lorsas):
            logits, spliced = model.run_with_cache(TOKENS)
    assert (logits - expected).abs().max() < 1e-4
    for layer in range(n_layers):
        name = f"blocks.{layer}.hook_attn_out"
        torch.testing.assert_close(spliced[name], cache[name], rtol=1e-4, atol=1e-4)


def generated(model, prompt, **changes):
    return model.generate(
        prompt,
        max_new_tokens=12,
        do_sample=False,
        stop_at_eos=False,
        prepend_bos=False,
        return_type="tokens",
        verbose=False,
        **changes,
    )


@pytest.mark.parametrize("kind", [p for p in zoo.kind_params if p.values[0].generates])
def test_generation_with_and_without_a_cache_gives_the_hosts_tokens(kind):
    model = host_model(kind, torch.float32)
    prompt = TOKENS[:, :6]
    expected = generated(model, prompt)
    with splice(model, [Lorsa.from_attention(model, i) for i in range(host_of(model).n_layers)]):
        assert torch.equal(generated(model, prompt), expected)
        assert torch.equal(generated(model, prompt, use_past_kv_cache=False), expected)


# -------------------------------------------------------------------------------- initialisations


def attention(model, layer=0):
    return host_of(model).read_attention(layer)


@pytest.fixture
def gpt2():
    return host_model(zoo.KINDS[0], torch.float64)


def test_tied_heads_write_in_their_heads_subspace_and_read_what_they_write(gpt2):
    lorsa = Lorsa.from_attention(gpt2, 0, n_ov_heads=80, k=8)
    weights = attention(gpt2)
    torch.testing.assert_close(lorsa.W_O.norm(dim=-1), torch.ones(80).double())
    for head in range(80):
        own = head // lorsa.cfg.group_size
        write = lorsa.W_O[head]
        basis = torch.linalg.qr(weights.W_O[own].T).Q
        torch.testing.assert_close(basis @ (basis.T @ write), write)
        torch.testing.assert_close(lorsa.W_V[head], weights.W_V[own] @ (weights.W_O[own] @ write))


def test_svd_heads_are_exact_once_there_are_enough(gpt2):
    (record,) = record_attention(gpt2, TOKENS, [0]).values()
    lorsa = Lorsa.from_attention(gpt2, 0, init="svd")
    torch.testing.assert_close(lorsa(record.x), record.out)
    singular = torch.linalg.svdvals(attention(gpt2).W_V[0] @ attention(gpt2).W_O[0])
    torch.testing.assert_close(lorsa.W_V[:8].norm(dim=-1), singular[:8])
    half = Lorsa.from_attention(gpt2, 0, init="svd", n_ov_heads=16)
    torch.testing.assert_close(half.W_V[:4].norm(dim=-1), singular[:4])


def test_extra_circuits_are_noisy_copies(gpt2):
    lorsa = Lorsa.from_attention(gpt2, 0, n_qk_heads=6, n_ov_heads=60, k=4)
    weights = attention(gpt2)
    torch.testing.assert_close(lorsa.W_Q[:4], weights.W_Q)
    torch.testing.assert_close(lorsa.b_K, weights.b_K[[0, 1, 2, 3, 0, 1]])
    noise = (lorsa.W_Q[4] - weights.W_Q[0]).std() / weights.W_Q.std()
    assert 0.03 < noise < 0.07


@pytest.mark.parametrize("init", ["tied", "svd", "random"])
def test_value_biases_move_into_the_output_bias(gpt2, init):
    lorsa = Lorsa.from_attention(gpt2, 0, init=init, n_ov_heads=80, k=8)
    weights = attention(gpt2)
    expected = weights.b_O + einsum(weights.b_V, weights.W_O, "h d, h d m -> m")
    torch.testing.assert_close(lorsa.b_O.detach(), expected)
    assert not lorsa.b_V.any()


def test_lifted_starts_beat_random_ones(gpt2):
    (record,) = record_attention(gpt2, TOKENS, [0]).values()

    def error(init):
        lorsa = Lorsa.from_attention(gpt2, 0, init=init, n_ov_heads=32, k=16)
        return (lorsa(record.x) - record.out).square().mean()

    assert error("svd") < 0.5 * error("random")


def test_a_seed_repeats(gpt2):
    def made(seed):
        return Lorsa.from_attention(gpt2, 0, n_ov_heads=80, k=8, seed=seed).W_O

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "best"}, "init = 'best' must be one of"),
        ({"init": "exact", "n_ov_heads": 80}, "init = 'exact' needs the layer's own sizes"),
        ({"n_qk_heads": 2}, "n_qk_heads = 2: at least 4"),
        ({"n_qk_heads": 6, "n_ov_heads": 32}, "n_ov_heads = 32 must be a multiple"),
        ({"d_qk_head": 4}, "d_qk_head = 4, but the layer has 8"),
        ({"d_model": 64}, "d_model = 64, but the layer has 32"),
        ({"k": 33}, "k = 33 exceeds n_ov_heads = 32"),
    ],
)
def test_what_cannot_be_is_refused(gpt2, changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        Lorsa.from_attention(gpt2, 0, **changes)


def test_a_layer_that_is_not_there_is_refused(gpt2):
    with pytest.raises(ValueError, match="layer = 2, but the model has layers 0 to 1"):
        Lorsa.from_attention(gpt2, 2)


def test_alibi_slopes_follow_their_heads():
    model = host_model(zoo.by_name("alibi"), torch.float32)
    own = LorsaConfig.from_attention(model, 0).alibi_slopes
    lorsa = Lorsa.from_attention(model, 0, n_qk_heads=6, n_ov_heads=60, k=4)
    assert lorsa.cfg.alibi_slopes == (*own, own[0], own[1])
