"""The first steps of a run, to see what memory it really takes."""

import resource
import sys

import torch

from lorsa_lens.hosts.loading import load_host
from lorsa_lens.training.loops import train
from lorsa_lens.training.run_config import RunConfig


def trial_peak(cfg: RunConfig, n_steps: int) -> int:
    """Train for a few steps, leave nothing behind, and say the most memory that was held, in bytes.

    On the CPU that is the resident memory of this process since it began, with the interpreter,
    the packages and what malloc keeps: so ask in a fresh process. On CUDA, what PyTorch's
    allocator reserved. Checkpoints are not written; what writing one takes is
    `lorsa_lens.training.memory.MemoryEstimate.saving`.

    Args:
        cfg: the run.
        n_steps: how many steps.

    Raises:
        ValueError: if `n_steps` is not positive, or the run's text or configuration will not do.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps = {n_steps}: give at least 1")
    short = cfg.training().replace(
        training_tokens=n_steps * cfg.train_batch_size_tokens,
        output_path=None,
        wandb_project=None,
        tensorboard=False,
    )
    model = load_host(cfg.model, device=cfg.device, dtype=getattr(torch, cfg.model_dtype))
    train(model, cfg.tokens, cfg.layers, short, progress=False)
    if cfg.device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(cfg.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
