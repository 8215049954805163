"""What changes over a run: the learning rate and the number of heads that stay."""

import math

from lorsa_lens.training.config import TrainingConfig


def lr_factor(cfg: TrainingConfig, step: int) -> float:
    """The learning rate of a step (from 0), as a share of `cfg.lr`.

    It rises linearly over the first steps, stays, and falls over the last ones.
    """
    n_warm_up = round(cfg.lr_warm_up_fraction * cfg.n_steps)
    n_decay = round(cfg.lr_decay_fraction * cfg.n_steps)
    if step < n_warm_up:
        return (step + 1) / n_warm_up
    left = cfg.n_steps - step
    if cfg.lr_scheduler == "constant" or left >= n_decay:
        return 1.0
    if cfg.lr_scheduler == "linear":
        return left / n_decay
    return (1 - math.cos(math.pi * left / n_decay)) / 2


def k_at(cfg: TrainingConfig, k: int | None, step: int) -> int | None:
    """Heads that stay per token at a step: from `cfg.k_start` linearly to `k`."""
    n_anneal = round(cfg.k_anneal_fraction * cfg.n_steps)
    if k is None or cfg.k_start is None or step >= n_anneal:
        return k
    return round(cfg.k_start + (k - cfg.k_start) * step / n_anneal)
