"""How much memory and disk a training run will take, without running it.

Two optimizer steps of the run are played through on tensors without contents
(`lorsa_lens.training.simulation`), so what is counted is what the code really does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import override

from lorsa_lens.data import ActivationBatch, ActivationStream, Context, Contexts, TokenBatch
from lorsa_lens.data.contexts import State
from lorsa_lens.hosts import host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.loops import initial_lorsa
from lorsa_lens.training.scaling import estimate_scales, fit_gain
from lorsa_lens.training.simulation import LiveBytes, without_contents
from lorsa_lens.training.sources import SHUFFLE_BUFFER
from lorsa_lens.training.trainer import Trainer
from lorsa_lens.validation import ConfigError

PROCESS_STATUS = Path("/proc/self/statm")
"""Where Linux tells what a process holds, in pages."""

_BYTES_PER_TOKEN = 17
"""Token and document in int64, and whether it counts."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run will take, in bytes: memory of the device it runs on, and disk."""

    language_model: int
    """Weights of the language model."""

    weights: int
    """Weights of all Lorsas."""

    gradients: int
    """Their gradients."""

    optimizer: int
    """Adam's two means of each weight, and counts of dead heads."""

    batch: int
    """Activations of all layers, for the batch that is trained on."""

    lorsa_step: int
    """Activations of one Lorsa's step; layers follow one another."""

    model_activations: int
    """The language model's pass, with the activations that are kept of it."""

    prefetched: int
    """Batches that were prepared ahead."""

    scaling: int
    """Estimating scales and the initial gain from the first batch; before the step, not besides."""

    saving: int
    """Copies while a checkpoint is written; between steps, not besides."""

    peak: int
    """The most that is held at one time."""

    shuffling: int
    """Contexts to be shuffled, on the CPU; not in `peak`."""

    disk: int
    """Checkpoints that are there at one time, and the final Lorsas."""


def estimate_memory(
    model: nn.Module,
    config: TrainingConfig | None = None,
    layers: Iterable[int] | None = None,
    *,
    device: str = "cpu",
) -> MemoryEstimate:
    """What `train(model, tokens, layers, config)` will take, in one process.

    Nothing of size is allocated or computed. The model may have no weights itself:
    `load_host(name, device="meta")`. All numbers are bytes of tensors. What a process takes
    besides is in docs/training.md.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        config: of the run. None: the defaults.
        layers: which layers. None: all.
        device: where the run will be, `cpu` or `cuda`.

    Raises:
        ConfigError: if the configuration does not fit the model, or trains end to end.
        ValueError: if a layer does not exist, or contexts are longer than the model takes.
    """
    cfg = TrainingConfig() if config is None else config
    if cfg.objective != "reconstruction":
        raise ConfigError(
            f"objective = {cfg.objective!r}: memory is estimated for 'reconstruction' only"
        )
    host = host_of(model)
    chosen = list(range(host.n_layers)) if layers is None else list(layers)
    some_heads = max(1, (cfg.n_ov_heads or 8 * host.d_model) * 3 // 5)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes(device, assumed_count=some_heads) as memory,
        without_contents(model, device),
    ):
        return _played(model, cfg, chosen, memory)


def _played(
    model: nn.Module, cfg: TrainingConfig, layers: list[int], memory: LiveBytes
) -> MemoryEstimate:
    n_parts, language_model = cfg.gradient_accumulation_steps, memory.now
    lorsas = {layer: initial_lorsa(host_of(model), layer, cfg) for layer in layers}
    weights, initialising = sum(_size(lorsa) for lorsa in lorsas.values()), memory.peak
    contexts = _EmptyContexts(cfg.context_size)
    stream = ActivationStream(model, contexts, layers, batch_size=cfg.batch_size // n_parts)
    part, model_activations, part_size = _one_part(stream, memory)
    if cfg.cached_activations_path is not None:
        model_activations = part_size
    scaling = max(_scaling(lorsa, part, memory) for lorsa in lorsas.values())
    del part
    watched = _Watched(stream, memory)
    two_steps = cfg.replace(
        training_tokens=2 * cfg.train_batch_size_tokens,
        output_path=None,
        wandb_project=None,
        tensorboard=False,
        compile=False,
    )
    Trainer(lorsas, watched, two_steps).run(progress=False)
    first, second = watched.while_used[n_parts - 1], memory.peak
    between = watched.before[n_parts]  # the last part of the first batch is still there
    held = language_model + 2 * weights
    optimizer = between - held - part_size
    saving = 3 * max(_size(lorsa) for lorsa in lorsas.values())
    peak = max(first, second, between + saving if cfg.output_path else 0)
    prefetched = cfg.prefetch_batches * part_size
    if cfg.prefetch_batches:
        peak += prefetched + model_activations
    n_checkpoints = cfg.n_checkpoints_kept + 2  # the best, and the one being written
    return MemoryEstimate(
        language_model=language_model,
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        batch=n_parts * part_size,
        lorsa_step=second - held - optimizer - n_parts * part_size,
        model_activations=model_activations,
        prefetched=prefetched,
        scaling=scaling,
        saving=saving if cfg.output_path else 0,
        peak=max(initialising, peak, *watched.while_made),
        shuffling=SHUFFLE_BUFFER * cfg.context_size * _BYTES_PER_TOKEN,
        disk=(3 * n_checkpoints + 1) * weights if cfg.output_path else 0,
    )


def _one_part(stream: ActivationStream, memory: LiveBytes) -> tuple[ActivationBatch, int, int]:
    """A part of a batch, what making it takes, and its size."""
    before = memory.now
    memory.mark()
    part = next(iter(stream))
    return part, memory.peak - before, memory.now - before


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not tell."""
    if not PROCESS_STATUS.exists():
        return None
    import resource

    return int(PROCESS_STATUS.read_text().split()[1]) * resource.getpagesize()


class _Watched:
    """A source of activations that notes the memory around each batch."""

    def __init__(self, stream: ActivationStream, memory: LiveBytes) -> None:
        self.stream, self.memory = stream, memory
        self.before: list[int] = []
        self.while_made: list[int] = []
        self.while_used: list[int] = []

    def __iter__(self) -> Iterator[ActivationBatch]:
        batches = iter(self.stream)
        while True:
            self.before.append(self.memory.now)
            self.memory.mark()
            batch = next(batches)
            self.while_made.append(self.memory.peak)
            self.memory.mark()
            yield batch
            del batch
            self.while_used.append(self.memory.peak)

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state)


class _EmptyContexts(Contexts):
    """Contexts without end, and without contents."""

    padded, description = False, "nothing"

    def __init__(self, context_size: int) -> None:
        self.context_size = context_size

    @override
    def next_batch(self, batch_size: int) -> TokenBatch:
        shape = (batch_size, self.context_size)
        tokens, document = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        return TokenBatch(tokens, torch.ones(shape, dtype=torch.bool), document)

    @override
    def __next__(self) -> Context:
        raise NotImplementedError("only batches are asked for")

    @override
    def state_dict(self) -> State:
        return {}

    @override
    def load_state_dict(self, state: State) -> None:
        del state

    @override
    def limit_vocabulary(self, d_vocab: int) -> None:
        del d_vocab


def _scaling(lorsa: Lorsa, part: ActivationBatch, memory: LiveBytes) -> int:
    """What estimating the gain and the scales takes."""
    assert lorsa.cfg.layer is not None
    before = memory.now
    memory.mark()
    record = part.records[lorsa.cfg.layer].seen_by(lorsa)
    counted = part.counted.to(record.x.device)
    fit_gain(lorsa, record, counted)
    estimate_scales(record, counted)
    return memory.peak - before


def _size(lorsa: Lorsa) -> int:
    return sum(parameter.nbytes for parameter in lorsa.parameters())
