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
    """Train a Lorsa to return what the attention layer returned. In place.

    The loss is the squared error, summed over d_model, over the variance of the layer's output.
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

    Raises:
        ValueError: if a number is not positive, or the loss is no longer finite.

    Returns:
        The loss of every step: a fraction of variance unexplained.
    """
    for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("lr", lr)):
        if value <= 0:
            raise ValueError(f"{name} = {value} must be positive")
    variance = record.out.flatten(0, 1).var(dim=0, unbiased=False).sum()
    optimizer = torch.optim.Adam(lorsa.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / n_warmup_steps, 1.0, (n_steps - step) / (0.4 * n_steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    lorsa.train()
    label = f"training layer {lorsa.cfg.layer}"
    with tqdm(total=n_steps, desc=label, disable=not progress) as bar:
        for step in range(n_steps):
            rows = torch.randint(record.x.shape[0], (batch_size,), generator=generator)
            loss = _loss(lorsa, record.batch(rows)) / variance
            losses.append(loss.item())
            if not loss.isfinite():
                lorsa.eval()
                raise ValueError(f"the loss is {losses[-1]} at step {step}: try lr < {lr}")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(lorsa.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(fvu=f"{losses[-1]:.4f}")
    lorsa.eval()
    return losses


def _loss(lorsa: Lorsa, record: AttentionRecord) -> Tensor:
    error: Tensor = lorsa(record.x, **record.context) - record.out
    return error.square().sum(-1).mean()
