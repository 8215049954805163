"""One Lorsa in training: its weights at training scale, its optimizer, and its dead heads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.losses import auxiliary_loss, l0_penalty, l1_penalty, squared_error
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.training.scaling import Scales, rescale
from lorsa_lens.training.schedules import k_at, lr_factor


class TrainingError(RuntimeError):
    """A loss or a gradient that is no number any more; the message says where and when."""


class Part(NamedTuple):
    """A part of a batch: what one layer received and returned, and which tokens count."""

    record: AttentionRecord
    counted: Bool[Tensor, "batch pos"]


class StepMetrics(NamedTuple):
    """What one optimizer step of one layer tells."""

    loss: float
    fvu: float
    l0: float
    dead: float
    aux_loss: float
    grad_norm: float


class LayerTrainer:
    """Trains one Lorsa, step by step.

    Args:
        lorsa: made for raw inputs and outputs; from now on at training scale, until `finished`.
        scales: those of training.
        cfg: the run's configuration.
        ranks: the processes that train it together. None: those of `torch.distributed`.
    """

    def __init__(
        self, lorsa: Lorsa, scales: Scales, cfg: TrainingConfig, ranks: Ranks | None = None
    ) -> None:
        rescale(lorsa, scales, to_raw=False)
        lorsa.train()
        self.lorsa = lorsa
        self.scales = scales
        self.cfg = cfg
        self.ranks = Ranks() if ranks is None else ranks
        self.k = lorsa.cfg.k
        self.optimizer = torch.optim.Adam(
            lorsa.parameters(), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True
        )
        self.unfired: Int[Tensor, " ov_head"] = torch.zeros(
            lorsa.cfg.n_ov_heads, dtype=torch.long, device=lorsa.W_O.device
        )
        self._outputs = torch.compile(lorsa.outputs) if cfg.compile else lorsa.outputs

    @property
    def dead(self) -> Bool[Tensor, " ov_head"]:
        """Heads that stayed at none of the last `dead_feature_window` counted tokens."""
        return self.unfired >= self.cfg.dead_feature_window

    def step(self, parts: Sequence[Part], step: int) -> StepMetrics:
        """One optimizer step on a batch given in parts.

        Args:
            parts: what the layer received and returned, on raw scale: this process's share.
            step: which step of the run, from 0.

        Raises:
            TrainingError: if the loss or a gradient is not finite; the weights are unchanged then.
        """
        k = k_at(self.cfg, self.k, step)
        if k != self.lorsa.cfg.k:
            self.lorsa.cfg = self.lorsa.cfg.replace(k=k)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr * lr_factor(self.cfg, step)
        self.optimizer.zero_grad(set_to_none=True)
        n_counted = self.ranks.sum(torch.stack([part.counted.sum() for part in parts]).sum())
        totals = torch.zeros(4, dtype=torch.float64)
        fired = torch.zeros_like(self.unfired, dtype=torch.bool)
        for part in parts:
            weight = float(part.counted.sum() / n_counted.clamp(min=1))
            totals += weight * self._backward(part, weight, fired)
        self.ranks.sum(totals)
        self.ranks.sum_gradients(self.lorsa.parameters())
        grad_norm = self._clipped()
        loss, fvu, l0, aux = totals.tolist()
        if not (torch.isfinite(grad_norm) and torch.isfinite(totals).all()):
            raise TrainingError(
                f"layer {self.lorsa.cfg.layer}, step {step}: the loss is {loss} and the norm of "
                f"the gradient {float(grad_norm)}; try a lower lr than {self.cfg.lr}"
            )
        self.optimizer.step()
        fired = self.ranks.any(fired)
        self.unfired = (self.unfired + n_counted.to(fired.device)).masked_fill(fired, 0)
        dead = float(self.dead.double().mean())
        return StepMetrics(loss, fvu, l0, dead, aux, float(grad_norm))

    def _backward(
        self, part: Part, weight: float, fired: Bool[Tensor, " ov_head"]
    ) -> Float[Tensor, "4"]:
        """Gradients of one part; its loss, FVU, L0 and auxiliary loss. Notes who stays."""
        record = self.scales.scaled(part.record.seen_by(self.lorsa))
        counted = part.counted.to(record.x.device)
        with torch.autocast(record.x.device.type, torch.bfloat16, enabled=self.cfg.autocast):
            output = self._outputs(record.x, **record.context)
        fvu = squared_error(output.recons, record.out, counted)
        loss, aux = fvu, torch.zeros(())
        if self.cfg.l1_coefficient:
            loss = loss + self.cfg.l1_coefficient * l1_penalty(self.lorsa, output, counted)
        if self.cfg.l0_coefficient:
            loss = loss + self.cfg.l0_coefficient * l0_penalty(self.lorsa, output, counted)
        stays = (output.code.values.detach() != 0) & counted[..., None]
        fired[output.code.indices[stays]] = True
        l0 = stays.sum() / counted.sum().clamp(min=1)
        if self.cfg.aux_coefficient:
            aux_k = self.cfg.aux_k or max(1, self.lorsa.cfg.d_model // 2)
            aux = auxiliary_loss(self.lorsa, output, record.out, counted, self.dead, aux_k)
            loss = loss + self.cfg.aux_coefficient * aux
        torch.autograd.backward(loss * weight)
        values = (loss, fvu, l0, aux)
        return torch.stack([value.detach().double().cpu() for value in values])

    def _clipped(self) -> Tensor:
        limit = self.cfg.max_grad_norm
        parameters = list(self.lorsa.parameters())
        return torch.nn.utils.clip_grad_norm_(
            parameters, float("inf") if limit is None else limit, foreach=True
        )

    def finished(self) -> Lorsa:
        """The Lorsa, for raw inputs and outputs again; this trainer must not step any more."""
        rescale(self.lorsa, self.scales, to_raw=True)
        self.lorsa.cfg = self.lorsa.cfg.replace(k=self.k)
        self.lorsa.eval()
        return self.lorsa

    # ---------------------------------------------------------------------------- for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        state = {f"lorsa.{name}": tensor for name, tensor in self.lorsa.state_dict().items()}
        names = [name for name, _ in self.lorsa.named_parameters()]
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, tensor in entry.items():
                state[f"adam.{names[index]}.{key}"] = tensor
        return {**state, "unfired": self.unfired}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        prefix = "lorsa."
        self.lorsa.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        names = [name for name, _ in self.lorsa.named_parameters()]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                parameter, _, key = name.removeprefix("adam.").rpartition(".")
                state.setdefault(names.index(parameter), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.unfired = tensors["unfired"].to(self.unfired.device)
