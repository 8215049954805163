"""Heads that fetch operands by range or last digit: statistics on paper, and planted heads."""

import functools
import math

import numpy as np
import pytest
import torch
import zoo
from rich.console import Console

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.analysis.behaviours import operand_profiles
from lorsa_lens.analysis.behaviours.value_profiles import (
    best_range,
    bin_means,
    explained_by_bins,
    kruskal_wallis,
)
from lorsa_lens.analysis.behaviours.words import find_sums
from lorsa_lens.analysis.report import head_tables
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.cli.heads import _print_operands

needs_hooked = pytest.mark.skipif(
    zoo.lacks("learned"), reason="planted heads stand in a HookedTransformer"
)

FILLERS = [f" word{chr(ord('a') + i)}" for i in range(12)]
NUMBERS = Vocabulary(
    ("<bos>", *FILLERS, *map(str, range(100)), "+", "="), special=frozenset([0]), bos=0
)
DIGITS = Vocabulary(
    ("<bos>", *FILLERS, *map(str, range(10)), "+", "="), special=frozenset([0]), bos=0
)
N_POS = 12


# ---------------------------------------------------------------------------------- statistics


def test_sums_are_found_with_their_values():
    tokens = torch.tensor([[DIGITS.id_of(c) for c in "12+3=4+56="], [0] * 10])
    first, second = find_sums(tokens, DIGITS)
    assert (first.row, first.equals, first.values) == (0, 4, (12, 3))
    assert first.operands == (slice(0, 2), slice(3, 4))
    assert (second.row, second.equals, second.values) == (0, 9, (4, 56))


def naive_best(strength, values):
    """The range of least variance within, by trying each."""
    best = (-1.0, 0, 0)
    total = strength.var() * len(strength)
    for low in range(100):
        for high in range(low, 100):
            inside = (values >= low) & (values <= high)
            if not inside.any() or inside.all():
                continue
            a, b = strength[inside], strength[~inside]
            if a.mean() < b.mean():
                continue
            explained = 1 - (a.var() * len(a) + b.var() * len(b)) / total
            best = max(best, (round(explained, 9), -low, -high))
    return best


def test_the_best_range_equals_a_search():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 60)
    strength = np.stack([rng.random(60) + (values >= 27) * (values <= 43), rng.random(60)], 1)
    found = best_range(torch.tensor(strength), torch.tensor(values))
    for head in range(2):
        explained, _, _ = naive_best(strength[:, head], values)
        assert found.explained[head].item() == pytest.approx(explained, abs=1e-6)
    low, high = found.low[0].item(), found.high[0].item()
    assert low <= min(v for v in values if v >= 27)
    assert high >= max(v for v in values if v <= 43)
    inside = (values >= low) & (values <= high)
    assert (inside == (values >= 27) & (values <= 43)).all()


def test_bins_equal_loops_and_constants_explain_nothing():
    rng = np.random.default_rng(1)
    bins = rng.integers(0, 10, 80)
    bins[bins == 4] = 5  # one bin is empty
    strength = rng.random((80, 3))
    strength[:, 2] = 1.0
    means = bin_means(torch.tensor(strength), torch.tensor(bins))
    explained = explained_by_bins(torch.tensor(strength), torch.tensor(bins))
    assert means[4].isnan().all()
    for head in range(3):
        within = 0.0
        for each in set(bins.tolist()):
            part = strength[bins == each, head]
            assert means[each, head].item() == pytest.approx(part.mean())
            within += part.var() * len(part)
        total = strength[:, head].var() * 80
        expected = 0.0 if head == 2 else 1 - within / total
        assert explained[head].item() == pytest.approx(expected)


def test_the_kruskal_wallis_test_on_paper():
    """Three groups: chi-squared with two degrees of freedom, whose tail is exp(-H / 2)."""
    bins = torch.tensor([0, 0, 0, 4, 4, 4, 9, 9, 9])
    strength = torch.tensor([[1.0, 5], [2, 5], [3, 5], [4, 5], [5, 5], [6, 5], [7, 5], [8, 5],
                             [9, 5]], dtype=torch.float64)  # fmt: skip
    h = 12 / (9 * 10) * 3 * (2**2 + 5**2 + 8**2) - 3 * 10
    assert kruskal_wallis(strength, bins).tolist() == pytest.approx([math.exp(-h / 2), 1.0])
    # Ties share ranks: 1.5 1.5 3 | 5 5 5 | 7 8 9; H is divided by 1 - sum(t^3 - t) / (N^3 - N).
    tied = torch.tensor([[1.0], [1], [2], [3], [3], [3], [7], [8], [9]], dtype=torch.float64)
    h = 12 / (9 * 10) * 3 * (2**2 + 5**2 + 8**2) - 3 * 10
    h /= 1 - ((2**3 - 2) + (3**3 - 3)) / (9**3 - 9)
    assert kruskal_wallis(tied, bins).tolist() == pytest.approx([math.exp(-h / 2)])


# ---------------------------------------------------------------------------------- planted heads


def planted(vocabulary, plan):
    """A model that does nothing, and heads that fetch chosen tokens from a fixed distance.

    Args:
        vocabulary: the strings.
        plan: by head, the distance and the tokens that it reads.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    n, d_model = len(vocabulary), len(vocabulary) + N_POS
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=d_model, n_heads=1, d_head=4, d_vocab=n, n_ctx=N_POS,
            attn_only=True, normalization_type=None, init_weights=False, device="cpu",
        )
    ).eval()  # fmt: skip
    lorsa = Lorsa(
        LorsaConfig(
            d_model=d_model, n_qk_heads=len(plan), d_qk_head=N_POS, n_ov_heads=len(plan),
            attn_scale=1.0, layer=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (*model.parameters(), *lorsa.parameters()):
            parameter.zero_()
        model.embed.W_E[:, :n] = torch.eye(n)
        model.pos_embed.W_pos[:, n:] = torch.eye(N_POS)
        at = torch.arange(N_POS)
        for head, (distance, tokens) in enumerate(plan):
            lorsa.W_Q[head, n:] = 60 * torch.eye(N_POS)
            lorsa.W_K[head, n + at[: N_POS - distance], at[distance:]] = 1.0
            lorsa.W_V[head, tokens] = 1.0
            lorsa.W_O[head, head] = 2.0
    return model, lorsa


PLANS = {
    ("first", "range"): (3, NUMBERS.known(map(str, range(27, 44)))),
    ("second", "range"): (1, NUMBERS.known(map(str, range(60, 81)))),
    ("first", "last digit"): (3, NUMBERS.known(map(str, range(2, 100, 10)))),
    ("second", "last digit"): (1, NUMBERS.known(map(str, range(7, 100, 10)))),
}


@functools.cache
def planted_operands():
    """Four heads of operands, one that reads all first operands alike, and six random ones."""
    plan = [(distance, list(tokens.values())) for distance, tokens in PLANS.values()]
    plan.append((3, list(NUMBERS.known(map(str, range(100))).values())))
    model, lorsa = planted(NUMBERS, [*plan, *[(1, [])] * 6])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (lorsa.W_Q, lorsa.W_K, lorsa.W_V, lorsa.W_O):
            parameter[5:].normal_()
    return model, lorsa


@functools.cache
def planted_table():
    return operand_profiles(*planted_operands(), vocabulary=NUMBERS, n_prompts=1000)


@needs_hooked
def test_planted_heads_score_on_their_own_operand_and_property_only():
    frame = planted_table()
    table = frame.set_index(["head", "operand", "by"])
    assert len(table) == 11 * 4
    for head, own in enumerate(PLANS):
        for key in PLANS:
            score, null = (table.loc[(head, *key), name] for name in ("score", "null"))
            assert score > 0.8 if key == own else score < 0.2, (own, key)
            assert null < 0.1
        assert table.loc[(head, *own), "p_value"] < 1e-6
    for head in range(4, 11):
        for key in PLANS:
            assert table.loc[(head, *key), "score"] < 0.2
    first = table.loc[(0, "first", "range")]
    assert (first["low"], first["high"]) == (27, 43)
    assert first["bin_3"] == pytest.approx(2.0)
    assert first["bin_6"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < first["bin_2"] < 1.5
    assert first["share"] == pytest.approx(1.0, abs=1e-3)
    digit = table.loc[(3, "second", "last digit")]
    assert (digit["low"], digit["high"], digit["bin_7"]) == (7, 7, pytest.approx(2.0))
    # One that reads all numbers alike depends on none.
    assert table.loc[(4, "first", "range"), "explained"] < 0.01
    assert table.loc[(4, "first", "range"), "p_value"] > 0.01


@needs_hooked
def test_the_report_has_the_profiles_and_the_token_pairs_of_named_circuits():
    model, lorsa = planted_operands()
    text = torch.randint(1, len(NUMBERS), (4, N_POS), generator=torch.Generator().manual_seed(0))
    tables = head_tables(model, {0: lorsa}, text, vocabulary=NUMBERS, n_prompts=32, n_circuits=2)
    assert len(tables["operands"]) == 11 * 4
    best = tables["operands"].sort_values("score", ascending=False)["head"].head(4)
    assert set(best) == {0, 1, 2, 3}
    console = Console(record=True, width=120)
    _print_operands(console, tables["operands"], n=4)
    printed = console.export_text()
    assert all(f"L0.{head}" in printed for head in range(4))
    assert "27 to 43" in printed
    assert "L0.4" not in printed
    named = tables["named"]
    circuits = named[named["kind"] == "qk"].groupby("head")["score"].max().nlargest(2)
    assert len(circuits) == 2
    assert set(tables["pairs"]["circuit"]) == set(circuits.index)


@needs_hooked
def test_numbers_may_be_written_in_digits():
    twos = [DIGITS.id_of("2")]
    model, lorsa = planted(DIGITS, [(1, twos), (1, [DIGITS.id_of("wordb")])])
    frame = operand_profiles(model, lorsa, vocabulary=DIGITS, n_pos=N_POS, n_prompts=300)
    table = frame.set_index(["head", "operand", "by"])
    row = table.loc[(0, "second", "last digit")]
    assert row["score"] > 0.8
    assert row["high"] == 2
    assert (frame[frame["head"] == 1]["strength"] < 1e-6).all()
    assert (frame[frame["head"] == 1]["p_value"] == 1.0).all()
    # The model's own head attends evenly, and the second operand is one or two of the tokens.
    assert 0.05 < row["attended"] < 0.4


@needs_hooked
def test_running_text_gives_the_same_table_as_the_prompts_it_consists_of():
    from lorsa_lens.analysis.behaviours.prompts import Prompter

    model, lorsa = planted(NUMBERS, [(3, [NUMBERS.id_of("5")])])
    prompts = Prompter(NUMBERS, N_POS, 3).sums(120)
    expected = operand_profiles(
        model, lorsa, vocabulary=NUMBERS, n_pos=N_POS, n_prompts=120, seed=3
    )
    found = operand_profiles(model, lorsa, prompts, vocabulary=NUMBERS, seed=3, batch_size=7)
    assert found.drop(columns="null").round(9).equals(expected.drop(columns="null").round(9))


def test_what_has_no_sums_is_refused():
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    words = Vocabulary(("<bos>", *FILLERS, "0", "1", "2", "+"), special=frozenset([0]), bos=0)
    with pytest.raises(ValueError, match=r"no tokens for 3 4 5 6 7 8 9 =: sums are written"):
        operand_profiles(model, lorsa, vocabulary=words)
    with pytest.raises(ValueError, match=r"there are 0 sums.*at least 100"):
        operand_profiles(model, lorsa, torch.ones(4, 12, dtype=torch.long), vocabulary=DIGITS)
    with pytest.raises(ValueError, match="give one for each layer"):
        operand_profiles(model, [lorsa, lorsa], vocabulary=DIGITS)
