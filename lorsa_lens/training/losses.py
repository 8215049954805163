"""What training minimizes, and how dead heads get a share in it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.functional.code import decode
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa, LorsaOutput


def squared_error(
    prediction: Float[Tensor, "batch pos d_model"],
    target: Float[Tensor, "batch pos d_model"],
    counted: Bool[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Squared error summed over d_model, averaged over the tokens that count.

    Args:
        prediction: what a Lorsa writes.
        target: what the layer returned.
        counted: tokens that count.
        weights: what the error of each token is multiplied by. None: 1.
    """
    error = (prediction - target).square().sum(-1)
    error = error if weights is None else error * weights
    mean: Tensor = (error * counted).sum() / counted.sum().clamp(min=1)
    return mean


ENERGY_FLOOR = 0.05
"""Added to a token's energy, whose mean is near 1, so that quiet tokens do not count too much."""


def energy_weights(
    target: Float[Tensor, "batch pos d_model"], b_O: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch pos"]:
    """What tokens count for: less where the layer writes much.

    `w = 1 / (e + 0.05)` with `e = |y - b_O|^2` on training scale, where its mean is near 1. The
    error of attention sinks, which write far more than other tokens, does not drown the others'.
    """
    energy = (target - b_O.detach()).square().sum(-1)
    weights: Tensor = 1 / (energy + ENERGY_FLOOR)
    return weights


def l1_penalty(
    lorsa: Lorsa, output: LorsaOutput, counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean over counted tokens of `sum_i |z^i| ||w_O^i||`; the norms get gradient here."""
    norms = torch.linalg.vector_norm(lorsa.W_O, dim=-1)[output.code.indices]
    written = lorsa.over_heads((output.code.values.abs() * norms).sum(-1))
    return (written * counted).sum() / counted.sum()


def l0_penalty(
    lorsa: Lorsa, output: LorsaOutput, counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean number of heads above their thresholds, with JumpReLU's gradient for the thresholds.

    The rectangle kernel of arXiv 2407.14435: the gradient of the step function is
    `-1 / bandwidth` within half a bandwidth of the threshold.
    """
    scores = output.acts_pre.detach() * writing_norms(lorsa.W_O)
    thresholds = lorsa.log_threshold.exp()
    distance = (scores - thresholds) / lorsa.cfg.jumprelu_bandwidth
    near = distance.abs() < 0.5
    above = (distance > 0).to(distance) + near * (distance - distance.detach())
    return (lorsa.over_heads(above.sum(-1)) * counted).sum() / counted.sum()


def auxiliary_loss(
    lorsa: Lorsa,
    output: LorsaOutput,
    target: Float[Tensor, "batch pos d_model"],
    counted: Bool[Tensor, "batch pos"],
    dead: Bool[Tensor, " ov_head"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """How well the most active dead heads predict what the others leave (arXiv 2406.04093, 2.6).

    Args:
        lorsa: whose heads.
        output: its forward pass.
        target: what the layer returned.
        counted: tokens that count.
        dead: which heads are dead.
        aux_k: how many of them stay per token here.
    """
    n_dead = int(lorsa.over_heads(dead.sum()))
    if n_dead == 0:
        return output.recons.new_zeros(())
    heads: Int[Tensor, " dead"] = dead.nonzero().squeeze(-1)
    acts = output.acts_pre[..., heads]
    code = lorsa.top(acts, writing_norms(lorsa.W_O)[heads], min(aux_k, n_dead))
    prediction = lorsa.over_heads(decode(code, lorsa.W_O[heads]))
    residual = (target - output.recons).detach()
    error = squared_error(prediction, residual, counted)
    variance = squared_error(torch.zeros_like(residual), residual, counted)
    return error / variance.clamp(min=torch.finfo(variance.dtype).tiny)
