"""A training run: text through the model once, every layer's Lorsa side by side, nothing lost."""

import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    prune,
    write_checkpoint,
)
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.end_to_end import InPlaceTrainer, end_to_end_step
from lorsa_lens.training.folders import CHECKPOINTS, CONFIG_FILE, LORSAS
from lorsa_lens.training.layer import LayerTrainer, StepMetrics, TrainingError
from lorsa_lens.training.metrics import named, open_sinks
from lorsa_lens.training.parallel import layout_of
from lorsa_lens.training.parts import Batch, Part, Source
from lorsa_lens.training.scaling import Scales, estimate_scales, fit_gain

MAY_CHANGE = frozenset({
    "output_path", "checkpoint_every", "n_checkpoints_kept", "log_every", "wandb_project",
    "tensorboard", "parallel", "gradient_accumulation_steps",
})  # fmt: skip
"""Where a run's files go, how often, and how the work is divided: free when it is resumed."""


class Trainer:
    """Trains Lorsas of several layers from one source of activations.

    Args:
        lorsas: by layer, on raw scale; trained in place where they are not divided among
            processes. Each is asked for once, if this process trains it.
        source: activations of these layers, `cfg.batch_size / cfg.gradient_accumulation_steps`
            contexts at a time.
        cfg: the run's configuration.
        model: the model that the layers belong to, where the objective is about its predictions.
        resume: go on from the newest checkpoint of `cfg.output_path`, if there is one. If not, the
            folder must not hold a run.

    Raises:
        FileExistsError: if there is a run already, and `resume` is off.
        CheckpointError: if a checkpoint cannot be continued from.
        ConfigError: if the Lorsas cannot be laid out over the processes.
    """

    def __init__(
        self,
        lorsas: Mapping[int, Lorsa],
        source: Source,
        cfg: TrainingConfig,
        *,
        model: nn.Module | None = None,
        resume: bool = False,
    ) -> None:
        self.cfg, self.source, self.layout = cfg, source, layout_of(cfg)
        self.ranks = self.layout.world
        self.model = model
        self.run_dir = None if cfg.output_path is None else Path(cfg.output_path)
        self.all_layers = list(lorsas)
        own = self.layout.trained(self.all_layers)
        self.lorsas = {layer: self.layout.place(lorsas[layer]) for layer in own}
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
        else:
            self.ranks.wait()  # all have looked before one writes
            if self.ranks.is_first:
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
        if self.cfg.objective == "reconstruction":
            metrics = self._reconstruct(batches)
        else:
            metrics = self._train_in_place(batches)
        self.n_done += 1
        self._source_state = batches[-1].state
        losses = [m.loss if m.fvu is None else m.fvu for m in metrics.values()]
        self._window.append(sum(losses) / len(losses))
        return metrics

    def _reconstruct(self, batches: list[Batch]) -> dict[int, StepMetrics]:
        """A step of each Lorsa by itself."""
        shares = [(batch.records, batch.counted) for batch in batches]
        own: dict[int, StepMetrics] = {}
        failure: TrainingError | None = None
        for layer, parts in self.layout.deliver(shares, self.all_layers):
            try:
                if failure is None:
                    own[layer] = self._trainer(layer, parts[0]).step(parts, self.n_done)
            except TrainingError as error:  # the others go on waiting for this process
                failure = error
        if self.ranks.any(failure is not None):
            what = failure or f"step {self.n_done}: another process has stopped and says why"
            raise TrainingError(f"{what}. {self._last_good()}")
        return self.layout.of_all(own, self.all_layers)

    def _train_in_place(self, batches: list[Batch]) -> dict[int, StepMetrics]:
        """A step of all Lorsas together, in the model."""
        assert self.model is not None  # `train` has seen to it
        if not self.layers:
            records = record_attention(self.model, batches[0].tokens, self.all_layers)
            for layer, record in records.items():
                scales = self._scales(record.seen_by(self.lorsas[layer]), batches[0].counted)
                self.layers[layer] = self._made(layer, scales)
        try:
            return end_to_end_step(self.model, self.layers, batches, self.cfg, self.n_done)
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._last_good()}") from None

    def _trainer(self, layer: int, part: Part) -> LayerTrainer:
        """The trainer of a layer; the first time its scales are estimated from a part of the batch.

        Several processes take those of the first one's share.
        """
        if layer not in self.layers:
            lorsa = self.lorsas[layer]
            record = part.record.seen_by(lorsa)
            counted = part.counted.to(record.x.device)
            if self._fits_gain:
                fit_gain(lorsa, record, counted, self.layout)
            self.layers[layer] = self._made(layer, self._scales(record, counted))
        return self.layers[layer]

    @property
    def _fits_gain(self) -> bool:
        fresh = self.cfg.start_from is None and self.cfg.init != "random"
        return self.cfg.fit_initial_gain and fresh

    def _scales(self, record: AttentionRecord, counted: Tensor) -> Scales:
        scales = estimate_scales(record, counted.to(record.x.device))
        shared = torch.tensor([scales.x, scales.out], dtype=torch.float64)
        self.layout.batch.of_first([shared])
        return Scales(*shared.tolist())

    def _made(self, layer: int, scales: Scales) -> LayerTrainer:
        kind = LayerTrainer if self.cfg.objective == "reconstruction" else InPlaceTrainer
        return kind(self.lorsas[layer], scales, self.cfg, self.layout)

    def _values(self, metrics: dict[int, StepMetrics]) -> dict[str, float]:
        lr = next(iter(self.layers.values())).optimizer.param_groups[0]["lr"]
        values: dict[str, float] = {
            "details/current_learning_rate": lr,
            "details/n_training_samples": self.n_done * self.cfg.train_batch_size_tokens,
        }
        for layer, of_layer in metrics.items():
            values |= named(of_layer, layer)
        return values

    # ------------------------------------------------------------------------------- checkpoints

    def _save_if_due(self) -> None:
        every = self.cfg.checkpoint_every
        due = every and self.n_done % every == 0
        self._stop = self.ranks.any(self._stop)
        if due or self._stop or self.n_done == self.cfg.n_steps:
            self.save()
        if self._stop and self.n_done < self.cfg.n_steps:
            raise KeyboardInterrupt

    def save(self) -> Checkpoint | None:
        """Write a checkpoint now, and remove those that are not to be kept.

        Returns:
            The checkpoint; None if the run has no directory.
        """
        if self.run_dir is None:
            return None
        if self._window:
            mean = sum(self._window) / len(self._window)
            self._best = min(self._best, (mean, self.n_done), key=lambda entry: entry[0])
            self._window = []
        checkpoint = write_checkpoint(
            self.run_dir / CHECKPOINTS,
            self.n_done,
            self._written(),
            {
                "config": self.cfg.to_dict(),
                "source": self._source_state,
                "layers": self.all_layers,
                "best": list(self._best),
            },
            self.ranks,
        )
        if self.ranks.is_first:
            prune(checkpoint.path.parent, self.cfg.n_checkpoints_kept, self._best[1])
        return checkpoint

    def _written(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What this process writes of each layer; made one layer at a time."""
        for layer, trainer in self.layers.items():
            tensors = {name: t for name, t in trainer.tensors() if self.layout.writes}
            if self.layout.writes:
                yield layer, tensors

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        for name, value in self.cfg.to_dict().items():
            before = state["config"].get(name)
            if name not in MAY_CHANGE and value != before:
                raise CheckpointError(
                    f"{checkpoint.path} was made with {name} = {before!r}, not {value!r}: a run "
                    "can only be resumed as it was begun"
                )
        if set(state["layers"]) != set(self.all_layers):
            raise CheckpointError(
                f"{checkpoint.path} trains layers {', '.join(map(str, state['layers']))}, not "
                f"{', '.join(map(str, self.all_layers))}"
            )
        for layer in self.lorsas:
            tensors = checkpoint.tensors(layer)
            scales = Scales(*tensors["scales"].tolist())
            self.layers[layer] = self._made(layer, scales)
            self.layers[layer].load_tensors(tensors)
        self.n_done, self._source_state = checkpoint.step, state["source"]
        self._best = (float(state["best"][0]), int(state["best"][1]))
        self.source.load_state_dict(self._source_state)

    def _last_good(self) -> str:
        found = [] if self.run_dir is None else checkpoints(self.run_dir / CHECKPOINTS)
        return f"The last good checkpoint is {found[-1].path}" if found else "No checkpoint yet"

    def _finish(self) -> dict[int, Lorsa]:
        finished = {}
        for layer, trainer in self.layers.items():
            lorsa = trainer.finished()
            if lorsa is None:
                continue
            finished[layer] = lorsa
            if self.run_dir is not None and self.layout.writes:
                lorsa.save_pretrained(self.run_dir / LORSAS / f"blocks.{layer}")
        self.ranks.wait()
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

    def mean(values: Iterable[float | None]) -> float:
        listed = [value for value in values if value is not None]
        return sum(listed) / len(listed) if listed else float("nan")

    return {
        "loss": f"{mean(m.loss for m in metrics.values()):.4f}",
        "fvu": f"{mean(m.fvu for m in metrics.values()):.4f}",
        "l0": f"{mean(m.l0 for m in metrics.values()):.1f}",
        "dead": f"{mean(m.dead for m in metrics.values()):.0%}",
    }
