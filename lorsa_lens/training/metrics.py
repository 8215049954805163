"""Where the numbers of a run go: JSONL always, Weights & Biases and TensorBoard by option."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.layer import StepMetrics

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run.json"
"""Which run of Weights & Biases it is, so that a resumed run goes on with it."""


def named(metrics: StepMetrics, layer: int) -> dict[str, float]:
    """A layer's metrics under the names that SAELens users know, after the layer's.

    A metric that a step does not have is left out.
    """
    fvu = metrics.fvu
    values = {
        "losses/overall_loss": metrics.loss,
        "losses/mse_loss": fvu,
        "losses/auxiliary_loss": metrics.aux_loss,
        "metrics/explained_variance": None if fvu is None else 1 - fvu,
        "metrics/l0": metrics.l0,
        "sparsity/dead_features": metrics.n_dead,
        "sparsity/dead_fraction": metrics.dead,
        "details/grad_norm": metrics.grad_norm,
    }
    return {f"blocks.{layer}/{name}": x for name, x in values.items() if x is not None}


@runtime_checkable
class Sink(Protocol):
    """Something that takes the numbers of a step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """No more will come."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.exists():  # what came after the checkpoint that is resumed from comes again
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}") and json.loads(line)["step"] < first_step:
                    kept.append(line + "\n")
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases; training that is resumed goes on with the run it began.

    Args:
        project: where the run is.
        cfg: kept with it.
        run_dir: where its id is kept.
        resumed: whether training goes on from a checkpoint.
    """

    def __init__(
        self, project: str, cfg: TrainingConfig, run_dir: Path | None, resumed: bool
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError(
                "wandb_project is set, but wandb is not installed: pip install 'lorsa-lens[wandb]'"
            ) from None
        kept = None if run_dir is None else run_dir / WANDB_FILE
        same: dict[str, Any] = {}
        if resumed and kept is not None and kept.is_file():
            before = json.loads(kept.read_text(encoding="utf-8"))
            if before["project"] == project:
                same = {"id": before["id"], "resume": "must"}
        self._run = wandb.init(project=project, config=cfg.to_dict(), **same)
        if kept is not None:
            with atomic_write(kept) as temporary:
                text = json.dumps({"project": project, "id": self._run.id})
                temporary.write_text(text, encoding="utf-8")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorBoard:
    """TensorBoard event files in the run's directory; steps from `first_step` on come anew."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "tensorboard is on, but not installed: pip install 'lorsa-lens[tensorboard]'"
            ) from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_sinks(cfg: TrainingConfig, run_dir: Path | None, first_step: int) -> list[Sink]:
    """All sinks that a configuration asks for; files only in a run's directory."""
    sinks: list[Sink] = []
    # What may be missing comes first, so that nothing is left open then.
    if cfg.tensorboard and run_dir is not None:
        sinks.append(TensorBoard(run_dir / "tensorboard", first_step))
    if cfg.wandb_project is not None:
        sinks.append(WeightsAndBiases(cfg.wandb_project, cfg, run_dir, first_step > 0))
    if run_dir is not None:
        sinks.append(JsonLines(run_dir / METRICS_FILE, first_step))
    return sinks
