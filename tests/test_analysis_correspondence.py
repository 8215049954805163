"""Shares of attention heads, against heads made to be mixtures of known ones."""

import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens import Lorsa
from lorsa_lens.analysis.correspondence import (
    circuit_overlap,
    correspondence,
    effective_heads,
    head_shares,
    match_features,
    span_histogram,
    spanned_heads,
)
from lorsa_lens.recording import record_attention


def setting(dtype=torch.float64, **sizes):
    model = zoo.KINDS[0].build(dtype)
    record = record_attention(model, zoo.tokens(6, 12), [1])[1]
    return model, Lorsa.from_attention(model, 1, **sizes), record


@pytest.mark.parametrize("batch_size", [4, 16])
def test_shares_are_the_split_of_the_original_output(batch_size):
    """Against TransformerLens's own heads: hook_z W_O, less the constant value biases."""
    kind = zoo.by_name("bridge-gpt2" if zoo.lacks("learned") else "learned")
    model = kind.build(torch.float64)
    tokens = zoo.tokens(6, 12)
    record = record_attention(model, tokens, [1])[1]
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    found = head_shares(model, lorsa, record, batch_size=batch_size)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z")
        z = cache["blocks.1.attn.hook_z"].reshape(*tokens.shape, zoo.N_HEADS, -1)
        W_O = model.blocks[1].attn.W_O.reshape(zoo.N_HEADS, -1, zoo.D_MODEL)
        b_V = model.blocks[1].attn.b_V.reshape(zoo.N_HEADS, -1)
        written = torch.einsum("bshd,hdm->bshm", z - b_V, W_O)
        part = record.seen_by(lorsa)
        code = lorsa.encode(part.x, **part.context)
        acts = torch.zeros(*tokens.shape, 16, dtype=torch.float64)
        acts.scatter_(-1, code.indices, code.values)
        carried = torch.einsum("bsi,bshm,im->ih", acts, written, lorsa.W_O)
    active = (acts != 0).any((0, 1))
    assert active.sum() > 8
    assert found[~active].isnan().all()
    torch.testing.assert_close(found[active], (carried / carried.sum(1, keepdim=True))[active])
    torch.testing.assert_close(found.sum(1)[active], torch.ones(16, dtype=torch.float64)[active])
    assert found[active].std() > 0.05


def test_a_head_made_of_two_attention_heads_spans_both():
    """The exact lift writes along each head's own output; a sum of two belongs to both."""
    model, lorsa, record = setting()
    with torch.no_grad():
        lorsa.W_O[0] = 0.0  # never active, once only one stays
    lorsa.cfg = lorsa.cfg.replace(k=1)
    shares = head_shares(model, lorsa, record)
    assert shares[0].isnan().all()
    assert int(spanned_heads(shares)[0]) == 0


def test_numbers_of_heads_on_paper():
    shares = torch.tensor(
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.6, 0.8, -0.4], [0.95, 0.05, 0.0]]
    ).double()
    assert effective_heads(shares).tolist() == pytest.approx(
        [1.0, 2.0, 1.8**2 / (0.36 + 0.64 + 0.16), 1 / (0.95**2 + 0.05**2)]
    )
    assert spanned_heads(shares).tolist() == [1, 2, 3, 1]
    assert spanned_heads(shares, mass=0.5).tolist() == [1, 1, 2, 1]
    assert spanned_heads(shares, mass=0.99).tolist() == [1, 2, 3, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_effective_heads_lie_between_one_and_all(sizes):
    shares = torch.tensor([sizes], dtype=torch.float64)
    shares /= shares.sum()
    assert 1 - 1e-9 <= effective_heads(shares).item() <= len(sizes) + 1e-9
    assert 1 <= spanned_heads(shares).item() <= len(sizes)


def test_the_table_and_its_histogram():
    model, lorsa, record = setting(n_ov_heads=16, k=4)
    frame = correspondence(model, lorsa, record)
    shares = head_shares(model, lorsa, record)
    assert frame["name"].tolist()[:2] == ["L1.0", "L1.1"]
    for head in range(16):
        row = frame.iloc[head]
        if shares[head].isnan().any():  # it was never active
            assert np.isnan(row["top_share"])
            continue
        assert row["top_share"] == pytest.approx(shares[head].max().item())
        assert row[f"share_{row['top_head']}"] == row["top_share"]
    histogram = span_histogram(frame)
    assert histogram["n_heads"].sum() == (~shares.isnan().any(1)).sum().item()
    assert histogram["share"].sum() == pytest.approx(1.0)
    counts = spanned_heads(shares)
    for row in histogram.itertuples():
        assert row.n_heads == int((counts == row.spanned_heads).sum())


def test_circuits_overlap_with_the_heads_they_were_copied_from():
    model, lorsa, record = setting(n_ov_heads=16, k=4)
    frame = circuit_overlap(model, lorsa, record, batch_size=4)
    assert len(frame) == 16
    for row in frame.itertuples():
        if row.circuit == row.attention_head:
            assert row.pattern_distance == pytest.approx(0.0, abs=1e-9)
            assert row.weight_cosine == pytest.approx(1.0)
        else:
            assert 0.05 < row.pattern_distance <= 1.0
            assert abs(row.weight_cosine) < 0.9
    # One pair by hand.
    exact = Lorsa.from_attention(model, 1)
    part = record.seen_by(exact)
    with torch.no_grad():
        patterns = exact.pattern(part.x, [0, 2])
        forms = [exact.W_Q[head] @ exact.W_K[head].T for head in (0, 2)]
    distance = (patterns[:, 0] - patterns[:, 1]).abs().sum(-1).mean() / 2
    cosine = torch.cosine_similarity(forms[0].flatten(), forms[1].flatten(), dim=0)
    pair = frame[(frame["circuit"] == 0) & (frame["attention_head"] == 2)].iloc[0]
    assert pair["pattern_distance"] == pytest.approx(distance.item())
    assert pair["weight_cosine"] == pytest.approx(cosine.item())


class Dictionary:
    """An SAE whose features are a Lorsa's heads in another order, and one more."""

    def __init__(self, lorsa, record, order):
        self.W_dec = torch.cat((-lorsa.W_O.detach()[order], torch.ones(1, lorsa.cfg.d_model)))
        part = record.seen_by(lorsa)
        code = lorsa.encode(part.x, **part.context)
        acts = torch.zeros(*part.x.shape[:2], lorsa.cfg.n_ov_heads, dtype=part.x.dtype)
        acts.scatter_(-1, code.indices, code.values)
        self.outputs, self.acts, self.order = part.out, acts.detach(), order

    def encode(self, x):
        rows = [int((self.outputs == one).all(-1).all(-1).nonzero()[0]) for one in x]
        acts = 3 * self.acts[rows][..., self.order]
        return torch.nn.functional.pad(acts, (0, 1))


def test_features_are_matched_by_decoder_and_by_activation():
    model, lorsa, record = setting(n_ov_heads=16, k=4)
    del model
    order = torch.randperm(16)
    with torch.no_grad():
        frame = match_features(lorsa, record, Dictionary(lorsa, record, order), batch_size=4)
    place = order.argsort().tolist()
    assert frame["decoder_feature"].tolist() == place
    assert frame["decoder_cosine"].tolist() == pytest.approx([-1.0] * 16, abs=1e-5)
    alive = [head for head in range(16) if not math.isclose(frame["correlation"][head], 0.0)]
    assert len(alive) >= 8
    for head in alive:
        assert frame["active_feature"][head] == place[head]
        assert frame["correlation"][head] == pytest.approx(1.0, abs=1e-6)


def test_features_of_an_sae_of_saelens():
    """Its own `W_dec` and `encode`, against correlations of all tokens at once."""
    saelens = pytest.importorskip("sae_lens")
    _, lorsa, record = setting(torch.float32, n_ov_heads=16, k=4)
    sae = saelens.StandardSAE(
        saelens.StandardSAEConfig(d_in=zoo.D_MODEL, d_sae=24, device="cpu", dtype="float32")
    )
    part = record.seen_by(lorsa)
    code = lorsa.encode(part.x, **part.context)
    acts = torch.zeros(*part.x.shape[:2], 16).scatter_(-1, code.indices, code.values).detach()
    # The decoder vectors of features 8 to 23 are those of the heads, the other way round.
    with torch.no_grad():
        sae.W_dec[8:] = -3 * lorsa.W_O
        features = sae.encode(part.out)
        frame = match_features(lorsa, record, sae, batch_size=4)
    assert features.shape == (*part.x.shape[:2], 24)
    assert frame["decoder_feature"].tolist() == list(range(8, 24))
    assert frame["decoder_cosine"].tolist() == pytest.approx([-1.0] * 16, abs=1e-5)
    flat = torch.cat((acts, features), -1).flatten(0, 1).T
    expected = torch.corrcoef(flat.double())[:16, 16:].nan_to_num(0.0)
    for head in range(16):
        best = expected[head].max().item()
        assert frame["correlation"][head] == pytest.approx(best, abs=1e-5)
        if best > 0:
            assert expected[head, frame["active_feature"][head]].item() == pytest.approx(best)
    assert (frame["correlation"] > 0.1).sum() >= 8


def test_what_does_not_correspond_is_refused(monkeypatch):
    model, lorsa, record = setting(torch.float32, n_ov_heads=16, k=4)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)

    class Narrow:
        W_dec = torch.zeros(5, 3)

        def encode(self, x):
            return x

    with pytest.raises(ValueError, match=r"W_dec has shape \[5, 3\].*d_model is 32"):
        match_features(lorsa, record, Narrow())
    name = "bridge-gemma2" if zoo.lacks("gemma2") else "gemma2"
    gemma = zoo.by_name(name).build(torch.float32)
    late = Lorsa.from_attention(gemma, 1, output_site="hook_attn_out", n_ov_heads=16, k=4)
    record = record_attention(gemma, zoo.tokens(2, 8), [1])[1]
    with pytest.raises(ValueError, match="writes after a norm"):
        head_shares(gemma, late, record)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        correspondence(model, lorsa, record)
