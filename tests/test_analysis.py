"""Scores of heads worked out on paper, and relations against loops."""

import functools

import jaxtyping
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_selection, naive_z

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.analysis.relations import (
    RELATIONS,
    current_token,
    duplicate_token,
    first_token,
    induction,
    previous_token,
)
from lorsa_lens.analysis.sources import SourceScores, activity_f1, head_name, source_scores
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import AttentionRecord, record_attention


def hand_made(n_ov_heads=1, **changes):
    """A Lorsa of zeros: one circuit of uniform attention; head i reads and writes dimension i."""
    values = {"d_model": 2, "n_qk_heads": 1, "d_qk_head": 2, "n_ov_heads": n_ov_heads}
    lorsa = Lorsa(LorsaConfig(**{**values, "dtype": "float64", **changes}))
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        for head in range(n_ov_heads):
            lorsa.W_V[head, head % 2] = 1.0
            lorsa.W_O[head, head % 2] = 1.0
    return lorsa


def record_of(*sequences):
    """Records of sequences of x, each a list of the two dimensions at every token."""
    x = torch.tensor(sequences, dtype=torch.float64)
    return AttentionRecord(x, x, None, torch.arange(x.shape[1])[None], None)


def numbers(scores, head=0):
    return {name: float(value[head]) for name, value in vars(scores).items()}


# ------------------------------------------------------------------------------- source scores


def test_scores_of_a_uniform_head_on_paper():
    lorsa = hand_made()
    with torch.no_grad():
        lorsa.W_O[0] = torch.tensor([0.0, 2.0])  # of norm 2: the energy is 4 z^2
    record = record_of([[1, 9], [-1, 9], [5, 9], [3, 9]])
    sources = {"previous": torch.tensor([[-1, 0, 1, 2]])}
    # z = 1, 0, 5/3, 2 and energy = 4, 0, 100/9, 16, of which 244/9 at queries with a source.
    # Shares of |v|: 1/2 (at energy 0), 1/7 and 5/10.
    assert numbers(source_scores(lorsa, record, sources)["previous"]) == pytest.approx(
        {
            "share": (100 / 9 / 7 + 16 / 2) / (244 / 9),
            "energy": 244 / 280,
            "strength": 244 / 27,
            "n_queries": 2,
        }
    )


def test_a_head_of_the_previous_token_by_rotary_positions():
    """Scores are 50 cos(distance - 1), so all attention is on the token before."""
    lorsa = hand_made(
        2, positional_embedding_type="rotary", rotary_frequencies=(1.0,), attn_scale=1.0
    )
    angle = torch.tensor(1.0)
    with torch.no_grad():
        lorsa.b_K[0] = torch.tensor([1.0, 0.0])
        lorsa.b_Q[0] = 50 * torch.stack([angle.cos(), -angle.sin()])
    record = record_of([[1, 0], [0, 3], [0, -2], [1, 0], [0, 0]])
    tokens = torch.zeros(1, 5, dtype=torch.long)
    sources = {"previous": previous_token(tokens), "current": current_token(tokens)}
    scores = source_scores(lorsa, record, sources)
    # z of head 0: 1 (the first token sees but itself), 1, 0, 0, 1; of head 1: 0, 0, 3, -2, 0.
    # Where these are 0, exp(-23) of another token's value remains, so both stay everywhere.
    previous = [numbers(scores["previous"], head) for head in (0, 1)]
    assert previous[0] == pytest.approx(
        {"share": 1.0, "energy": 2 / 3, "strength": 2 / 4, "n_queries": 4}, abs=1e-6
    )
    assert previous[1] == pytest.approx(
        {"share": 1.0, "energy": 1.0, "strength": 13 / 4, "n_queries": 4}, abs=1e-6
    )
    current = [numbers(scores["current"], head) for head in (0, 1)]
    assert current[0]["share"] == pytest.approx(0.0, abs=1e-6)
    assert current[1]["share"] == pytest.approx(0.0, abs=1e-6)
    assert scores["previous"].heads(min_queries=4) == [1, 0]
    assert scores["previous"].heads() == []  # ten queries are wanted
    assert scores["current"].heads(min_queries=0) == []


def test_a_head_that_finds_its_source_by_content():
    """The query 'second dimension' looks for the key 'first dimension is positive'."""
    lorsa = hand_made(attn_scale=1.0)
    with torch.no_grad():
        lorsa.W_Q[0, 1, 0] = 50.0
        lorsa.W_K[0, 0, 0] = 1.0
    record = record_of([[0, 0], [2, 0], [0, 0], [0, 1]], [[1, 0], [0, 0], [0, 0], [0, 1]])
    right = torch.tensor([[-1, -1, -1, 1], [-1, -1, -1, 0]])
    wrong = torch.tensor([[-1, -1, -1, 0], [-1, -1, -1, 1]])
    half = torch.tensor([[-1, -1, -1, 1], [-1, -1, -1, 1]])
    scores = source_scores(lorsa, record, {"right": right, "wrong": wrong, "half": half})
    # At the queries z is 2 and 1: by energy, 4 : 1.
    assert float(scores["right"].share) == pytest.approx(1.0)
    assert float(scores["wrong"].share) == pytest.approx(0.0)
    assert float(scores["half"].share) == pytest.approx(4 / 5)
    # Elsewhere attention is uniform: z = 0, 1, 2/3 and 1, 1/2, 1/3
    rest = 1 + 4 / 9 + 1 + 1 / 4 + 1 / 9
    for score in scores.values():
        assert float(score.energy) == pytest.approx(5 / (5 + rest))
        assert float(score.strength) == pytest.approx(5 / 2)
        assert score.n_queries.tolist() == [2]


def test_queries_at_which_a_head_does_not_stay_do_not_count():
    """Each token sees itself; of two heads the one that writes more stays."""
    lorsa = hand_made(2, k=1, window_size=1)
    record = record_of([[3, 1], [1, 2], [4, -5], [6, 1]])
    itself = {"itself": torch.tensor([[-1, 1, 2, 3]])}
    scores = source_scores(lorsa, record, itself)["itself"]
    assert scores.n_queries.tolist() == [1, 2]
    assert scores.share.tolist() == pytest.approx([1.0, 1.0])
    assert scores.energy.tolist() == pytest.approx([36 / (9 + 36), 1.0])
    assert scores.strength.tolist() == pytest.approx([36 / 3, (4 + 25) / 3])


def test_dead_heads_and_relations_without_queries_score_zero():
    lorsa = hand_made(4, k=1)
    with torch.no_grad():
        lorsa.W_O[2:] *= 0.1  # never the one that writes most
    record = record_of([[1, 2], [3, 1]])
    sources = {"some": torch.tensor([[0, 1]]), "none": torch.tensor([[-1, -1]])}
    scores = source_scores(lorsa, record, sources)
    for name in ("share", "energy", "strength", "n_queries"):
        assert getattr(scores["some"], name)[2:].tolist() == [0, 0]
        assert getattr(scores["none"], name).tolist() == [0, 0, 0, 0]
    assert scores["none"].heads(min_queries=0) == []


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("act_fn", ["topk", "relu"])
def test_scores_of_a_random_lorsa_equal_loops(act_fn, batch_size):
    cfg = LorsaConfig(
        d_model=5, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, dtype="float64", act_fn=act_fn,
        k=2 if act_fn == "topk" else None, positional_embedding_type="rotary",
        rotary_dtype="float64",
    )  # fmt: skip
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        lorsa.b_V.normal_()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    record = AttentionRecord(x, x, None, torch.arange(7)[None], None)
    sources = torch.randint(-1, 7, (3, 7))
    sources = torch.where(sources > torch.arange(7), -1, sources)
    parameters = dict(lorsa.named_parameters())
    with torch.no_grad():
        z = naive_selection(naive_z(parameters, cfg, x), parameters, cfg)
        pattern = lorsa.run_with_cache(x)[1]["hook_pattern"]
        values = x @ lorsa.W_V.T + lorsa.b_V
    (scores,) = source_scores(lorsa, record, {"s": sources}, batch_size=batch_size).values()
    assert sum(numbers(scores, head)["energy"] > 0 for head in range(6)) >= 4
    for head in range(6):
        total = on_queries = on_source = n_active = n_queries = 0.0
        for b in range(3):
            for q in range(7):
                energy = float(z[b, q, head] ** 2 * lorsa.W_O[head].detach().norm() ** 2)
                total += energy
                source = int(sources[b, q])
                if source < 0:
                    continue
                n_queries += 1
                n_active += energy > 0
                on_queries += energy
                z_pattern = pattern[b, head // 3, q] * values[b, :, head]
                on_source += energy * float(z_pattern[source].abs() / z_pattern.abs().sum())
        assert numbers(scores, head) == pytest.approx(
            {
                "share": on_source / on_queries if on_queries else 0.0,
                "energy": on_queries / total if total else 0.0,
                "strength": on_queries / n_queries,
                "n_queries": n_active,
            },
            rel=1e-5,
        )


def test_a_lorsa_of_the_normalized_stream_is_given_that():
    model = zoo.by_name("bridge-gpt2" if zoo.lacks("learned") else "learned").build(torch.float32)
    tokens = zoo.tokens(4, 12)
    record = record_attention(model, tokens, [1])[1]
    lorsa = Lorsa.from_attention(model, 1)
    sources = {name: find(tokens) for name, find in RELATIONS.items()}
    expected = source_scores(lorsa, record, sources)
    gain, bias = host_of(model).input_norm(1)
    with torch.no_grad():
        for weight, offset in ((lorsa.W_Q, lorsa.b_Q), (lorsa.W_K, lorsa.b_K)):
            offset += torch.einsum("m,qmd->qd", bias, weight)
            weight *= gain[None, :, None]
        lorsa.b_V += lorsa.W_V @ bias
        lorsa.W_V *= gain
    lorsa.cfg = lorsa.cfg.replace(input_site="ln1_normalized", fold_ln=None)
    for name, scores in source_scores(lorsa, record, sources).items():
        torch.testing.assert_close(scores.share, expected[name].share, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scores.energy, expected[name].energy, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- naming heads

SCORES = SourceScores(
    share=torch.tensor([0.9, 0.6, 0.4, 0.8, 0.7]),
    energy=torch.tensor([0.5, 0.9, 0.9, 0.2, 0.9]),
    strength=torch.tensor([1.0, 4.0, 9.0, 9.0, 3.0]),
    n_queries=torch.tensor([10, 30, 30, 30, 9]),
)


def test_heads_are_named_above_three_thresholds_strongest_first():
    assert SCORES.heads() == [1, 0]  # 2 lacks share, 3 energy, 4 queries
    assert SCORES.heads(min_queries=9) == [1, 4, 0]
    assert SCORES.heads(min_share=0.65) == [0]
    assert SCORES.heads(min_share=0.4) == [2, 1, 0]
    assert SCORES.heads(min_energy=0.2) == [3, 1, 0]
    assert SCORES.heads(min_share=0.95) == []


def test_the_share_of_several_heads_is_their_mean_by_energy():
    assert SCORES.mean_share([0]) == pytest.approx(0.9)
    assert SCORES.mean_share([1, 4, 0]) == pytest.approx((0.6 * 4 + 0.7 * 3 + 0.9) / 8)


def test_names_of_heads():
    assert head_name(1, 42) == "L1.42"
    assert head_name(0, 0) == "L0.0"
    assert head_name(None, 7) == "7"


# ------------------------------------------------------------------------------- activity


@pytest.mark.parametrize("batch_size", [1, 16])
def test_f1_of_activity_on_paper(batch_size):
    """Head 0 stays where the first dimension is larger in size, head 1 elsewhere."""
    lorsa = hand_made(2, k=1, window_size=1)
    record = record_of(
        [[3, 1], [1, 2], [4, -5], [6, 1]],
        [[1, 9], [-8, 1], [7, 1], [1, 3]],
    )
    queries = torch.tensor([[True, True, False, False], [False, True, False, False]])

    def f1(heads):
        return activity_f1(lorsa, record, heads, queries, batch_size=batch_size)

    assert f1([0]) == pytest.approx(2 * 2 / (4 + 3))  # stays at 4, of which 2 right; there are 3
    assert f1([1]) == pytest.approx(2 * 1 / (4 + 3))
    assert f1([0, 1]) == pytest.approx(2 * 3 / (8 + 3))
    assert f1([]) == 0.0
    nothing = torch.zeros_like(queries)
    assert activity_f1(lorsa, record, [], nothing) == 0.0


def test_a_perfect_detector_has_f1_one():
    lorsa = hand_made(2, k=1, window_size=1)
    record = record_of([[3, 1], [1, 2], [4, -5], [6, 1]])
    queries = torch.tensor([[True, False, False, True]])
    assert activity_f1(lorsa, record, [0], queries) == 1.0
    assert activity_f1(lorsa, record, [1], ~queries) == 1.0


def test_sources_and_queries_of_other_sequences_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    lorsa, record = hand_made(), record_of([[1, 2], [3, 4], [5, 6]])
    with pytest.raises(ValueError, match=r"sources\['x'\] has shape \[1, 2\].*\[1, 3\]"):
        source_scores(lorsa, record, {"x": torch.zeros(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"queries has shape \[2, 3\]"):
        activity_f1(lorsa, record, [0], torch.ones(2, 3, dtype=torch.bool))


# ------------------------------------------------------------------------------- relations


def brute_force(name, tokens, q):
    """The source of position q of a list of tokens."""
    earlier = [k for k in range(q) if tokens[k] == tokens[q]]
    if name == "previous token":
        return q - 1 if q >= 1 else -1
    if name == "current token":
        return q if q >= 1 else -1
    if name == "first token":
        return 0 if q >= 2 else -1
    if name == "duplicate token":
        return earlier[-1] if earlier else -1
    assert name == "induction"
    return earlier[-1] + 1 if earlier and earlier[-1] + 1 < q else -1


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1)
    )
)
def test_relations_equal_loops(sequences):
    tokens = torch.tensor(sequences)
    for name, find in RELATIONS.items():
        expected = [[brute_force(name, row, q) for q in range(len(row))] for row in sequences]
        assert find(tokens).tolist() == expected, name


def test_relations_on_paper():
    tokens = torch.tensor([[5, 7, 5, 5, 7, 9]])
    assert previous_token(tokens).tolist() == [[-1, 0, 1, 2, 3, 4]]
    assert current_token(tokens).tolist() == [[-1, 1, 2, 3, 4, 5]]
    assert first_token(tokens).tolist() == [[-1, -1, 0, 0, 0, 0]]
    assert duplicate_token(tokens).tolist() == [[-1, -1, 0, 2, 1, -1]]
    assert induction(tokens).tolist() == [[-1, -1, 1, -1, 2, -1]]
    assert list(RELATIONS) == [
        "previous token", "current token", "first token", "duplicate token", "induction",
    ]  # fmt: skip


@functools.cache
def cyclic():
    from lorsa_lens.testbed import load_language

    language = load_language("induction")
    return language, language.sample(16, seed=0)


def test_induction_is_the_rule_of_the_testbed():
    """Two implementations written apart: the language's own labels and the relation."""
    _, labels = cyclic()
    assert (labels.source >= 0).sum() > 100
    assert torch.equal(induction(labels.tokens), labels.source)
