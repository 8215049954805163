"""Scales of activations that a Lorsa was trained under, folded into its weights."""

import math

import torch

from lorsa_lens.lorsa import Lorsa


@torch.no_grad()
def fold_scales(lorsa: Lorsa, *, x: float, out: float) -> None:
    """Make `f` into `f(x * scale_x) / scale_out`, exactly, in place.

    Args:
        lorsa: what to change. Codes stay as they were; thresholds follow the writing norms.
        x: what its input was multiplied by.
        out: what the activation that it learnt to write was multiplied by.
    """
    for weight in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
        weight.mul_(x)
    for weight in (lorsa.W_O, lorsa.b_O):
        weight.div_(out)
    if lorsa.cfg.act_fn == "jumprelu":
        lorsa.log_threshold.sub_(math.log(out))
