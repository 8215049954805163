"""A minimal training loop: one Lorsa, one layer's records in memory."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord


def train(
    lorsa: Lorsa,
    record: AttentionRecord,
    *,
    n_steps: int = 700,
    batch_size: int = 32,
    lr: float = 3e-3,
    n_warmup_steps: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train a Lorsa to write what the attention layer wrote. In place; in evaluation mode after.

    The loss is the squared error, summed over d_model, over the variance of the layer's output.
    There is no penalty on activity, so `relu` and `jumprelu` do not become sparse by it.
    Adam (0.9, 0.99), gradients clipped to norm 1, the learning rate rises over `n_warmup_steps`,
    stays, and falls linearly to 0 over the last 40 % of the steps.

    Args:
        lorsa: what to train, best made with `Lorsa.from_attention`.
        record: what the layer received and returned, from `record_attention`.
        n_steps: optimizer steps.
        batch_size: sequences per step, drawn at random.
        lr: the highest learning rate.
        n_warmup_steps: steps until it is reached.
        seed: for the order of the sequences.
        progress: show a progress bar.

    Returns:
        The loss of every step: a fraction of variance unexplained.

    Raises:
        ValueError: if a number is out of range, the layer's output does not vary, or the loss is no
            longer finite.
    """
    variance = _checked_variance(lorsa, record, n_steps, batch_size, lr, n_warmup_steps)
    optimizer = torch.optim.Adam(lorsa.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, n_steps, n_warmup_steps)
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    label = f"training layer {lorsa.cfg.layer}"
    lorsa.train()
    try:
        with tqdm(total=n_steps, desc=label, disable=not progress) as bar:
            for step in range(n_steps):
                rows = torch.randint(record.x.shape[0], (batch_size,), generator=generator)
                loss = _loss(lorsa, record.batch(rows)) / variance
                losses.append(loss.item())
                if not loss.isfinite():
                    raise ValueError(f"the loss is {losses[-1]} at step {step}: try lr < {lr}")
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(lorsa.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(fvu=f"{losses[-1]:.4f}")
    finally:
        lorsa.eval()
    return losses


def learning_rate(step: int, n_steps: int, n_warmup_steps: int) -> float:
    """The learning rate of a step (from 0), as a fraction of the highest one."""
    warmup = (step + 1) / max(1, n_warmup_steps)
    decay = (n_steps - step) / (0.4 * n_steps)
    return min(warmup, 1.0, decay)


def _checked_variance(
    lorsa: Lorsa,
    record: AttentionRecord,
    n_steps: int,
    batch_size: int,
    lr: float,
    n_warmup_steps: int,
) -> Tensor:
    """The variance of what is to be learned, once everything given has been looked at."""
    for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("lr", lr)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value} must be positive")
    if n_warmup_steps < 0:
        raise ValueError(f"n_warmup_steps = {n_warmup_steps} must not be negative")
    variance = record.target(lorsa).flatten(0, 1).var(dim=0, unbiased=False).sum()
    if not 0 < float(variance) < float("inf"):
        raise ValueError(f"record has outputs of variance {float(variance)}: nothing to learn from")
    return variance.to(lorsa.W_O)


def _loss(lorsa: Lorsa, record: AttentionRecord) -> Tensor:
    record = record.seen_by(lorsa)
    error: Tensor = lorsa(record.x, **record.context) - record.out
    return error.square().sum(-1).mean()
