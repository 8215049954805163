"""The three rules: against brute force, autograd, and at their edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens.singular import (
    attention_threshold,
    relative_attention,
    rolls_tovee,
    select_cumulative,
    select_greedy,
    select_relative,
)
from lorsa_lens.singular.selection import Softmax

numbers = st.lists(st.integers(-50, 50).map(lambda n: n / 8), min_size=1, max_size=8)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


class Table:
    """Terms given as a table [term, key]."""

    def __init__(self, rows):
        self.rows = rows

    def weighted(self, weights):
        return self.rows @ weights

    def row(self, index):
        return self.rows[index]


def softmax(n_keys, source=0, cap=None, bias=None):
    bias = torch.zeros(n_keys, dtype=torch.float64) if bias is None else bias
    return Softmax(source=source, bias=bias, cap=cap)


# -------------------------------------------------------------------------------- cumulative


@settings(deadline=None)
@given(values=numbers)
def test_cumulative_takes_the_smallest_prefix_that_exceeds_the_whole(values):
    terms = vector(*values)
    found = select_cumulative(terms)
    ordered = sorted(values, reverse=True)
    total = sum(values)  # eighths: sums are exact
    sizes = [n for n in range(1, len(values) + 1) if sum(ordered[:n]) > total]
    if total <= 0 or not sizes:
        assert found == []
    else:
        assert len(found) == sizes[0]
        assert [values[i] for i in found] == ordered[: sizes[0]]


def test_cumulative_by_hand():
    assert select_cumulative(vector(1.0, 5.0, -2.0, 3.0)) == [1, 3]
    assert select_cumulative(vector(1.0, 5.0, -2.0, 3.0), share=0.5) == [1]


@pytest.mark.parametrize(
    "terms", [(1.0, 2.0), (-1.0, -2.0), (1.0, -3.0), (0.0, 0.0), (4.0,)], ids=str
)
def test_cumulative_has_no_answer_where_nothing_exceeds_the_whole(terms):
    assert select_cumulative(vector(*terms)) == []


# ---------------------------------------------------------------------------------- relative


def test_relative_by_hand():
    assert select_relative(vector(1.0, 5.0, -2.0, 3.0)) == [1, 3]  # 5 + 3 >= 7
    assert select_relative(vector(4.0, 5.0)) == [1, 0]
    assert select_relative(vector(1.0, -5.0)) == []
    assert select_relative(vector(0.0)) == []
    # 5 decimals of the fraction: the last term does not matter
    assert select_relative(vector(3.0, 7.0, 1e-6)) == [1, 0]
    assert select_relative(vector(3.0, 7.0, 1e-4)) == [1, 0, 2]


def test_relative_attention_by_hand():
    values = vector(1.0, 4.0, 7.0)
    assert relative_attention(values, 1) == 4.0 - (1.0 + 7.0) / 2
    assert relative_attention(vector(3.0), 0) == 3.0
    rows = torch.stack((values, 2 * values))
    torch.testing.assert_close(relative_attention(rows, 0), vector(-4.5, -9.0))


# ------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_integrated_gradient_is_that_of_autograd(cap):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    bias = vector(0.0, -0.3, -torch.inf, 0.2)
    alphas = torch.linspace(0, 1, 65, dtype=torch.float64)
    gradients = []
    for alpha in alphas:
        coefficients = torch.full((5,), alpha.item(), dtype=torch.float64, requires_grad=True)
        raw = coefficients @ rows
        scores = raw if cap is None else cap * torch.tanh(raw / cap)
        weight = torch.softmax(scores + bias, dim=-1)[1]
        gradients.append(torch.autograd.grad(weight, coefficients)[0])
    expected = torch.trapezoid(torch.stack(gradients), alphas, dim=0)
    found = rows @ softmax(4, 1, cap, bias).gradient(rows.sum(0))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_integrated_gradients_sum_to_the_change_of_the_weight(cap):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    head = softmax(5, 2, cap)
    change = head.weight(rows.sum(0)) - head.weight(torch.zeros(5, dtype=torch.float64))
    total = (rows @ head.gradient(rows.sum(0))).sum()
    assert total.item() == pytest.approx(change, abs=1e-3)


def test_greedy_removes_the_strongest_until_the_weight_is_low():
    rows = vector(3.0, 0.1, 2.0)[:, None] * vector(1.0, 0.0, 0.0, 0.0)
    head, raw = softmax(4), rows.sum(0)
    removal = select_greedy(Table(rows), raw, head, threshold=0.5)
    assert removal.indices == (0, 2)
    weights = [float(torch.softmax(vector(s, 0, 0, 0), 0)[0]) for s in (5.1, 2.1, 0.1)]
    assert removal.before == pytest.approx(weights[0])
    assert removal.after == pytest.approx(weights[2])
    assert removal.drops == pytest.approx((weights[0] - weights[1], weights[1] - weights[2]))
    one = select_greedy(Table(rows), raw, head, threshold=0.9)
    assert one.indices == (0,)


def test_greedy_starts_from_the_weight_that_is_given():
    rows = vector(3.0, 0.5)[:, None] * vector(1.0, 0.0)
    removal = select_greedy(Table(rows), rows.sum(0), softmax(2), threshold=0.7, weight=0.8)
    assert removal.before == 0.8
    assert sum(removal.drops) == pytest.approx(0.8 - removal.after)


@pytest.mark.parametrize(
    ("rows", "threshold"),
    [
        ([[1.0, 0.0]], 0.99),  # under the threshold already
        ([[0.0, 1.0]], 0.1),  # all terms say look away, so removing them helps attention
        ([[0.0, 0.0]], 0.4),  # nothing to remove
        ([[2.0]], 0.5),  # a single key: its weight is 1 whatever is removed
    ],
)
def test_greedy_has_no_answer(rows, threshold):
    rows = torch.tensor(rows, dtype=torch.float64)
    removal = select_greedy(Table(rows), rows.sum(0), softmax(rows.shape[1]), threshold=threshold)
    assert removal.indices == removal.drops == ()
    assert removal.before == removal.after


def test_thresholds():
    assert attention_threshold(1) == attention_threshold(2) == 1.0
    assert attention_threshold(10) == 0.25


def test_rolls_tovee():
    assert rolls_tovee(vector(2.0, -2.0, 2.0)) == pytest.approx(1.0)
    assert rolls_tovee(vector(0.0, 3.0, 0.0, 0.0)) == pytest.approx(1 / 4)
    assert rolls_tovee(vector(0.0, 0.0)) == 0.0
