"""How few vectors a score needs, always beside the null: the same in randomly rotated bases.

That few singular vectors suffice says nothing by itself: of a random model it is true as well. What
counts is the ratio to the rotated basis (arXiv 2602.13524).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.singular.components import Firing
from lorsa_lens.singular.greedy import Greedy
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.selection import (
    attention_threshold,
    relative_attention,
    select_cumulative,
    select_relative,
)
from lorsa_lens.singular.stream import Stream

STATISTICS = ("cumulative", "relative", "rolls_tovee", "greedy_dest", "greedy_src")
"""Set sizes by the three rules, and the Rolls-Tovee measure of relative attention."""


@dataclass(frozen=True)
class Sparsity:
    """One statistic, mean over firings, and its null."""

    statistic: str
    singular: float
    rotated: float
    """Mean over rotations, too."""
    n_firings: int
    """Firings that have the statistic in the singular basis."""

    @property
    def ratio(self) -> float:
        """Singular over rotated: below 1 where singular vectors are special."""
        return self.singular / self.rotated


def rolls_tovee(values: Float[Tensor, " k"]) -> float:
    """Sparseness `(mean |v|)^2 / mean(v^2)`: 1 if all are alike, 1/k if one is all (0 of zeros)."""
    square = values.square().mean().item()
    return values.abs().mean().item() ** 2 / square if square > 0 else 0.0


def firings_of(stream: Stream, *, first_layer: int = 1) -> list[Firing]:
    """All attention that the greedy method would trace, from a layer on."""
    firings = []
    for layer in range(first_layer, len(stream.layers)):
        pattern = stream.layers[layer].pattern
        for head, dest, src in (pattern > 0).nonzero().tolist():
            visible = stream.reading(layer, head).visible[dest]
            weight = pattern[head, dest, src].item()
            if dest and weight >= attention_threshold(int(visible.sum())):
                firings.append(Firing(layer, head, dest, src))
    return firings


def sparsity(
    streams: Stream | Iterable[Stream],
    firings: Sequence[Sequence[Firing]] | None = None,
    *,
    greedy: bool = True,
    n_rotations: int = 3,
    seed: int = 0,
) -> list[Sparsity]:
    """Sparsity statistics of firings, in the basis of singular vectors and in rotated ones.

    Args:
        streams: one or several prompts.
        firings: of each prompt. None: all from layer 1 on that the greedy method would trace.
        greedy: with the set sizes of the greedy rule, which cost the most.
        n_rotations: random rotations of each head's basis.
        seed: of the rotations.

    Returns:
        One row for each statistic that at least one firing has in both bases.

    Raises:
        ValueError: if `n_rotations` is not positive.
    """
    if n_rotations < 1:
        raise ValueError(f"n_rotations = {n_rotations} must be positive: a count needs its null")
    prompts = [streams] if isinstance(streams, Stream) else list(streams)
    given = [firings_of(stream) for stream in prompts] if firings is None else firings
    singular: dict[str, list[float]] = {name: [] for name in STATISTICS}
    rotated: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for stream, own in zip(prompts, given, strict=True):
        bases: dict[tuple[int, int], list[QKReading]] = {}
        for firing in own:
            at = (firing.layer, firing.head)
            if at not in bases:
                bases[at] = _rotations(stream, firing, n_rotations, seed)
            _add(singular, stream, stream.reading(*at), firing, greedy)
            for reading in bases[at]:
                _add(rotated, stream, reading, firing, greedy)
    return [
        Sparsity(name, _mean(singular[name]), _mean(rotated[name]), len(singular[name]))
        for name in STATISTICS
        if singular[name] and rotated[name]
    ]


def _rotations(stream: Stream, firing: Firing, n: int, seed: int) -> list[QKReading]:
    """The head of a firing in several rotated bases, other ones for every head."""
    head = stream.reading(firing.layer, firing.head).head
    first = (seed * 1009 + firing.layer) * 1009 + firing.head
    seeds = (first * n + number for number in range(n))
    return [stream.read(replace(head, kind="rotated", seed=number)) for number in seeds]


def _add(
    values: dict[str, list[float]],
    stream: Stream,
    reading: QKReading,
    firing: Firing,
    greedy: bool,
) -> None:
    """Every statistic of one firing; a rule that selects nothing adds nothing."""
    dest, src = firing.dest, firing.src
    seen = reading.visible[dest].nonzero()[:, 0]
    terms = reading.a[dest] * reading.b[seen]
    relative = relative_attention(terms.mT, int((seen == src).nonzero()))
    sizes = {
        "cumulative": len(select_cumulative(reading.terms(dest, src))),
        "relative": len(select_relative(relative)),
    }
    if greedy:
        method = Greedy()
        for side in ("dest", "src"):
            explanation = method.explain_side(stream, reading, dest, src, side)
            sizes[f"greedy_{side}"] = len(explanation.removal.indices)
    for name, size in sizes.items():
        if size:
            values[name].append(float(size))
    values["rolls_tovee"].append(rolls_tovee(relative))


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
