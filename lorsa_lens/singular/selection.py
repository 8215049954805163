"""Which terms of a score matter: the three published rules.

* `select_cumulative`: terms in descending order until their sum exceeds the whole (SAD,
  arXiv 2410.00340);
* `select_relative`: contributions to relative attention, in descending order until they make up the
  whole (ACC, "Pinpointing Attention-Causal Communication in Language Models");
* `select_greedy`: in the order of their integrated gradients, until without them the attention
  weight is below a threshold (ACC++, arXiv 2602.13483).

Where a rule has no answer it selects nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

N_STEPS = 64
"""Steps of the integral over the scores."""

MAX_REMOVED = 1000
"""Terms that `select_greedy` removes at most; a weight that outlives them explains nothing."""

TAU_SCALE = 2.5
"""Threshold on attention weights, in units of uniform attention."""

RELATIVE_DECIMALS = 5
"""Decimals to which `select_relative` rounds the fraction reached."""


def select_cumulative(terms: Float[Tensor, " k"], *, share: float = 1.0) -> list[int]:
    """The smallest set of largest terms whose sum exceeds `share` of the sum of all.

    Terms of the other sign make the set overshoot before they bring it back; where there are none,
    nothing exceeds the sum, and the set is empty. So it is for a sum that is not positive.

    Returns:
        Indices, largest term first.
    """
    total = terms.sum()
    if not bool(total > 0):
        return []
    order = torch.argsort(terms, descending=True, stable=True)
    above = terms[order].cumsum(0) > share * total
    if not bool(above.any()):
        return []
    return [int(i) for i in order[: int(above.int().argmax()) + 1]]


def select_relative(contributions: Float[Tensor, " k"]) -> list[int]:
    """The smallest set of largest contributions that make up their sum, to 5 decimals.

    Returns:
        Indices, largest first; none for a sum that is not positive.
    """
    total = contributions.sum()
    if not bool(total > 0):
        return []
    order = torch.argsort(contributions, descending=True, stable=True)
    fraction = contributions[order].cumsum(0) / total
    reached = (fraction * 10**RELATIVE_DECIMALS).round() >= 10**RELATIVE_DECIMALS
    n_selected = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(order)
    return [int(i) for i in order[:n_selected]]


def relative_attention(values: Float[Tensor, "*rows key"], source: int) -> Float[Tensor, "*rows"]:
    """The value at one key, less the mean over the other keys (ACC); itself if it is alone."""
    n_others = values.shape[-1] - 1
    if n_others == 0:
        return values[..., source]
    others = values.sum(-1) - values[..., source]
    return values[..., source] - others / n_others


def attention_threshold(n_keys: int) -> float:
    """The weight from which on attention to one of `n_keys` says something: at most 1 (ACC++)."""
    return min(1.0, TAU_SCALE / n_keys)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """From raw scores of one query to the weight of one key."""

    source: int
    bias: Float[Tensor, " key"]
    """Added to scores: ALiBi, minus infinity where hidden."""
    cap: float | None = None

    def weight(self, raw: Float[Tensor, " key"]) -> float:
        """The attention weight of the source."""
        return float(torch.softmax(self._scores(raw), dim=-1)[self.source])

    def gradient(
        self, raw: Float[Tensor, " key"], *, n_steps: int = N_STEPS
    ) -> Float[Tensor, " key"]:
        """The integral of its gradient along `alpha * raw`, alpha from 0 to 1 (trapezoid).

        The integrated gradient of a term `X[key]` of the raw scores is its product with this.
        """
        steps = torch.linspace(0, 1, n_steps + 1, dtype=raw.dtype, device=raw.device)
        path = steps[:, None] * raw
        p = torch.softmax(self._scores(path), dim=-1)
        jacobian = -p[:, self.source, None] * p
        jacobian[:, self.source] += p[:, self.source]
        if self.cap is not None:
            jacobian = jacobian * (1 - torch.tanh(path / self.cap).square())
        weights = torch.full_like(steps, 1 / n_steps)
        weights[[0, -1]] /= 2
        return weights @ jacobian

    def _scores(self, raw: Tensor) -> Tensor:
        scores = raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)
        return scores + self.bias


@runtime_checkable
class Terms(Protocol):
    """Terms of the raw scores of one query, by number, whatever they are."""

    def weighted(self, weights: Float[Tensor, " key"]) -> Float[Tensor, " term"]:
        """Every term, summed over keys with these weights."""

    def row(self, index: int) -> Float[Tensor, " key"]:
        """One term at every key."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What `select_greedy` removed."""

    indices: tuple[int, ...] = ()
    """Terms, in the order of their removal."""
    drops: tuple[float, ...] = ()
    """By how much the weight fell with each; they sum to the whole fall."""
    before: float = 0.0
    after: float = 0.0


def select_greedy(
    terms: Terms,
    raw: Float[Tensor, " key"],
    softmax: Softmax,
    *,
    threshold: float,
    weight: float | None = None,
) -> Removal:
    """Remove terms, largest integrated gradient first, until the weight is below a threshold.

    Args:
        terms: the terms of the raw scores.
        raw: the raw scores.
        softmax: from raw scores to the weight of the source.
        threshold: the weight to get below.
        weight: the weight to start from. None: that of `raw`.

    Returns:
        What was removed: nothing if the weight is below the threshold already, or if it outlives
        all terms or the first 1000.
    """
    before = softmax.weight(raw) if weight is None else weight
    nothing = Removal(before=before, after=before)
    if before < threshold:
        return nothing
    gradients = terms.weighted(softmax.gradient(raw))
    order = gradients.topk(min(MAX_REMOVED, len(gradients))).indices.tolist()
    indices: list[int] = []
    drops: list[float] = []
    left = before
    for index in order:
        raw = raw - terms.row(index)
        now = softmax.weight(raw)
        indices.append(index)
        drops.append(left - now)
        left = now
        if left < threshold:
            return Removal(indices=tuple(indices), drops=tuple(drops), before=before, after=left)
    return nothing


Rule = Callable[[Tensor], Sequence[int]]
"""From terms to the indices of those that are selected."""
