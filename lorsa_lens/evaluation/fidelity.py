"""What is reported of a Lorsa: every metric a ratio of sums over tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.evaluation.documents import DocumentSums, Estimate


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How faithful one Lorsa is, or several together (then `layer` is None).

    `y` is what the layer returns (at the Lorsa's `output_site`), `y'` what the Lorsa writes, E the
    mean over tokens that count. Metrics are `Estimate`s: numbers with an interval `.low` to
    `.high` over documents. What is None is not defined for several layers together.
    """

    layer: int | None
    """The layer, or None for all layers spliced at once."""

    n_documents: int
    """Documents with tokens that count: the units of the intervals."""

    n_predicted: int
    """Predictions that count: tokens with a next one."""

    ce_clean: float
    """Cross entropy of the model as it is, in nats per prediction."""

    ce_spliced: float
    """Cross entropy with the Lorsa in place."""

    ce_zero: float
    """Cross entropy with what the layer adds to the residual stream set to zero."""

    ce_mean: float
    """Cross entropy with it set to its mean over the tokens that count."""

    ce_recovered: float
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean)."""

    ce_recovered_mean: float
    """(ce_mean - ce_spliced) / (ce_mean - ce_clean)."""

    kl: float
    """E KL(clean || spliced) of the predicted distributions, in nats."""

    kl_zero: float
    """E KL(clean || zeroed)."""

    kl_mean: float
    """E KL(clean || mean-ablated)."""

    kl_recovered: float
    """(kl_zero - kl) / kl_zero."""

    agreement: float
    """Share of predictions with the same most likely token, clean and spliced."""

    n_tokens: int | None = None
    """Tokens that count in what follows."""

    fvu: float | None = None
    """Fraction of variance unexplained, E|y - y'|^2 / E|y - E y|^2."""

    explained_variance: float | None = None
    """1 - fvu."""

    fvu_without_sinks: float | None = None
    """fvu over the tokens that are no sink positions of the layer, E y being theirs."""

    explained_variance_without_sinks: float | None = None
    """1 - fvu_without_sinks."""

    sink_share: float | None = None
    """Share of tokens that are sink positions of the layer."""

    mse: float | None = None
    """E|y - y'|^2, summed over d_model."""

    cosine: float | None = None
    """E cos(y, y')."""

    relative_reconstruction_bias: float | None = None
    """E|y'|^2 / E y.y': below 1 where the Lorsa writes too little."""

    l0: float | None = None
    """Heads that stay, per token."""

    l1: float | None = None
    """Sum of |z| over heads, per token."""

    dead: float | None = None
    """Share of heads that stay at no token."""

    pattern_overlap: float | None = None
    """sum_k min(A[q, k], B[q, k]) between the pattern A of a query-key circuit and that of its
    best matching attention head B, averaged over circuits and queries q by the energy
    sum_i (z^i |w_O^i|)^2 of the circuit's heads: 1 minus the total variation."""

    pattern_overlap_chance: float | None = None
    """The same with a head drawn at random in place of the best match: what patterns have in
    common anyway."""

    density: Float[Tensor, " ov_head"] | None = field(default=None, compare=False, repr=False)
    """By head, the share of tokens at which it stays."""

    matched_heads: tuple[int, ...] | None = field(default=None, repr=False)
    """By query-key circuit, the attention head whose pattern matches best."""

    def metrics(self) -> dict[str, Estimate]:
        """All metrics that are ratios of sums, by name."""
        values = {name: getattr(self, name) for name in METRICS}
        return {name: value for name, value in values.items() if isinstance(value, Estimate)}


class Metric(NamedTuple):
    """A ratio of weighted sums of per-token statistics."""

    numerator: Mapping[str, float]
    denominator: Mapping[str, float]
    sae_lens: str | None = None
    """SAELens's name for it, where it is defined alike."""

    def is_of(self, sums: DocumentSums) -> bool:
        """Whether the sums hold all that it is made of."""
        return {*self.numerator, *self.denominator} <= set(sums.names)


def _mean(name: str, sae_lens: str | None = None, over: str = "predicted") -> Metric:
    return Metric({name: 1.0}, {over: 1.0}, sae_lens)


def _recovered(without: str, spliced: str, clean: str | None, sae_lens: str | None) -> Metric:
    stake = {without: 1.0} if clean is None else {without: 1.0, clean: -1.0}
    return Metric({without: 1.0, spliced: -1.0}, stake, sae_lens)


_MODEL = "model_performance_preservation"
_KL = "model_behavior_preservation"
_QUALITY = "reconstruction_quality"

METRICS = {
    "ce_clean": _mean("ce_clean", f"{_MODEL}/ce_loss_without_sae"),
    "ce_spliced": _mean("ce_spliced", f"{_MODEL}/ce_loss_with_sae"),
    "ce_zero": _mean("ce_zero", f"{_MODEL}/ce_loss_with_ablation"),
    "ce_mean": _mean("ce_mean"),
    "ce_recovered": _recovered("ce_zero", "ce_spliced", "ce_clean", f"{_MODEL}/ce_loss_score"),
    "ce_recovered_mean": _recovered("ce_mean", "ce_spliced", "ce_clean", None),
    "kl": _mean("kl_spliced", f"{_KL}/kl_div_with_sae"),
    "kl_zero": _mean("kl_zero", f"{_KL}/kl_div_with_ablation"),
    "kl_mean": _mean("kl_mean"),
    "kl_recovered": _recovered("kl_zero", "kl_spliced", None, f"{_KL}/kl_div_score"),
    "agreement": _mean("agrees"),
    "fvu": Metric({"error": 1.0}, {"variance": 1.0}),
    "explained_variance": Metric(
        {"variance": 1.0, "error": -1.0}, {"variance": 1.0}, f"{_QUALITY}/explained_variance"
    ),
    "fvu_without_sinks": Metric({"error_elsewhere": 1.0}, {"variance_elsewhere": 1.0}),
    "explained_variance_without_sinks": Metric(
        {"variance_elsewhere": 1.0, "error_elsewhere": -1.0}, {"variance_elsewhere": 1.0}
    ),
    "sink_share": _mean("sink", over="counted"),
    "mse": _mean("error", f"{_QUALITY}/mse", over="counted"),
    "cosine": _mean("cosine", f"{_QUALITY}/cossim", over="counted"),
    "relative_reconstruction_bias": Metric(
        {"energy_out": 1.0}, {"product": 1.0}, "shrinkage/relative_reconstruction_bias"
    ),
    "l0": _mean("l0", "sparsity/l0", over="counted"),
    "l1": _mean("l1", "sparsity/l1", over="counted"),
    "pattern_overlap": Metric({"overlap": 1.0}, {"circuit_energy": 1.0}),
}  # fmt: skip
"""What every metric is made of."""


def estimates(sums: DocumentSums) -> dict[str, Any]:
    """All metrics that can be made of some sums, by name."""
    return {
        name: sums.ratio(metric.numerator, metric.denominator)
        for name, metric in METRICS.items()
        if metric.is_of(sums)
    }


HISTOGRAM_EDGES = tuple(10 ** (exponent / 2) for exponent in range(-10, 1))
"""Densities between which heads are counted, half a decade apart."""


def density_histogram(density: Float[Tensor, " ov_head"]) -> dict[str, int]:
    """How many heads stay how often: dead ones, then by density, in half decades."""
    dead = density == 0
    bins = torch.bucketize(
        density[~dead].double(), torch.tensor(HISTOGRAM_EDGES[:-1], dtype=torch.float64), right=True
    )
    counts = torch.bincount(bins, minlength=len(HISTOGRAM_EDGES)).tolist()
    names = [f"< {HISTOGRAM_EDGES[0]:.1g}", *(f"{low:.1g}" for low in HISTOGRAM_EDGES[:-1])]
    return {"dead": int(dead.sum()), **dict(zip(names, counts, strict=True))}
