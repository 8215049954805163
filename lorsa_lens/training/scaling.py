"""Training sees inputs and outputs of a standard size; the saved Lorsa works on raw ones.

A Lorsa is trained on `x * scales.x` to return `out * scales.out`, so that one learning rate suits
every layer of every model. The scales are numbers, so they fold into the weights exactly.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.parallel import Layout


@dataclass(frozen=True)
class Scales:
    """What inputs and outputs are multiplied by in training."""

    x: float
    out: float

    def scaled(self, record: AttentionRecord) -> AttentionRecord:
        """A record as the Lorsa in training sees it."""
        qk_input = None if record.qk_input is None else record.qk_input * self.x
        return record._replace(x=record.x * self.x, out=record.out * self.out, qk_input=qk_input)


def estimate_scales(record: AttentionRecord, counted: Bool[Tensor, "batch pos"]) -> Scales:
    """Scales under which inputs have mean square 1 per dimension, outputs variance 1 in all.

    So the squared error of a prediction, summed over d_model and averaged over tokens, is the
    fraction of variance unexplained.

    Args:
        record: what the layer received and returned.
        counted: tokens that count.
    """
    x, out = record.x[counted].double(), record.out[counted].double()
    variance = (out - out.mean(0)).square().sum(-1).mean()
    mean_square = x.square().mean()
    return Scales(x=float(_inverse_root(mean_square)), out=float(_inverse_root(variance)))


@torch.no_grad()
def fit_gain(
    lorsa: Lorsa,
    record: AttentionRecord,
    counted: Bool[Tensor, "batch pos"],
    layout: Layout | None = None,
) -> float:
    """Multiply all activations by the one gain that fits the layer best; returns it.

    A fresh Lorsa of a few selected heads writes much less, or more, than the layer. The gain is
    the least-squares one, `<target, written> / <written, written>`, where both are without `b_O`.

    Args:
        lorsa: what to change, in place: its `W_V` and `b_V`.
        record: what the layer received and returned, on the Lorsa's scale.
        counted: tokens that count.
        layout: how the Lorsa lies over processes; where each has a share of the batch, they take
            the gain of the first one's. None: there is one process.
    """
    written = (lorsa(record.x, **record.context) - lorsa.b_O)[counted].double()
    target = (record.out - lorsa.b_O)[counted].double()
    best = (target * written).sum() / written.square().sum().clamp(min=1e-300)
    if layout is not None:
        layout.settle(lorsa)
        layout.batch.of_first([best])
    gain = float(best)
    if gain <= 0:  # no use; so do not turn the heads around
        return 1.0
    lorsa.W_V.mul_(gain)
    lorsa.b_V.mul_(gain)
    return gain


def _inverse_root(value: Tensor) -> Tensor:
    return torch.where(value > 0, value.clamp(min=1e-300).rsqrt(), torch.ones_like(value))


@torch.no_grad()
def rescale(lorsa: Lorsa, scales: Scales, *, to_raw: bool) -> None:
    """Fold scales into the weights, in place.

    Args:
        lorsa: what to rescale.
        scales: those of training.
        to_raw: from training to raw inputs and outputs if true, else from raw ones to training.
    """
    x, out = (scales.x, 1 / scales.out) if to_raw else (1 / scales.x, scales.out)
    for weight in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
        weight.mul_(x)
    for weight in (lorsa.W_O, lorsa.b_O):
        weight.mul_(out)
    if lorsa.cfg.act_fn == "jumprelu":  # thresholds are in units of z * ||w_O||
        lorsa.log_threshold.add_(math.log(out))
    if lorsa.cfg.act_fn == "batchtopk":
        lorsa.threshold.mul_(out)
