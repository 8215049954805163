"""Fidelity, against dense computations, log-probabilities and ablated weights by hand."""

import copy
import functools
import math

import jaxtyping
import pytest
import torch
import zoo
from naive import naive_selection, naive_z

from lorsa_lens import Lorsa, LorsaConfig, splice
from lorsa_lens.evaluation import Fidelity, evaluate, reconstruction
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import AttentionRecord, record_attention

TOKENS = zoo.tokens(batch=5, pos=12)
NAMES = ["learned", "rotary-adjacent", "gemma2", "olmo2", "shortformer", "llama-processed",
         "bridge-gpt2", "bridge-gptneox", "bridge-llama-processed", "bridge-gemma2",
         "bridge-native"]  # fmt: skip
ANY = "bridge-gpt2" if zoo.lacks("learned") else "learned"
kinds = pytest.mark.parametrize(
    "kind", [param for param in zoo.kind_params if param.values[0].name in NAMES]
)


@functools.cache
def host_model(kind):
    return kind.build(torch.float32)


@pytest.fixture
def model():
    return host_model(zoo.by_name(ANY))


def sparse_lorsa(model, layer=1, **changes):
    return Lorsa.from_attention(model, layer, **{"n_ov_heads": 64, "k": 3, **changes})


def cross_entropy(model, counted):
    """Minus the log-probability of the next token, position by position."""
    with torch.no_grad():
        log_probs = model(TOKENS).double().log_softmax(-1)
    losses = [
        -float(log_probs[b, q, TOKENS[b, q + 1]])
        for b in range(TOKENS.shape[0])
        for q in range(TOKENS.shape[1] - 1)
        if counted[b, q]
    ]
    return sum(losses) / len(losses)


ALL = torch.ones_like(TOKENS, dtype=torch.bool)


def some_positions():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(TOKENS.shape, generator=generator) < 0.3


def fvu(target, out):
    target, out = target.double().reshape(-1, 32), out.double().reshape(-1, 32)
    total = float(((target - target.mean(0)) ** 2).sum())
    return float(((target - out) ** 2).sum()) / total


# ------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("act_fn", ["topk", "topk_relu", "jumprelu"])
def test_fvu_l0_and_dead_are_those_of_a_dense_computation(model, act_fn):
    k = None if act_fn == "jumprelu" else 3
    lorsa = sparse_lorsa(model, act_fn=act_fn, k=k, jumprelu_init_threshold=0.9)
    with torch.no_grad():
        lorsa.W_V[:5] = 0.0  # with b_V = 0 these five write nothing, ever
    record = record_attention(model, TOKENS, [1])[1]
    with torch.no_grad():
        parameters = dict(lorsa.named_parameters())
        z = naive_selection(naive_z(parameters, lorsa.cfg, record.x), parameters, lorsa.cfg)
        expected = {
            "fvu": fvu(record.out, z @ lorsa.W_O + lorsa.b_O),
            "l0": float((z != 0).double().sum(-1).mean()),
            "dead": float((z == 0).all(0).all(0).double().mean()),
        }
    assert expected["dead"] >= 5 / 64
    assert 0.5 < expected["l0"] < 20
    for batch_size in (1, 2, 32):
        found = reconstruction(lorsa, record, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_fvu_of_numbers_on_paper():
    cfg = LorsaConfig(d_model=2, n_qk_heads=1, d_qk_head=1, n_ov_heads=2, k=1)
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        lorsa.W_V.copy_(torch.eye(2))
        lorsa.W_O.copy_(torch.eye(2))
    # One token per sequence: the Lorsa writes the larger coordinate of x and drops the other.
    x = torch.tensor([[[3.0, 1.0]], [[-5.0, 2.0]], [[4.0, 0.0]], [[6.0, -1.0]]])
    record = AttentionRecord(x, x, None, torch.zeros(1, 1, dtype=torch.long), None)
    # Errors 1 + 4 + 0 + 1 = 6; mean (2, 0.5); variation 1+49+4+16 + .25+2.25+.25+2.25 = 75
    assert reconstruction(lorsa, record) == pytest.approx({"fvu": 6 / 75, "l0": 1.0, "dead": 0.5})


@kinds
def test_the_exact_lift_loses_nothing(kind):
    model = host_model(kind)
    n_layers = host_of(model).n_layers
    lorsas = [Lorsa.from_attention(model, layer) for layer in range(n_layers)]
    rows = evaluate(model, lorsas, TOKENS)
    assert [row.layer for row in rows] == [*range(n_layers), None]
    for row, lorsa in zip(rows, lorsas, strict=False):
        assert row.fvu < 1e-9
        assert row.l0 == lorsa.cfg.n_ov_heads
        assert row.dead == 0.0
    for row in rows:
        assert row.ce_spliced == pytest.approx(row.ce_clean, abs=1e-5)
        assert abs(row.ce_zero - row.ce_clean) > 1e-3
        assert row.ce_recovered == pytest.approx(1.0, abs=1e-2)


# ------------------------------------------------------------------------------- cross entropy


@kinds
def test_cross_entropies_equal_log_probabilities_by_hand(kind):
    model = host_model(kind)
    lorsas = [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]
    counted = some_positions()
    given = counted.clone()
    rows = evaluate(model, lorsas, TOKENS, predicted=counted, batch_size=2)
    assert torch.equal(counted, given)  # not written to
    clean = cross_entropy(model, counted)
    for row, spliced in zip(rows, ([lorsas[0]], [lorsas[1]], lorsas), strict=True):
        assert row.ce_clean == pytest.approx(clean, abs=1e-5)
        with splice(model, spliced):
            assert row.ce_spliced == pytest.approx(cross_entropy(model, counted), abs=1e-5)
        assert row.ce_spliced != pytest.approx(clean, abs=1e-3)
    assert (rows[-1].layer, rows[-1].fvu, rows[-1].l0, rows[-1].dead) == (None, None, None, None)


@kinds
def test_zero_ablation_equals_weights_set_to_zero(kind):
    model = host_model(kind)
    rows = evaluate(model, [sparse_lorsa(model, 0), sparse_lorsa(model, 1)], TOKENS)
    for row, layers in zip(rows, ([0], [1], [0, 1]), strict=True):
        if kind.host == "hooked_transformer":
            ablated = copy.deepcopy(model)
            for layer in layers:
                attention = ablated.blocks[layer].attn
                with torch.no_grad():
                    attention.W_O.zero_()
                    attention.b_O.zero_()
            expected = cross_entropy(ablated, ALL)
        else:
            hooks = [(f"blocks.{layer}.attn.hook_out", lambda t, hook: t * 0) for layer in layers]
            with model.hooks(fwd_hooks=hooks):
                expected = cross_entropy(model, ALL)
        assert row.ce_zero == pytest.approx(expected, abs=1e-5)
        assert row.ce_zero != pytest.approx(row.ce_clean, abs=1e-3)


def test_the_last_position_predicts_nothing(model):
    lorsa = sparse_lorsa(model)
    (unmasked,) = evaluate(model, lorsa, TOKENS)
    (everything,) = evaluate(model, lorsa, TOKENS, predicted=ALL)
    assert unmasked == everything
    assert unmasked.ce_clean == pytest.approx(cross_entropy(model, ALL), abs=1e-5)
    # A mask may leave whole batches without any position that counts.
    first = torch.zeros_like(ALL)
    first[0, 4] = True
    (one,) = evaluate(model, lorsa, TOKENS, predicted=first, batch_size=1)
    assert one.ce_clean == pytest.approx(cross_entropy(model, first), abs=1e-5)


def test_the_size_of_batches_changes_nothing(model):
    lorsas = [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]
    for whole, parts in zip(
        evaluate(model, lorsas, TOKENS), evaluate(model, lorsas, TOKENS, batch_size=2), strict=True
    ):
        for name, value in vars(whole).items():
            assert getattr(parts, name) == pytest.approx(value, abs=1e-5), name


def test_recovered_is_the_share_of_what_zeroing_costs():
    row = Fidelity(layer=0, ce_clean=1.0, ce_spliced=1.5, ce_zero=3.0)
    assert row.ce_recovered == 0.75
    assert Fidelity(layer=0, ce_clean=1.0, ce_spliced=3.5, ce_zero=3.0).ce_recovered == -0.25
    assert math.isnan(Fidelity(layer=0, ce_clean=1.0, ce_spliced=1.0, ce_zero=1.0).ce_recovered)


# ------------------------------------------------------------------------------------- rows


def test_one_lorsa_gives_one_row_also_in_a_list(model):
    lorsa = sparse_lorsa(model)
    (alone,) = evaluate(model, lorsa, TOKENS)
    (listed,) = evaluate(model, [lorsa], TOKENS)
    assert alone == listed
    assert alone.layer == 1
    assert alone.l0 == 3.0


def test_the_model_is_left_as_it_was(model):
    with torch.no_grad():
        before = model(TOKENS)
        evaluate(model, [sparse_lorsa(model, 0), sparse_lorsa(model, 1)], TOKENS)
        assert torch.equal(model(TOKENS), before)
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_a_model_with_another_layer_spliced_is_taken_as_it_is(model):
    other, lorsa = sparse_lorsa(model, 0), Lorsa.from_attention(model, 1)
    with splice(model, other):
        (row,) = evaluate(model, lorsa, TOKENS)
        assert row.ce_clean == pytest.approx(cross_entropy(model, ALL), abs=1e-5)
        assert row.fvu < 1e-9
        assert row.ce_recovered == pytest.approx(1.0, abs=1e-2)
    assert row.ce_clean != pytest.approx(cross_entropy(model, ALL), abs=1e-3)


# -------------------------------------------------------------------- other sites and precisions


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bridge-gemma2"])
def test_behind_a_post_norm_the_fvu_is_that_of_what_it_gives(name):
    model = host_model(zoo.by_name(name))
    lorsa = sparse_lorsa(model, output_site="hook_attn_out")
    (row,) = evaluate(model, lorsa, TOKENS)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        record = record_attention(model, TOKENS, [1])[1]
        out = lorsa(record.x, **record.context)
        with splice(model, lorsa):
            _, spliced = model.run_with_cache(TOKENS)
    torch.testing.assert_close(spliced["blocks.1.hook_attn_out"], out, rtol=1e-4, atol=1e-4)
    assert row.fvu == pytest.approx(fvu(cache["blocks.1.hook_attn_out"], out), rel=1e-4)
    lorsa.cfg = lorsa.cfg.replace(output_site="attn_out")
    (before,) = evaluate(model, lorsa, TOKENS)
    assert before.fvu == pytest.approx(fvu(record.out, out), rel=1e-4)
    assert before.fvu != pytest.approx(row.fvu, rel=0.1)


@pytest.mark.parametrize("name", ["learned", "rotary", "bridge-gpt2", "bridge-llama"])
def test_a_lorsa_of_the_normalized_stream_is_given_that(name):
    model = host_model(zoo.by_name(name))
    lorsa = Lorsa.from_attention(model, 1)
    gain, bias = host_of(model).input_norm(1)
    with torch.no_grad():  # fold the affine into the Lorsa: it now reads the normalized stream
        for weight, offset in ((lorsa.W_Q, lorsa.b_Q), (lorsa.W_K, lorsa.b_K)):
            offset += torch.einsum("m,qmd->qd", bias, weight)
            weight *= gain[None, :, None]
        lorsa.b_V += lorsa.W_V @ bias
        lorsa.W_V *= gain
    lorsa.cfg = lorsa.cfg.replace(input_site="ln1_normalized", fold_ln=None)
    (row,) = evaluate(model, lorsa, TOKENS)
    assert row.fvu < 1e-8
    assert row.ce_recovered == pytest.approx(1.0, abs=1e-2)


def test_a_lorsa_of_another_precision(model):
    (single,) = evaluate(model, sparse_lorsa(model), TOKENS)
    (double,) = evaluate(model, sparse_lorsa(model).double(), TOKENS)
    assert double.fvu == pytest.approx(single.fvu, rel=1e-4)
    assert double.ce_spliced == pytest.approx(single.ce_spliced, abs=1e-4)


# ------------------------------------------------------------------------------------- refusals


def test_a_mask_that_counts_nothing_is_refused(model):
    empty = torch.zeros_like(ALL)
    with pytest.raises(ValueError, match="counts no position before the last"):
        evaluate(model, sparse_lorsa(model), TOKENS, predicted=empty)
    empty[:, -1] = True
    with pytest.raises(ValueError, match="counts no position before the last"):
        evaluate(model, sparse_lorsa(model), TOKENS, predicted=empty)
    with pytest.raises(ValueError, match="counts no position before the last"):
        evaluate(model, sparse_lorsa(model), TOKENS[:, :1])


def test_a_mask_of_another_shape_is_refused(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        ValueError, match=r"predicted has shape \[5, 11\], but tokens has \[5, 12\]"
    ):
        evaluate(model, sparse_lorsa(model), TOKENS, predicted=ALL[:, 1:])


def test_lorsas_that_do_not_fit_are_refused_before_any_work(model, monkeypatch):
    lorsa = sparse_lorsa(model)

    def work(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model), "forward", work)
    with pytest.raises(ValueError, match="lorsas is empty"):
        evaluate(model, [], TOKENS)
    with pytest.raises(ValueError, match="holds 2 Lorsas for layer 1"):
        evaluate(model, [lorsa, sparse_lorsa(model)], TOKENS)
    with splice(model, lorsa), pytest.raises(ValueError, match="layer 1 is spliced already"):
        evaluate(model, sparse_lorsa(model), TOKENS)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        evaluate(model, lorsa, TOKENS)
