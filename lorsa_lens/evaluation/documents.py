"""Sums of per-token statistics by document, and ratios of them with confidence intervals.

Only totals and second moments of the documents' sums are kept, so memory does not grow with the
text.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CONFIDENCE = 0.95
"""Of the intervals."""


class Estimate(float):
    """A number measured on documents, and its confidence interval.

    The interval is not a number where there are fewer than two documents, or none is computed.
    """

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    def __new__(cls, value: float, low: float = math.nan, high: float = math.nan) -> "Estimate":
        """A number and its interval."""
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = low, high
        return estimate


class DocumentSums:
    """Sums of named statistics, document by document.

    A document must be given in one stretch: one that comes back later counts as another.

    Args:
        names: of the statistics.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        n = len(self.names)
        self._totals = torch.zeros(n, dtype=torch.float64)
        self._products = torch.zeros(n, n, dtype=torch.float64)
        self._n_closed = 0
        self._open: dict[int, Tensor] = {}

    def add(
        self, document: Int[Tensor, "batch pos"], values: Mapping[str, Float[Tensor, "batch pos"]]
    ) -> None:
        """Add the statistics of some tokens.

        Args:
            document: which document each token is of; tokens of negative ones are passed over.
            values: for each name, the statistic of each token.
        """
        rows = torch.stack([values[name].double().cpu() for name in self.names], dim=-1)
        there = document.cpu() >= 0
        numbers, inverse = np.unique(document.cpu()[there].numpy(), return_inverse=True)
        sums = torch.zeros(len(numbers), len(self.names), dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(inverse), rows[there])
        given = dict(zip(numbers.tolist(), sums, strict=True))
        for number in self._open.keys() - given.keys():
            self._close(self._open.pop(number))
        for number, row in given.items():
            self._open[number] = self._open[number] + row if number in self._open else row

    def _close(self, row: Float[Tensor, " name"]) -> None:
        """Count a document that no more tokens will come of; not one of which none count."""
        self._totals += row
        self._products += torch.outer(row, row)
        self._n_closed += bool(row.any())

    def finish(self) -> None:
        """Count the documents that the last tokens were of, too."""
        while self._open:
            self._close(self._open.popitem()[1])

    @property
    def n_documents(self) -> int:
        """Documents with tokens that count."""
        return self._n_closed

    def total(self, name: str) -> float:
        """Sum of one statistic over all tokens."""
        return float(self._totals[self.names.index(name)])

    def ratio(self, numerator: Mapping[str, float], denominator: Mapping[str, float]) -> Estimate:
        """A ratio `R = sum_d a_d / sum_d b_d` of sums over documents d, with its interval.

        The interval is `R +- z s`, where z is the normal quantile and `s^2 = n / (n - 1) *
        sum_d (a_d - R b_d)^2 / (sum_d b_d)^2`: the linearised variance of a ratio estimator, which
        the jackknife over documents approaches (Cochran, Sampling Techniques, 3rd ed., 2.11).

        Args:
            numerator: a, as a weighted sum of statistics.
            denominator: b. The ratio is not a number where it sums to 0.
        """
        a, b = self._weights(numerator), self._weights(denominator)
        below = float(b @ self._totals)
        if below == 0:
            return Estimate(math.nan)
        value = float(a @ self._totals) / below
        if self.n_documents < 2:
            return Estimate(value)
        residual = a - value * b
        squares = max(0.0, float(residual @ self._products @ residual))
        deviation = math.sqrt(squares * self.n_documents / (self.n_documents - 1)) / abs(below)
        half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation
        return Estimate(value, value - half, value + half)

    def _weights(self, combination: Mapping[str, float]) -> Float[Tensor, " name"]:
        weights = [combination.get(name, 0.0) for name in self.names]
        return torch.tensor(weights, dtype=torch.float64)
