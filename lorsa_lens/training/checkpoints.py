"""Checkpoints: directories that are whole or not there, safetensors and JSON inside."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorsa_lens.training.ranks import Ranks

STATE_FILE = "state.json"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return int(self.path.name.removeprefix("step_"))

    def state(self) -> dict[str, Any]:
        """What is not a tensor: the configuration, the place in the text, the scales.

        Raises:
            CheckpointError: if the file is damaged or of a newer format.
        """
        try:
            state: dict[str, Any] = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / STATE_FILE} cannot be read: {error}") from None
        if state.get("format_version", 0) > FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} has format_version {state['format_version']}: this release of "
                f"lorsa_lens reads up to {FORMAT_VERSION}. Upgrade lorsa_lens"
            )
        return state

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer's trainer.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        path = self.path / f"layer_{layer}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None


def write_checkpoint(
    folder: Path,
    step: int,
    layers: Iterable[tuple[int, Mapping[str, Tensor]]],
    state: Mapping[str, Any],
    ranks: Ranks,
) -> Checkpoint:
    """Write a checkpoint; if that fails (a full disk, say), those before it stay as they are.

    All processes call this together, for a folder that they all see.

    Args:
        folder: the run's folder of checkpoints.
        step: optimizer steps that were done.
        layers: the tensors of the trainers of the layers that this process writes, one layer at a
            time.
        state: everything else, plain values.
        ranks: the processes.
    """
    target = folder / f"step_{step:09d}"
    temporary = folder / f".{target.name}.partial"
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
        temporary.mkdir(parents=True)
    ranks.wait()
    try:
        for layer, tensors in layers:
            path = temporary / f"layer_{layer}.safetensors"
            save_file(_on_cpu(tensors), path)
            _flush(path)
        ranks.wait()
        if ranks.is_first:
            text = json.dumps({**state, "format_version": FORMAT_VERSION}, indent=2) + "\n"
            (temporary / STATE_FILE).write_text(text, encoding="utf-8")
            _flush(temporary / STATE_FILE)
            shutil.rmtree(target, ignore_errors=True)  # the same step again, after a resume
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.wait()
    return Checkpoint(target)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies: the fused optimizer's tensors may share memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first; what a killed process left half-written is none."""
    return [Checkpoint(path) for path in sorted(folder.glob("step_*")) if path.is_dir()]


def prune(folder: Path, n_kept: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest ones and the best."""
    for checkpoint in checkpoints(folder)[:-n_kept]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.path)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
