"""Runs of training that a test starts in one process, and in several ones: see test_processes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.training import TrainingConfig, TrainingError, train
from lorsa_lens.training.run import join_processes, run
from lorsa_lens.training.run_config import RunConfig

COMMON = {
    "n_qk_heads": 4, "n_ov_heads": 48, "k": 4, "context_size": 24,
    "train_batch_size_tokens": 8 * 24, "training_tokens": 8 * 8 * 24, "checkpoint_every": 4,
    "log_every": 1, "lr": 1e-2, "prefetch_batches": 0,
}  # fmt: skip


def run_job(folder, changes, layers):
    """Train on the induction model, or another one.

    In float64: gradients that are nothing but rounding stay small beside Adam's epsilon.
    """
    if "model" in changes:
        run(RunConfig(output_path=str(folder), layers=layers, **changes), progress=False)
        return
    tokens = load_language("induction").sample(64, seed=1).tokens[:, :24]
    model = load_model("induction").to(torch.float64)
    cfg = TrainingConfig(**{**COMMON, "output_path": str(folder), **changes})
    train(model, tokens, layers, cfg, resume=True, progress=False)


def main(folder, jobs):
    """Run all jobs in this process, together with the others; note what they refuse."""
    torch.set_num_threads(1)
    join_processes("cpu")
    for name, changes, layers in jobs:
        try:
            run_job(Path(folder) / name, changes, layers)
        except (ValueError, TrainingError) as error:
            place = Path(folder) / f"{name}.{dist.get_rank()}.error"
            place.write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
