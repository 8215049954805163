"""Parts of an evaluation: sums by document, sinks, patterns, comparisons of logits, histograms."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.evaluation import patterns, predictions, sinks
from lorsa_lens.evaluation.documents import DocumentSums, Estimate
from lorsa_lens.evaluation.fidelity import HISTOGRAM_EDGES, density_histogram
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.testbed import load_language, load_model

# ---------------------------------------------------------------------------------- documents


def some_documents(n, seed=0):
    """A document of each token of rows of 8, in order, and two statistics of each token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (n,), generator=generator)
    document = torch.repeat_interleave(torch.arange(n), lengths)
    n_tokens = len(document) // 8 * 8
    document = document[:n_tokens].view(-1, 8)
    level = torch.rand(n, generator=generator)  # tokens of a document resemble each other
    b = 1 + level[document] + torch.rand(document.shape, generator=generator)
    a = b * (0.2 + level[document]) + torch.rand(document.shape, generator=generator)
    return document, {"a": a.double(), "b": b.double()}


def summed(document, values, batch_size=4):
    sums = DocumentSums(list(values))
    for start in range(0, len(document), batch_size):
        rows = slice(start, start + batch_size)
        sums.add(document[rows], {name: value[rows] for name, value in values.items()})
    sums.finish()
    return sums


def by_document(document, values):
    numbers = document[document >= 0].unique().tolist()
    return {
        name: torch.tensor([float(value[document == n].sum()) for n in numbers]).double()
        for name, value in values.items()
    }


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 20), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_ratio_and_its_interval_are_those_of_the_formula(n, batch_size, seed):
    document, values = some_documents(n + 8, seed)
    sums = summed(document, values, batch_size)
    parts = by_document(document, values)
    a, b, n = parts["a"], parts["b"], len(parts["a"])
    expected = float(a.sum() / b.sum())
    error = math.sqrt(n / (n - 1) * float(((a - expected * b) ** 2).sum())) / float(b.sum())
    found = sums.ratio({"a": 1.0}, {"b": 1.0})
    assert sums.n_documents == n
    assert found == pytest.approx(expected)
    assert found.high == pytest.approx(expected + 1.959964 * error, rel=1e-6)
    assert found.low == pytest.approx(expected - 1.959964 * error, rel=1e-6)


def test_the_interval_is_that_of_the_jackknife_and_of_the_bootstrap():
    document, values = some_documents(300)
    found = summed(document, values).ratio({"a": 1.0, "b": -0.5}, {"b": 2.0, "a": 0.25})
    parts = by_document(document, values)
    above, below = parts["a"] - 0.5 * parts["b"], 2 * parts["b"] + 0.25 * parts["a"]
    n = len(above)
    left_out = (above.sum() - above) / (below.sum() - below)
    jackknife = float(((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()).sqrt())
    draws = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(1))
    bootstrap = float((above[draws].sum(1) / below[draws].sum(1)).std())
    error = (found.high - found) / 1.959964
    assert error == pytest.approx(jackknife, rel=0.02)
    assert error == pytest.approx(bootstrap, rel=0.06)
    residual = values["a"] - 0.5 * values["b"] - found * (2 * values["b"] + 0.25 * values["a"])
    tokenwise = float(residual.square().sum().sqrt() / below.sum())
    assert error > 1.5 * tokenwise  # tokens of a document are not independent


def test_sums_keep_nothing_of_documents_that_are_over():
    sums = DocumentSums(["a"])
    for batch in range(50):
        document = torch.arange(10 * batch, 10 * batch + 10)[None]
        sums.add(document, {"a": torch.ones(1, 10).double()})
        assert len(sums._open) == 10
    sums.finish()
    assert sums.n_documents == 500
    assert sums.total("a") == 500


def test_padding_and_documents_without_counted_tokens_are_none():
    document = torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]])
    values = torch.tensor([[1.0, 2.0, 0.0, 0.0], [4.0, 0.0, 9.0, 9.0]]).double()
    sums = summed(document, {"a": values})
    assert sums.n_documents == 2
    assert sums.total("a") == 7


def test_a_ratio_to_nothing_is_no_number():
    document = torch.tensor([[0, 1]])
    sums = summed(document, {"a": torch.ones(1, 2).double(), "b": torch.zeros(1, 2).double()})
    assert math.isnan(sums.ratio({"a": 1.0}, {"b": 1.0}))
    assert sums.ratio({"b": 1.0}, {"a": 1.0}) == 0.0


def test_an_estimate_is_a_number_with_an_interval():
    estimate = Estimate(0.5, 0.25, 1.0)
    assert (estimate, estimate.low, estimate.high) == (0.5, 0.25, 1.0)
    assert f"{estimate:.2f}" == "0.50"
    assert math.isnan(Estimate(1.0).low)


# -------------------------------------------------------------------------------------- sinks


def record_of(x):
    return AttentionRecord(x, x, None, torch.arange(x.shape[1])[None], None)


def attention_with_sinks(attention_dir, seed):
    """Two heads of three dimensions that look sharply; tokens that resemble one another."""
    torch.manual_seed(seed)
    cfg = LorsaConfig(
        d_model=6, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, k=None, layer=0,
        attention_dir=attention_dir,
    )  # fmt: skip
    attention = Lorsa(cfg)
    with torch.no_grad():
        attention.W_Q *= 4
        attention.b_Q += torch.randn(2, 4)
    return attention, torch.randn(3, 9, 6)


def naive_sinks(attention, x, counted):
    causal = attention.cfg.attention_dir == "causal"
    n_rows, n, _ = x.shape
    pattern = attention.pattern(x, [0, 1]).double()
    W_V, W_O = attention.W_V.double().view(2, 3, 6), attention.W_O.double().view(2, 3, 6)
    found = torch.zeros(n_rows, n, dtype=torch.bool)
    for b in range(n_rows):
        sink_keys = set()
        for h in range(2):
            for k in range(n):
                asking = [
                    q for q in range(n) if counted[b, q] and (q > k or (not causal and q != k))
                ]
                if not asking or 2 * len(asking) < int(counted[b].sum()):
                    continue
                if sum(float(pattern[b, h, q, k]) for q in asking) / len(asking) >= 0.3:
                    sink_keys.add((h, k))
        for q in range(n):
            fetched = written = 0.0
            for h in range(2):
                parts = [pattern[b, h, q, k] * W_V[h] @ x[b, k].double() for k in range(n)]
                to_sink = [part for k, part in enumerate(parts) if (h, k) in sink_keys]
                written += float((sum(parts) @ W_O[h]).square().sum())
                if to_sink:
                    fetched += float((sum(to_sink) @ W_O[h]).square().sum())
            found[b, q] = fetched > 0.5 * written
    return found


@pytest.mark.parametrize("attention_dir", ["causal", "bidirectional"])
@torch.no_grad()
def test_sink_positions_are_those_of_plain_loops(attention_dir):
    shares = []
    for seed in range(4):
        attention, x = attention_with_sinks(attention_dir, seed)
        counted = torch.rand(3, 9) < 0.8
        found = sinks.sink_positions(attention, record_of(x), counted)
        assert torch.equal(found, naive_sinks(attention, x, counted))
        shares.append(float(found.float().mean()))
    assert min(shares) < max(shares)
    assert 0.1 < sum(shares) / 4 < 0.9


@torch.no_grad()
def test_on_the_testbed_sinks_are_where_no_rule_applies():
    """Its layer looks at the topic token where it has nothing to do, and for `dup`, which it
    solves without the source."""
    model, language = load_model("rules"), load_language("rules")
    test = language.sample(32, seed=5)
    record = record_attention(model, test.tokens, [0])[0]
    counted = torch.ones_like(test.tokens, dtype=torch.bool)
    found = sinks.sink_positions(Lorsa.from_attention(model, 0), record, counted)
    idle = test.rule < 0
    dup = test.rule == language.rules.index("dup")
    assert float(found[idle].float().mean()) > 0.9
    assert float(found[~idle & ~dup].float().mean()) < 0.05


def test_the_first_rule_is_the_first_position():
    attention, x = attention_with_sinks("causal", 0)
    found = sinks.sink_positions(attention, record_of(x), torch.ones(3, 9).bool(), "first")
    assert found.nonzero()[:, 1].tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------- patterns


def circuits_and_heads():
    torch.manual_seed(3)
    cfg = LorsaConfig(d_model=6, n_qk_heads=5, d_qk_head=4, n_ov_heads=10, k=3, layer=0)
    heads = Lorsa(cfg.replace(n_qk_heads=3, n_ov_heads=6, k=None))
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for weights in (heads.W_Q, lorsa.W_Q):
            weights *= 5
        for name in ("W_Q", "W_K"):  # circuit 3 is head 1, circuit 0 nearly head 2
            getattr(lorsa, name)[3] = getattr(heads, name)[1]
            getattr(lorsa, name)[0] = getattr(heads, name)[2] * 1.05
    return lorsa, heads, torch.randn(4, 7, 6)


@functools.cache
def naive_overlaps():
    """Overlaps [row, query, circuit, head] and energies [row, query, circuit], by loops."""
    lorsa, heads, x = circuits_and_heads()
    with torch.no_grad():
        a, b = lorsa.pattern(x, range(5)).double(), heads.pattern(x, range(3)).double()
        code = lorsa.encode(x)
    overlap = torch.zeros(4, 7, 5, 3, dtype=torch.float64)
    energy = torch.zeros(4, 7, 5, dtype=torch.float64)
    for row in range(4):
        for q in range(7):
            for c in range(5):
                for h in range(3):
                    distance = 0.5 * float((a[row, c, q] - b[row, h, q]).abs().sum())
                    overlap[row, q, c, h] = 1 - distance
            for value, head in zip(code.values[row, q], code.indices[row, q], strict=True):
                energy[row, q, int(head) // 2] += float(value * lorsa.W_O[head].norm()) ** 2
    return overlap, energy


@pytest.mark.parametrize("block", [1, 60, 2**22])
@torch.no_grad()
def test_circuits_are_matched_with_the_heads_they_look_like(block, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", block)
    lorsa, heads, x = circuits_and_heads()
    overlap, energy = naive_overlaps()
    found = patterns.circuit_energy(lorsa, lorsa.encode(x))
    torch.testing.assert_close(found, energy, rtol=1e-5, atol=1e-9)
    match = patterns.PatternMatch(lorsa, heads)
    match.observe(record_of(x[:1]), energy[:1])
    match.observe(record_of(x[1:]), energy[1:])
    weighted = (overlap * energy[..., None]).sum((0, 1))
    assert match.heads == tuple(weighted.argmax(-1).tolist())
    assert (match.heads[0], match.heads[3]) == (2, 1)
    chance = float(weighted.mean(-1).sum() / energy.sum())
    assert match.chance == pytest.approx(chance, rel=1e-5)
    best = overlap[:, :, range(5), match.heads]
    expected = (best * energy).sum(-1)
    torch.testing.assert_close(match.overlap(record_of(x), energy), expected, rtol=1e-5, atol=1e-6)
    assert float(expected.sum() / energy.sum()) > chance + 0.1


@torch.no_grad()
def test_pattern_blocks_are_patterns():
    lorsa, _, x = circuits_and_heads()
    blocks = [[4], [0, 2], [0]]
    for block, pattern in zip(blocks, lorsa.pattern_blocks(x, blocks), strict=True):
        assert torch.equal(pattern, lorsa.pattern(x, block))


# -------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("block", [1, 2**23])
def test_logits_are_compared_token_by_token(block, monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK_ELEMENTS", block)
    clean, other = torch.randn(6, 11), 3 * torch.randn(6, 11)
    clean[0, 3] = other[1, 4] = -torch.inf  # a token that never comes
    other[0, 3] = -torch.inf
    targets = torch.tensor([0, 5, 10, 2, 2, 7])
    found = predictions.compare(clean, other, targets)
    for i in range(6):
        p, q = clean[i].double().softmax(-1), other[i].double().softmax(-1)
        assert float(found.ce[i]) == pytest.approx(-math.log(q[targets[i]]))
        pairs = [(float(a), float(b)) for a, b in zip(p, q, strict=True) if a > 0]
        terms = [a * math.log(a / b) if b else math.inf for a, b in pairs]
        assert float(found.kl[i]) == pytest.approx(sum(terms))
        assert float(found.agrees[i]) == float(clean[i].argmax() == other[i].argmax())
    nothing = predictions.compare(clean[:0], other[:0], targets[:0])
    assert [len(part) for part in nothing] == [0, 0, 0]


# --------------------------------------------------------------------------------- histograms


def test_heads_are_counted_by_density():
    density = torch.tensor([0.0, 0.0, 1e-7, 2e-5, 0.05, 0.1, 0.99, 1.0]).double()
    found = density_histogram(density)
    assert sum(found.values()) == 8
    assert {name: n for name, n in found.items() if n} == {
        "dead": 2, "< 1e-05": 1, "1e-05": 1, "0.03": 1, "0.1": 1, "0.3": 2,
    }  # fmt: skip
    assert len(found) == len(HISTOGRAM_EDGES) + 1
    assert density_histogram(torch.zeros(3))["dead"] == 3
