"""Lorsas of several layers trained together, in place, for what the model predicts.

Reconstruction makes each Lorsa faithful to its layer on the model's own activations. Here all of
them stand in the model at once, and are trained on its predictions: on the divergence from those
of the model as it is (`kl`), or on the text (`cross_entropy`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.splicing import splice
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.layer import LayerTrainer, StepMetrics
from lorsa_lens.training.parallel import Layout
from lorsa_lens.training.parallel.layout import gradients
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.training.scaling import Scales


@runtime_checkable
class Text(Protocol):
    """A part of a batch."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids."""
        ...

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that count."""
        ...


class InPlaceTrainer(LayerTrainer):
    """Trains one Lorsa on raw activations, as fast as if they had training scale.

    A weight that is `unit` times what it is on training scale gets `unit` times the learning rate,
    so that steps are the same share of every weight in every layer; gradients are clipped by the
    norm they have on training scale.

    Args:
        lorsa: made for raw inputs and outputs, as it stays.
        scales: those that training on reconstruction would use.
        cfg: the run's configuration.
        layout: as any trainer's.
    """

    def __init__(
        self, lorsa: Lorsa, scales: Scales, cfg: TrainingConfig, layout: Layout | None = None
    ) -> None:
        super().__init__(lorsa, Scales(1.0, 1.0), cfg, layout)
        self.scales = scales
        units = {name: scales.x for name in ("W_Q", "W_K", "W_V")}
        units |= {name: 1 / scales.out for name in ("W_O", "b_O")}
        groups = [
            {"params": [parameter], "unit": units.get(name, 1.0)}
            for name, parameter in lorsa.named_parameters()
        ]
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self.optimizer = torch.optim.Adam(groups, lr=cfg.lr, betas=betas, fused=True)

    def begin(self, step: int) -> None:
        """As any trainer's, with each weight's own learning rate."""
        super().begin(step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group["unit"]

    def _clipped(self) -> Tensor:
        groups = self.optimizer.param_groups
        graded = [(g["params"][0].grad, g["unit"]) for g in groups]
        norms = [torch.linalg.vector_norm(g) * unit for g, unit in graded if g is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if self.cfg.max_grad_norm is not None and norm > self.cfg.max_grad_norm:
            for gradient in gradients(self.lorsa):
                gradient.mul_(self.cfg.max_grad_norm / norm)
        return norm

    def finished(self) -> Lorsa | None:
        """The Lorsa; this trainer must not step any more."""
        self.lorsa.eval()
        return self.layout.collected(self.lorsa)


def end_to_end_step(
    model: nn.Module,
    trainers: dict[int, LayerTrainer],
    parts: Sequence[Text],
    cfg: TrainingConfig,
    step: int,
) -> dict[int, StepMetrics]:
    """One optimizer step of all Lorsas together, on a batch given in parts.

    Args:
        model: a HookedTransformer or a TransformerBridge; its weights stay as they are.
        trainers: by layer.
        parts: this process's share.
        cfg: the run's configuration; its `objective` is `kl` or `cross_entropy`.
        step: which step of the run, from 0.

    Returns:
        By layer; the loss is that of all together.

    Raises:
        TrainingError: if the loss or a gradient is not finite.
    """
    ranks = Ranks()
    for trainer in trainers.values():
        trainer.begin(step)
    device = next(model.parameters()).device
    masks = [_judged(part.counted, cfg.objective) for part in parts]
    n_judged = ranks.sum(torch.stack([mask.sum() for mask in masks]).sum())
    n_counted = ranks.sum(torch.stack([part.counted.sum() for part in parts]).sum())
    n_chosen = {layer: torch.zeros_like(t.unfired) for layer, t in trainers.items()}
    total = torch.zeros((), dtype=torch.float64)
    with _frozen(model):
        for part, mask in zip(parts, masks, strict=True):
            tokens, counted, mask = (t.to(device) for t in (part.tokens, part.counted, mask))
            target = _log_probabilities(model, tokens) if cfg.objective == "kl" else None
            lorsas = [trainer.lorsa for trainer in trainers.values()]
            with splice(model, lorsas):
                for layer, trainer in trainers.items():
                    count = partial(_count, trainer.lorsa, counted, n_chosen[layer])
                    trainer.lorsa.hook_acts_pre.add_hook(count)
                logits: Tensor = model(tokens)
                loss = _loss(logits, tokens, mask, target) / n_judged.clamp(min=1).to(device)
                torch.autograd.backward(loss)
            total += loss.detach().double().cpu()
    loss_value = ranks.sum(total).item()
    metrics = {}
    for layer, trainer in trainers.items():
        grad_norm = trainer.apply(step, loss_value)
        n_dead = trainer.note_chosen(n_chosen[layer], n_counted)
        dead = n_dead / len(trainer.unfired)
        l0 = n_chosen[layer].sum().item() / max(1, int(n_counted))
        metrics[layer] = StepMetrics(loss_value, None, l0, n_dead, dead, 0.0, grad_norm)
    return metrics


def _judged(counted: Tensor, objective: str) -> Tensor:
    """Positions whose prediction is judged: for `cross_entropy`, those before a counted token."""
    if objective == "kl":
        return counted
    judged = torch.zeros_like(counted)
    judged[:, :-1] = counted[:, 1:]
    return judged


def _loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    target: Float[Tensor, "batch pos d_vocab"] | None,
) -> Float[Tensor, ""]:
    """The sum over judged positions, in nats."""
    predicted = _normalized(logits)[mask]
    if target is None:
        following = tokens.roll(-1, dims=1)[mask]
        return -predicted.gather(-1, following[:, None]).sum()
    original = target[mask]
    divergence: Tensor = (original.exp() * (original - predicted)).sum()
    return divergence


@torch.no_grad()
def _log_probabilities(model: nn.Module, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    return _normalized(model(tokens))


def _normalized(logits: Tensor) -> Tensor:
    """Log-probabilities, in float32 at least."""
    return log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def _count(lorsa: Lorsa, counted: Tensor, n_chosen: Tensor, acts: Tensor, hook: Any) -> None:
    """Count which heads stay: a hook on the activations before selection."""
    del hook
    code = lorsa.select(acts)
    stays = (code.values != 0) & counted[..., None]
    n_chosen += code.indices[stays].bincount(minlength=len(n_chosen))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within, the model's own weights need no gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
