"""One Lorsa in training: its weights at training scale, its optimizer, and its dead heads."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.balancing import SelectionBalance
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.losses import (
    auxiliary_loss,
    energy_weights,
    l0_penalty,
    l1_penalty,
    squared_error,
)
from lorsa_lens.training.parallel import Layout, layout_of
from lorsa_lens.training.parts import Part
from lorsa_lens.training.resampling import forget, resample
from lorsa_lens.training.scaling import Scales, rescale
from lorsa_lens.training.schedules import k_at, lr_factor


class TrainingError(RuntimeError):
    """A loss or a gradient that is no number any more; the message says where and when."""


class StepMetrics(NamedTuple):
    """What one optimizer step of one layer tells."""

    loss: float
    fvu: float | None
    l0: float
    n_dead: float
    dead: float
    aux_loss: float
    grad_norm: float


class LayerTrainer:
    """Trains one Lorsa, step by step.

    Args:
        lorsa: made for raw inputs and outputs, and placed by the layout; from now on at training
            scale, until `finished`.
        scales: those of training.
        cfg: the run's configuration.
        layout: how it lies over the processes. None: as the configuration says.
    """

    def __init__(
        self, lorsa: Lorsa, scales: Scales, cfg: TrainingConfig, layout: Layout | None = None
    ) -> None:
        rescale(lorsa, scales, to_raw=False)
        lorsa.train()
        self.lorsa = lorsa
        self.scales = scales
        self.cfg = cfg
        self.layout = layout_of(cfg) if layout is None else layout
        self.heads = self.layout.own_heads(lorsa)
        self.k = lorsa.cfg.k
        self.optimizer = torch.optim.Adam(
            lorsa.parameters(), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True
        )
        self.unfired: Int[Tensor, " ov_head"] = torch.zeros(
            lorsa.cfg.n_ov_heads, dtype=torch.long, device=lorsa.W_O.device
        )
        self.balance = SelectionBalance(lorsa.cfg.n_ov_heads, cfg.balance_rate, lorsa.W_O.device)
        self._outputs = torch.compile(lorsa.outputs) if cfg.compile else lorsa.outputs

    @property
    def dead(self) -> Bool[Tensor, " ov_head"]:
        """Heads that stayed at none of the last `dead_feature_window` counted tokens."""
        return self.unfired >= self.cfg.dead_feature_window

    def step(self, parts: Sequence[Part], step: int) -> StepMetrics:
        """One optimizer step on a batch given in parts.

        Args:
            parts: what the layer received and returned, on raw scale, as the layout delivers it.
            step: which step of the run, from 0.

        Raises:
            TrainingError: if the loss or a gradient is not finite; the weights are unchanged then.
        """
        self.begin(step)
        batch = self.layout.batch
        n_counted = batch.sum(torch.stack([part.counted.sum() for part in parts]).sum())
        totals = torch.zeros(4, dtype=torch.float64)
        n_chosen = torch.zeros_like(self.unfired)
        factors = self.balance.score_factors(step / self.cfg.n_steps)
        for part in parts:
            weight = float(part.counted.sum() / n_counted.clamp(min=1))
            totals += weight * self._backward(part, weight, factors, n_chosen)
        loss, fvu, l0, aux = batch.sum(totals).tolist()
        grad_norm = self.apply(step, loss)
        n_dead = self.note_chosen(n_chosen, n_counted)
        if self.cfg.resample_every and (step + 1) % self.cfg.resample_every == 0:
            self._resample(parts[0], step)
        return StepMetrics(loss, fvu, l0, n_dead, n_dead / len(self.unfired), aux, grad_norm)

    def begin(self, step: int) -> None:
        """Set what depends on the step, and forget the gradients of the last one."""
        k = k_at(self.cfg, self.k, step)
        if k != self.lorsa.cfg.k:
            self.lorsa.cfg = self.lorsa.cfg.replace(k=k)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr * lr_factor(self.cfg, step)
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, step: int, loss: float) -> float:
        """Change the weights by their gradients; returns the norm of those.

        Raises:
            TrainingError: as `step`.
        """
        self.layout.sum_gradients(self.lorsa)
        grad_norm = self._clipped()
        if not (isfinite(loss) and torch.isfinite(grad_norm)):
            raise TrainingError(
                f"layer {self.lorsa.cfg.layer}, step {step}: the loss is {loss} and the norm of "
                f"the gradient {float(grad_norm)}; try a lower lr than {self.cfg.lr}"
            )
        self.optimizer.step()
        self.layout.agree(self.lorsa)
        return float(grad_norm)

    def note_chosen(self, n_chosen: Int[Tensor, " ov_head"], n_counted: Int[Tensor, ""]) -> int:
        """Take note of how often each head stayed in a step; returns the number of dead heads.

        Args:
            n_chosen: at how many counted tokens each head stayed, as far as this process knows.
            n_counted: counted tokens of the whole batch.
        """
        self.layout.members.sum(n_chosen)
        self.unfired = (self.unfired + n_counted.to(n_chosen.device)).masked_fill(n_chosen > 0, 0)
        self.balance.update(n_chosen)
        return int(self.dead.sum())

    def _backward(
        self,
        part: Part,
        weight: float,
        score_factors: Float[Tensor, " ov_head"] | None,
        n_chosen: Int[Tensor, " ov_head"],
    ) -> Float[Tensor, "4"]:
        """Gradients of one part; its loss, FVU, L0 and auxiliary loss. Counts who stays."""
        record = self.scales.scaled(part.record.seen_by(self.lorsa))
        counted = part.counted.to(record.x.device)
        with torch.autocast(record.x.device.type, torch.bfloat16, enabled=self.cfg.autocast):
            factors = None if score_factors is None else score_factors[self.heads]
            output = self._outputs(record.x, score_factors=factors, **record.context)
        fvu = squared_error(output.recons, record.out, counted)
        loss, aux = fvu, torch.zeros(())
        if self.cfg.token_weights == "energy":
            weights = energy_weights(record.out, self.lorsa.b_O)
            loss = squared_error(output.recons, record.out, counted, weights)
        if self.cfg.l1_coefficient:
            loss = loss + self.cfg.l1_coefficient * l1_penalty(self.lorsa, output, counted)
        if self.cfg.l0_coefficient:
            loss = loss + self.cfg.l0_coefficient * l0_penalty(self.lorsa, output, counted)
        stays = (output.code.values.detach() != 0) & counted[..., None]
        own = n_chosen[self.heads]
        own += output.code.indices[stays].bincount(minlength=len(own))
        l0 = self.lorsa.over_heads(stays.sum()) / counted.sum().clamp(min=1)
        if self.cfg.aux_coefficient:
            aux_k = self.cfg.aux_k or max(1, self.lorsa.cfg.d_model // 2)
            dead = self.dead[self.heads]
            aux = auxiliary_loss(self.lorsa, output, record.out, counted, dead, aux_k)
            loss = loss + self.cfg.aux_coefficient * aux
        torch.autograd.backward(loss * weight)
        values = (loss, fvu, l0, aux)
        return torch.stack([value.detach().double().cpu() for value in values])

    def _resample(self, part: Part, step: int) -> None:
        """Let some dead heads start again, unless the learning rate falls already.

        Several processes take the vectors that the first one finds in its share.
        """
        if lr_factor(self.cfg, step) < 1 or not self.dead.any():
            return
        lorsa, changed = self.lorsa, torch.zeros_like(self.dead)
        if self.layout.batch.is_first:
            generator = torch.Generator().manual_seed(self.cfg.seed + step)
            record = self.scales.scaled(part.record.seen_by(lorsa))
            counted = part.counted.to(record.x.device)
            changed[resample(lorsa, record, counted, self.dead, generator)] = True
        self.layout.batch.of_first([lorsa.W_V.data, lorsa.b_V.data, lorsa.W_O.data, changed])
        forget(self.optimizer, lorsa, changed)
        self.unfired.masked_fill_(changed, 0)

    def _clipped(self) -> Tensor:
        """Scale the gradients down to the norm allowed; returns the one they had."""
        limit, norm = self.cfg.max_grad_norm, self.layout.grad_norm(self.lorsa)
        if limit is not None and norm > limit:
            for parameter in self.lorsa.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / (norm.item() + 1e-6))
        return norm

    def finished(self) -> Lorsa | None:
        """The whole Lorsa, for raw inputs and outputs again; this trainer must not step any more.

        None in a process that does not get it.
        """
        rescale(self.lorsa, self.scales, to_raw=True)
        self.lorsa.cfg = self.lorsa.cfg.replace(k=self.k)
        self.lorsa.eval()
        return self.layout.collected(self.lorsa)

    # ---------------------------------------------------------------------------- for checkpoints

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that training changes, whole, by name; the same in every layout.

        The processes that train the Lorsa together go through it together.
        """
        whole = self.layout.whole
        for name, tensor in self.lorsa.state_dict().items():
            yield f"lorsa.{name}", whole(name, tensor)
        names = [name for name, _ in self.lorsa.named_parameters()]
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, tensor in entry.items():
                yield f"adam.{names[index]}.{key}", whole(names[index], tensor)
        yield "unfired", self.unfired
        yield "advantage", self.balance.advantage
        yield "scales", torch.tensor([self.scales.x, self.scales.out], dtype=torch.float64)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave, in whatever layout and number of processes."""
        own = self.lorsa.state_dict()
        names = [name for name, _ in self.lorsa.named_parameters()]
        weights: dict[str, Tensor] = {}
        state: dict[int, dict[str, Tensor]] = {}
        for name, whole in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "lorsa":
                weights[rest] = self.layout.share(rest, whole, own[rest])
            elif kind == "adam":
                parameter, _, key = rest.rpartition(".")
                share = self.layout.share(parameter, whole, own[parameter])
                state.setdefault(names.index(parameter), {})[key] = share
        self.lorsa.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.unfired = tensors["unfired"].to(self.unfired.device)
        self.balance.advantage = tensors["advantage"].to(self.unfired.device)
