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
from lorsa_lens.data import open_documents, pack
from lorsa_lens.evaluation import Fidelity, evaluate
from lorsa_lens.evaluation.layer import LayerEvaluation
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


@functools.cache
def both_layers(kind):
    """Two Lorsas, and what is measured of them at some positions, in several batches."""
    model = host_model(kind)
    lorsas = [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]
    return lorsas, evaluate(model, lorsas, TOKENS, predicted=some_positions(), batch_size=3)


def fvu(target, out):
    target, out = target.double().reshape(-1, 32), out.double().reshape(-1, 32)
    total = float(((target - target.mean(0)) ** 2).sum())
    return float(((target - out) ** 2).sum()) / total


# ------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("act_fn", ["topk", "topk_relu", "jumprelu"])
def test_reconstruction_metrics_are_those_of_a_dense_computation(model, act_fn):
    k = None if act_fn == "jumprelu" else 3
    lorsa = sparse_lorsa(model, act_fn=act_fn, k=k, jumprelu_init_threshold=0.9)
    with torch.no_grad():
        lorsa.W_V[:5] = 0.0  # with b_V = 0 these five write nothing, ever
    record = record_attention(model, TOKENS, [1])[1]
    with torch.no_grad():
        parameters = dict(lorsa.named_parameters())
        z = naive_selection(naive_z(parameters, lorsa.cfg, record.x), parameters, lorsa.cfg)
        y, out = record.out.double(), (z @ lorsa.W_O + lorsa.b_O).double()
    expected = {
        "fvu": fvu(y, out),
        "explained_variance": 1 - fvu(y, out),
        "mse": float(((y - out) ** 2).sum(-1).mean()),
        "cosine": float(((y * out).sum(-1) / (y.norm(dim=-1) * out.norm(dim=-1))).mean()),
        "relative_reconstruction_bias": float((out**2).sum() / (out * y).sum()),
        "l0": float((z != 0).double().sum(-1).mean()),
        "l1": float(z.abs().sum(-1).mean()),
        "dead": float((z == 0).all(0).all(0).double().mean()),
    }
    assert expected["dead"] >= 5 / 64
    assert 0.5 < expected["l0"] < 20
    for batch_size in (2, 32):
        (row,) = evaluate(model, lorsa, TOKENS, batch_size=batch_size)
        assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, rel=1e-4)
        density = (z != 0).double().mean((0, 1))
        torch.testing.assert_close(row.density, density, rtol=1e-12, atol=0)
        assert (row.n_tokens, row.n_predicted, row.n_documents) == (60, 55, 5)


def test_the_fvu_of_numbers_on_paper(model):
    """One token per sequence: the Lorsa writes the larger coordinate of x and drops the other."""
    cfg = LorsaConfig(d_model=32, n_qk_heads=1, d_qk_head=1, n_ov_heads=32, k=1, layer=1)
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        lorsa.W_V.copy_(torch.eye(32))
        lorsa.W_O.copy_(torch.eye(32))
    x = torch.zeros(4, 1, 32)
    x[..., :2] = torch.tensor([[[3.0, 1.0]], [[-5.0, 2.0]], [[4.0, 0.0]], [[6.0, -1.0]]])
    record = AttentionRecord(x, x, None, torch.zeros(1, 1, dtype=torch.long), None)
    counted = torch.ones(4, 1, dtype=torch.bool)
    layer = LayerEvaluation(model, lorsa, "first")
    with torch.no_grad():
        layer.survey(record, counted)
        values = layer.measure(record, counted)
    found = {name: float(value.sum()) for name, value in values.items()}
    # Errors 1 + 4 + 0 + 1; mean (2, 0.5); variation 1+49+4+16 + .25+2.25+.25+2.25
    assert found["error"] == 6
    assert found["variance"] == 75
    assert (found["counted"], found["l0"], found["l1"]) == (4, 4, 18)
    assert (found["energy_out"], found["product"]) == (9 + 25 + 16 + 36, 9 + 25 + 16 + 36)
    assert found["error_elsewhere"] == found["variance_elsewhere"] == 0
    assert layer.density[:2].tolist() == [1.0, 0.0]


def test_without_sinks_only_other_positions_count(model):
    lorsa = sparse_lorsa(model)
    (row,) = evaluate(model, lorsa, TOKENS, sinks="first", batch_size=2)
    with torch.no_grad():
        record = record_attention(model, TOKENS, [1])[1]
        out = lorsa(record.x, **record.context)
    assert row.fvu_without_sinks == pytest.approx(fvu(record.out[:, 1:], out[:, 1:]), rel=1e-4)
    assert row.explained_variance_without_sinks == pytest.approx(1 - row.fvu_without_sinks)
    assert row.sink_share == pytest.approx(1 / 12)
    assert row.fvu_without_sinks != pytest.approx(row.fvu, rel=1e-3)


def test_special_tokens_do_not_count_but_are_attended_to(model):
    tokens = TOKENS.clone()
    tokens[:, 0], tokens[1, 5], tokens[3, 11] = zoo.BOS, zoo.EOS, zoo.PAD
    counts = tokens > 2
    assert int((~counts).sum()) == 7
    lorsa = sparse_lorsa(model)
    (row,) = evaluate(model, lorsa, tokens, batch_size=2)
    (everything,) = evaluate(model, lorsa, tokens, exclude_special_tokens=False)
    with torch.no_grad():
        record = record_attention(model, tokens, [1])[1]
        out = lorsa(record.x, **record.context)
    assert row.fvu == pytest.approx(fvu(record.out[counts], out[counts]), rel=1e-4)
    assert everything.fvu == pytest.approx(fvu(record.out, out), rel=1e-4)
    assert (row.n_tokens, everything.n_tokens) == (53, 60)
    assert (row.n_predicted, everything.n_predicted) == (55 - 6, 55)
    (masked,) = evaluate(model, lorsa, tokens, predicted=counts, exclude_special_tokens=False)
    for name in ("ce_clean", "ce_spliced", "ce_zero", "kl", "agreement"):
        assert getattr(row, name) == pytest.approx(getattr(masked, name), abs=1e-12), name


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
        assert row.cosine == pytest.approx(1.0, abs=1e-9)
        assert row.pattern_overlap == pytest.approx(1.0, abs=1e-5)
        assert row.matched_heads == tuple(range(lorsa.cfg.n_qk_heads))
        assert row.pattern_overlap_chance < 0.99
    for row in rows:
        assert row.kl == pytest.approx(0.0, abs=1e-7)
        assert row.kl_recovered == pytest.approx(1.0, abs=1e-5)
        assert row.agreement == 1.0
        assert row.ce_spliced == pytest.approx(row.ce_clean, abs=1e-5)
        assert abs(row.ce_zero - row.ce_clean) > 1e-3
        assert row.ce_recovered == pytest.approx(1.0, abs=1e-2)
        assert row.ce_recovered_mean == pytest.approx(1.0, abs=2e-2)


# ------------------------------------------------------------------------------- predictions


@kinds
def test_cross_entropies_equal_log_probabilities_by_hand(kind):
    model = host_model(kind)
    counted = some_positions()
    lorsas, rows = both_layers(kind)
    clean = cross_entropy(model, counted)
    for row, spliced in zip(rows, ([lorsas[0]], [lorsas[1]], lorsas), strict=True):
        assert row.ce_clean == pytest.approx(clean, abs=1e-5)
        with splice(model, spliced):
            assert row.ce_spliced == pytest.approx(cross_entropy(model, counted), abs=1e-5)
        assert row.ce_spliced != pytest.approx(clean, abs=1e-3)
    assert (rows[-1].layer, rows[-1].fvu, rows[-1].l0, rows[-1].dead) == (None, None, None, None)
    assert (rows[-1].pattern_overlap, rows[-1].density) == (None, None)


@kinds
def test_zero_ablation_equals_weights_set_to_zero(kind):
    model = host_model(kind)
    _, rows = both_layers(kind)
    for row, layers in zip(rows, ([0], [1], [0, 1]), strict=True):
        if kind.host == "hooked_transformer":
            ablated = copy.deepcopy(model)
            for layer in layers:
                attention = ablated.blocks[layer].attn
                with torch.no_grad():
                    attention.W_O.zero_()
                    attention.b_O.zero_()
            expected = cross_entropy(ablated, some_positions())
        else:
            hooks = [(f"blocks.{layer}.attn.hook_out", lambda t, hook: t * 0) for layer in layers]
            with model.hooks(fwd_hooks=hooks):
                expected = cross_entropy(model, some_positions())
        assert row.ce_zero == pytest.approx(expected, abs=1e-5)
        assert row.ce_zero != pytest.approx(row.ce_clean, abs=1e-3)


@kinds
def test_mean_ablation_writes_the_mean_of_what_the_layer_adds(kind):
    model = host_model(kind)
    _, rows = both_layers(kind)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    means = {
        name: cache[name].double().mean((0, 1)).float()
        for name in ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")
    }
    for row, names in zip(rows, ([*means][:1], [*means][1:], [*means]), strict=True):
        hooks = [
            (name, lambda t, hook, mean=means[name]: mean.expand_as(t).clone()) for name in names
        ]
        with model.hooks(fwd_hooks=hooks):
            expected = cross_entropy(model, some_positions())
        assert row.ce_mean == pytest.approx(expected, abs=1e-5)
        assert row.ce_mean != pytest.approx(row.ce_zero, abs=1e-4)


def test_divergence_and_agreement_are_those_of_the_distributions(model):
    lorsas = [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]
    counted = some_positions()
    rows = evaluate(model, lorsas, TOKENS, predicted=counted, batch_size=3)
    counted = counted.clone()
    counted[:, -1] = False
    with torch.no_grad():
        clean = model(TOKENS).double()[counted]
    for row, spliced in zip(rows, ([lorsas[0]], [lorsas[1]], lorsas), strict=True):
        with splice(model, spliced), torch.no_grad():
            other = model(TOKENS).double()[counted]
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=clean),
            torch.distributions.Categorical(logits=other),
        )
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-5)
        same = [int(p.argmax()) == int(q.argmax()) for p, q in zip(clean, other, strict=True)]
        assert row.agreement == pytest.approx(sum(same) / len(same))
        assert row.kl_recovered == pytest.approx(1 - row.kl / row.kl_zero)
        assert 0 < row.kl != pytest.approx(row.kl_zero, rel=1e-3)
        assert row.kl_mean != pytest.approx(row.kl_zero, rel=1e-3)


def test_the_last_position_predicts_nothing(model):
    lorsa = sparse_lorsa(model)
    (unmasked,) = evaluate(model, lorsa, TOKENS)
    (everything,) = evaluate(model, lorsa, TOKENS, predicted=ALL)
    assert unmasked == everything
    assert unmasked.ce_clean == pytest.approx(cross_entropy(model, ALL), abs=1e-5)
    # A mask may leave whole batches without any position that counts.
    first = torch.zeros_like(ALL)
    first[0, 4] = True
    given = first.clone()
    (one,) = evaluate(model, lorsa, TOKENS, predicted=first, batch_size=1)
    assert one.ce_clean == pytest.approx(cross_entropy(model, first), abs=1e-5)
    assert torch.equal(first, given)  # not written to


def test_the_size_of_batches_changes_nothing(model):
    lorsas = [sparse_lorsa(model, 0), sparse_lorsa(model, 1)]
    for whole, parts in zip(
        evaluate(model, lorsas, TOKENS), evaluate(model, lorsas, TOKENS, batch_size=2), strict=True
    ):
        assert whole.metrics().keys() == parts.metrics().keys()
        for name, value in whole.metrics().items():
            other = getattr(parts, name)
            assert other == pytest.approx(value, rel=1e-3, abs=1e-5), name
            assert (other.low, other.high) == pytest.approx(
                (value.low, value.high), rel=1e-3, abs=1e-5
            ), name


def test_recovered_is_the_share_of_what_ablation_costs(model):
    (row,) = evaluate(model, sparse_lorsa(model), TOKENS)
    for recovered, ablated in (("ce_recovered", "ce_zero"), ("ce_recovered_mean", "ce_mean")):
        cost = getattr(row, ablated) - row.ce_clean
        expected = (getattr(row, ablated) - row.ce_spliced) / cost
        assert getattr(row, recovered) == pytest.approx(expected)


def test_where_nothing_is_at_stake_nothing_is_recovered():
    model = zoo.by_name("learned").build(torch.float32)
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()
        model.blocks[1].attn.b_O.zero_()
    (row,) = evaluate(model, Lorsa.from_attention(model, 1), TOKENS)
    assert math.isnan(row.ce_recovered)
    assert math.isnan(row.fvu)


# ------------------------------------------------------------------------------------- rows


def test_one_lorsa_gives_one_row_also_in_a_list(model):
    lorsa = sparse_lorsa(model)
    (alone,) = evaluate(model, lorsa, TOKENS)
    (listed,) = evaluate(model, [lorsa], TOKENS)
    assert alone == listed
    assert isinstance(alone, Fidelity)
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


# ------------------------------------------------------------------------------------ documents


def test_rows_are_documents_unless_others_are_named(model):
    lorsa = sparse_lorsa(model)
    documents = torch.tensor([7, 3, 7, 9, 3])
    (by_row,) = evaluate(model, lorsa, TOKENS, batch_size=2)
    (by_document,) = evaluate(model, lorsa, TOKENS, documents=documents, batch_size=2)
    assert (by_row.n_documents, by_document.n_documents) == (5, 3)
    assert by_document.ce_spliced == pytest.approx(by_row.ce_spliced)
    assert by_document.ce_spliced.high != pytest.approx(by_row.ce_spliced.high)
    # The same by hand: 11 predictions in each row.
    with torch.no_grad(), splice(model, lorsa):
        log_probs = model(TOKENS).double().log_softmax(-1)[:, :-1]
    losses = -log_probs.gather(-1, TOKENS[:, 1:, None])[..., 0].sum(-1)
    for row, groups in (
        (by_row, [[0], [1], [2], [3], [4]]),
        (by_document, [[0, 2], [1, 4], [3]]),
    ):
        mean = float(losses.sum()) / 55
        deviations = [float(losses[group].sum()) - mean * 11 * len(group) for group in groups]
        n = len(groups)
        error = math.sqrt(n / (n - 1) * sum(d * d for d in deviations)) / 55
        assert row.ce_spliced.high - row.ce_spliced == pytest.approx(1.959964 * error, rel=1e-4)
        assert row.ce_spliced - row.ce_spliced.low == pytest.approx(1.959964 * error, rel=1e-4)


def test_the_mask_follows_its_rows_when_they_are_sorted_by_document(model):
    lorsa, counted = sparse_lorsa(model), some_positions()
    documents = torch.tensor([4, 3, 2, 1, 0])
    (row,) = evaluate(model, lorsa, TOKENS, predicted=counted, documents=documents)
    assert row.ce_clean == pytest.approx(cross_entropy(model, counted), abs=1e-5)


def test_the_interval_of_the_fvu_is_that_of_the_bootstrap():
    """Of sequences, with the mean of the outputs taken anew for each resample."""
    model = host_model(zoo.by_name(ANY))
    tokens = zoo.tokens(batch=150, pos=6, seed=3)
    lorsa = sparse_lorsa(model)
    (row,) = evaluate(model, lorsa, tokens)
    with torch.no_grad():
        record = record_attention(model, tokens, [1])[1]
        out = lorsa(record.x, **record.context)
    resamples = torch.randint(150, (400, 150), generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([fvu(record.out[rows], out[rows]) for rows in resamples]).std()
    assert (row.fvu.high - row.fvu) / 1.96 == pytest.approx(float(spread), rel=0.15)


def test_one_document_has_no_interval(model):
    (row,) = evaluate(model, sparse_lorsa(model), TOKENS[:1])
    assert row.n_documents == 1
    assert math.isnan(row.fvu.low)
    assert math.isnan(row.ce_recovered.high)


# ------------------------------------------------------------------------------------- contexts


def test_packed_documents_are_units_of_the_intervals(model):
    documents = [list(range(4, 4 + n)) for n in (30, 9, 21, 5, 15)]
    contexts = pack(open_documents(documents), 10, bos_token_id=zoo.BOS)
    tokens = torch.stack([torch.from_numpy(context.tokens) for context in contexts])
    contexts.load_state_dict(pack(open_documents(documents), 10, bos_token_id=0).state_dict())
    lorsa = sparse_lorsa(model)
    (row,) = evaluate(model, lorsa, contexts, batch_size=3)
    (expected,) = evaluate(model, lorsa, tokens)
    assert row.n_documents == 5
    assert row.n_tokens == expected.n_tokens == 72  # 80 in 8 whole contexts, without their BOS
    assert row.fvu == pytest.approx(expected.fvu)
    assert row.ce_recovered == pytest.approx(expected.ce_recovered)
    (again,) = evaluate(model, lorsa, contexts, batch_size=3)  # from the beginning again
    assert again.fvu == row.fvu
    (some,) = evaluate(model, lorsa, contexts, batch_size=3, max_tokens=65)
    (first,) = evaluate(model, lorsa, tokens[:6])
    assert some.n_tokens == first.n_tokens == 54
    assert some.fvu == pytest.approx(first.fvu)


def test_contexts_are_units_where_all_text_is_one_document(model):
    contexts = pack(open_documents(zoo.tokens(1, 60)[0].tolist()), 10)
    (row,) = evaluate(model, sparse_lorsa(model), contexts, batch_size=4)
    assert row.n_documents == 6
    assert row.fvu.low < row.fvu < row.fvu.high


def test_padding_counts_nowhere(model):
    documents = zoo.tokens(4, 7).tolist()
    contexts = pack(open_documents(documents), 10, respect_documents=True)
    lorsa = sparse_lorsa(model)
    (padded,) = evaluate(model, lorsa, contexts)
    (plain,) = evaluate(model, lorsa, torch.tensor(documents))
    assert padded.metrics().keys() == plain.metrics().keys()
    for name, value in plain.metrics().items():
        assert getattr(padded, name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert getattr(padded, name).high == pytest.approx(value.high, rel=1e-3, abs=1e-5), name
    assert (padded.n_documents, padded.n_predicted, padded.n_tokens) == (4, 24, 28)


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
    with pytest.raises(ValueError, match=r"documents has shape \[4\], but tokens has 5 rows"):
        evaluate(model, sparse_lorsa(model), TOKENS, documents=torch.arange(4))
    with pytest.raises(ValueError, match=r"tokens has shape \[12\]: give ids \[row, pos\]"):
        evaluate(model, sparse_lorsa(model), TOKENS[0])
    with pytest.raises(ValueError, match="sinks = 'norm' must be one of attention, first"):
        evaluate(model, sparse_lorsa(model), TOKENS, sinks="norm")


def test_text_in_which_nothing_counts_is_refused(model):
    with pytest.raises(ValueError, match="no position counts: all hold special tokens"):
        evaluate(model, sparse_lorsa(model), torch.full((2, 6), zoo.BOS))


def test_masks_are_for_tensors_and_limits_positive(model):
    contexts = pack(open_documents(TOKENS), 12)
    with pytest.raises(ValueError, match="predicted is for tokens in a tensor"):
        evaluate(model, sparse_lorsa(model), contexts, predicted=ALL)
    with pytest.raises(ValueError, match="documents is for tokens in a tensor"):
        evaluate(model, sparse_lorsa(model), contexts, documents=torch.arange(5))
    with pytest.raises(ValueError, match="max_tokens = 0 must be positive"):
        evaluate(model, sparse_lorsa(model), TOKENS, max_tokens=0)
    with pytest.raises(ValueError, match="batch_size = 0 must be positive"):
        evaluate(model, sparse_lorsa(model), TOKENS, batch_size=0)


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
