"""A training run: text through the model once, every layer's Lorsa side by side, nothing lost."""

import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    prune,
    write_checkpoint,
)
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.layer import LayerTrainer, Part, StepMetrics, TrainingError
from lorsa_lens.training.metrics import named, open_sinks
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.training.scaling import Scales, estimate_scales, fit_gain

CONFIG_FILE = "training_config.json"
CHECKPOINTS = "checkpoints"
LORSAS = "lorsas"


@runtime_checkable
class Batch(Protocol):
    """What a source of activations gives for one part of a step."""

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that count."""
        ...

    @property
    def records(self) -> dict[int, AttentionRecord]:
        """By layer, what attention received and returned."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """The source's place after this batch, plain values."""
        ...


@runtime_checkable
class Source(Protocol):
    """Activations without end, from a place that can be set."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present place on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        ...


class Trainer:
    """Trains Lorsas of several layers from one source of activations.

    Args:
        lorsas: by layer, on raw scale; trained in place.
        source: activations of these layers, `cfg.batch_size / cfg.gradient_accumulation_steps`
            contexts at a time.
        cfg: the run's configuration.
        resume: go on from the newest checkpoint of `cfg.output_path`, if there is one. If not, the
            folder must not hold a run.

    Raises:
        FileExistsError: if there is a run already, and `resume` is off.
        CheckpointError: if a checkpoint cannot be continued from.
    """

    def __init__(
        self,
        lorsas: dict[int, Lorsa],
        source: Source,
        cfg: TrainingConfig,
        *,
        resume: bool = False,
    ) -> None:
        self.cfg, self.source, self.ranks = cfg, source, Ranks()
        self.run_dir = None if cfg.output_path is None else Path(cfg.output_path)
        self.lorsas = lorsas
        self.layers: dict[int, LayerTrainer] = {}
        self.n_done = 0
        self._source_state: dict[str, Any] = {}
        # The lowest mean FVU between two checkpoints, and the step of the second.
        self._best: tuple[float, int] = (float("inf"), 0)
        self._window: list[float] = []
        self._stop = False
        if self.run_dir is not None:
            self._open(self.run_dir, resume)

    def _open(self, run_dir: Path, resume: bool) -> None:
        """Begin a run's directory, or go on in it."""
        found = checkpoints(run_dir / CHECKPOINTS)
        if resume and found:
            self._resume(found[-1])
        elif not resume and (run_dir / CONFIG_FILE).exists():
            raise FileExistsError(
                f"{run_dir} holds a run already: give resume=True, or another output_path"
            )
        elif self.ranks.is_first:
            text = json.dumps(self.cfg.to_dict(), indent=2) + "\n"
            with atomic_write(run_dir / CONFIG_FILE) as temporary:
                temporary.write_text(text, encoding="utf-8")

    # ------------------------------------------------------------------------------- the loop

    def run(self, *, progress: bool = True) -> dict[int, Lorsa]:
        """Train to the end.

        On Ctrl-C the step under way is finished, a checkpoint written, and KeyboardInterrupt
        raised. On a number that is no number any more, too, the last checkpoint stays as it is.

        Returns:
            The Lorsas, on raw scale, also saved in the run's directory.

        Raises:
            TrainingError: if a loss is not finite: with the step, the layer and the last
                checkpoint.
            KeyboardInterrupt: after Ctrl-C.
        """
        sinks = open_sinks(self.cfg, self.run_dir, self.n_done) if self.ranks.is_first else []
        bar = tqdm(
            total=self.cfg.n_steps, initial=self.n_done, desc="training", disable=not progress
        )
        try:
            with self._finishing_steps(), bar:
                batches = self._batches()
                while self.n_done < self.cfg.n_steps:
                    metrics = self._step(next(batches))
                    if self.n_done % self.cfg.log_every == 0 or self.n_done == self.cfg.n_steps:
                        values = self._values(metrics)
                        for sink in sinks:
                            sink.log(values, self.n_done - 1)
                    bar.update()
                    bar.set_postfix(_summary(metrics))
                    self._save_if_due()
        finally:
            for sink in sinks:
                sink.close()
        return self._finish()

    def _batches(self) -> Iterator[list[Batch]]:
        """The parts of each step's batch."""
        parts: list[Batch] = []
        for batch in self.source:
            parts.append(batch)
            if len(parts) == self.cfg.gradient_accumulation_steps:
                yield parts
                parts = []
        raise RuntimeError(f"the source of activations ended after {self.n_done} steps")

    def _step(self, batches: list[Batch]) -> dict[int, StepMetrics]:
        if not self.layers:
            self._start(batches)
        metrics = {}
        for index, trainer in self.layers.items():
            parts = [Part(batch.records[index], batch.counted) for batch in batches]
            try:
                metrics[index] = trainer.step(parts, self.n_done)
            except TrainingError as error:
                raise TrainingError(f"{error}. {self._last_good()}") from None
        self.n_done += 1
        self._source_state = batches[-1].state
        self._window.append(sum(m.fvu for m in metrics.values()) / len(metrics))
        return metrics

    def _start(self, batches: list[Batch]) -> None:
        """Estimate scales from the first batch, and put the Lorsas on training scale.

        Several processes take those of the first one's share.
        """
        for layer, lorsa in self.lorsas.items():
            record = batches[0].records[layer].seen_by(lorsa)
            counted = batches[0].counted.to(record.x.device)
            if self.cfg.fit_initial_gain and self.cfg.init != "random":
                fit_gain(lorsa, record, counted)
            scales = estimate_scales(record, counted)
            shared = torch.tensor([scales.x, scales.out], dtype=torch.float64)
            self.ranks.of_first([shared, *(p.data for p in lorsa.parameters())])
            self.layers[layer] = LayerTrainer(lorsa, Scales(*shared.tolist()), self.cfg, self.ranks)

    def _values(self, metrics: dict[int, StepMetrics]) -> dict[str, float]:
        lr = next(iter(self.layers.values())).optimizer.param_groups[0]["lr"]
        values: dict[str, float] = {
            "details/current_learning_rate": lr,
            "details/n_training_tokens": self.n_done * self.cfg.train_batch_size_tokens,
        }
        for layer, of_layer in metrics.items():
            values |= named(of_layer, layer)
        return values

    # ------------------------------------------------------------------------------- checkpoints

    def _save_if_due(self) -> None:
        every = self.cfg.checkpoint_every
        due = every and self.n_done % every == 0
        self._stop = bool(self.ranks.any(torch.tensor(self._stop)))
        if due or self._stop or self.n_done == self.cfg.n_steps:
            self.save()
        if self._stop and self.n_done < self.cfg.n_steps:
            raise KeyboardInterrupt

    def save(self) -> Checkpoint | None:
        """Write a checkpoint now, and remove those that are not to be kept.

        Returns:
            The checkpoint; None if the run has no directory.
        """
        if self.run_dir is None or not self.ranks.is_first:
            self.ranks.wait()
            return None
        if self._window:
            mean = sum(self._window) / len(self._window)
            self._best = min(self._best, (mean, self.n_done), key=lambda entry: entry[0])
            self._window = []
        checkpoint = write_checkpoint(
            self.run_dir / CHECKPOINTS,
            self.n_done,
            {layer: trainer.tensors() for layer, trainer in self.layers.items()},
            {
                "config": self.cfg.to_dict(),
                "source": self._source_state,
                "scales": {
                    str(layer): [trainer.scales.x, trainer.scales.out]
                    for layer, trainer in self.layers.items()
                },
                "best": list(self._best),
            },
        )
        prune(checkpoint.path.parent, self.cfg.n_checkpoints_kept, self._best[1])
        self.ranks.wait()
        return checkpoint

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        # Only where the run's files go, and how often, may differ.
        free = {"output_path", "checkpoint_every", "n_checkpoints_kept", "log_every",
                "wandb_project", "tensorboard"}  # fmt: skip
        for name, value in self.cfg.to_dict().items():
            before = state["config"].get(name)
            if name not in free and value != before:
                raise CheckpointError(
                    f"{checkpoint.path} was made with {name} = {before!r}, not {value!r}: a run "
                    "can only be resumed as it was begun"
                )
        if set(state["scales"]) != {str(layer) for layer in self.lorsas}:
            raise CheckpointError(
                f"{checkpoint.path} trains layers {', '.join(state['scales'])}, not "
                f"{', '.join(str(layer) for layer in self.lorsas)}"
            )
        for layer, lorsa in self.lorsas.items():
            trainer = LayerTrainer(lorsa, Scales(*state["scales"][str(layer)]), self.cfg)
            trainer.load_tensors(checkpoint.tensors(layer))
            self.layers[layer] = trainer
        self.n_done, self._source_state = checkpoint.step, state["source"]
        self._best = (float(state["best"][0]), int(state["best"][1]))
        self.source.load_state_dict(self._source_state)

    def _last_good(self) -> str:
        found = [] if self.run_dir is None else checkpoints(self.run_dir / CHECKPOINTS)
        return f"The last good checkpoint is {found[-1].path}" if found else "No checkpoint yet"

    def _finish(self) -> dict[int, Lorsa]:
        finished = {layer: trainer.finished() for layer, trainer in self.layers.items()}
        if self.run_dir is not None and self.ranks.is_first:
            for layer, lorsa in finished.items():
                lorsa.save_pretrained(self.run_dir / LORSAS / f"blocks.{layer}")
        return finished

    @contextmanager
    def _finishing_steps(self) -> Iterator[None]:
        """Within, Ctrl-C waits for the end of the step; a second one does not."""

        def stop(signum: int, frame: FrameType | None) -> None:
            del signum, frame
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not in the main thread: Ctrl-C cannot come here
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _summary(metrics: dict[int, StepMetrics]) -> dict[str, str]:
    """Means over layers, for the progress bar."""

    def mean(values: Iterable[float]) -> float:
        listed = list(values)
        return sum(listed) / len(listed)

    return {
        "loss": f"{mean(m.loss for m in metrics.values()):.4f}",
        "fvu": f"{mean(m.fvu for m in metrics.values()):.4f}",
        "l0": f"{mean(m.l0 for m in metrics.values()):.1f}",
        "dead": f"{mean(m.dead for m in metrics.values()):.0%}",
    }
