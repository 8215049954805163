"""What is measured of one layer and its Lorsa, token by token."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lorsa_lens.evaluation.patterns import PatternMatch, circuit_energy
from lorsa_lens.evaluation.sinks import SinkRule, sink_positions
from lorsa_lens.functional.code import Code
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

MATCHED_CONTEXTS = 32
"""Contexts on which each query-key circuit is matched with an attention head."""

STATISTICS = (
    "counted", "error", "variance", "sink", "error_elsewhere", "variance_elsewhere", "cosine",
    "energy_out", "product", "l0", "l1", "overlap", "circuit_energy",
)  # fmt: skip
"""What `LayerEvaluation.measure` gives."""


class RunningMean:
    """The mean of vectors, in float64."""

    def __init__(self, size: int) -> None:
        self.sum, self.n = torch.zeros(size, dtype=torch.float64), 0

    def add(self, vectors: Float[Tensor, "token size"]) -> None:
        """Add vectors."""
        self.sum += vectors.double().sum(0).cpu()
        self.n += len(vectors)

    @property
    def value(self) -> Float[Tensor, " size"]:
        """Their mean; 0 of none."""
        return self.sum / max(1, self.n)


class LayerEvaluation:
    """One Lorsa beside its layer.

    The text is gone through twice: `survey` finds means, and which attention head each query-key
    circuit looks most like; `measure` needs both.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: the Lorsa; its `cfg.layer` says of which layer.
        sinks: how sink positions are found.
    """

    def __init__(self, model: nn.Module, lorsa: Lorsa, sinks: SinkRule) -> None:
        assert lorsa.cfg.layer is not None  # splicing has checked it
        self.lorsa, self.layer, self.sinks = lorsa, lorsa.cfg.layer, sinks
        self.attention = Lorsa.from_attention(model, self.layer).to(lorsa.W_O.device)
        self.match = PatternMatch(lorsa, self.attention)
        size = lorsa.cfg.d_model
        self.mean, self.mean_elsewhere = RunningMean(size), RunningMean(size)
        self.mean_added = RunningMean(size)
        self.n_matched = 0
        self.n_fired = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.long)
        self.n_counted = 0

    def survey(self, record: AttentionRecord, counted: Bool[Tensor, "batch pos"]) -> None:
        """Look at a batch, before anything is measured."""
        there = counted.to(record.out.device)
        added = record.out if record.attn_out is None else record.attn_out
        self.mean_added.add(added[there])
        target = record.target(self.lorsa)
        self.mean.add(target[there])
        sink = sink_positions(self.attention, record, counted, self.sinks)
        self.mean_elsewhere.add(target[there & ~sink.to(there.device)])
        rows = slice(0, max(0, MATCHED_CONTEXTS - self.n_matched))
        if rows.stop:
            part = record.batch(rows)
            energy = circuit_energy(self.lorsa, self._code(part)) * counted[rows, :, None]
            self.match.observe(part, energy)
            self.n_matched += len(part.x)

    def measure(
        self, record: AttentionRecord, counted: Bool[Tensor, "batch pos"]
    ) -> dict[str, Float[Tensor, "batch pos"]]:
        """`STATISTICS` of every token, 0 where it does not count."""
        code = self._code(record)
        out = self.lorsa.decode(code).double().cpu()
        target = record.target(self.lorsa).double().cpu()
        error = (target - out).square().sum(-1)
        sink = sink_positions(self.attention, record, counted, self.sinks)
        elsewhere = (~sink).double()
        energy = circuit_energy(self.lorsa, code) * counted[..., None]
        self._count(code, counted)
        values = {
            "counted": torch.ones_like(error),
            "error": error,
            "variance": (target - self.mean.value).square().sum(-1),
            "sink": sink.double(),
            "error_elsewhere": error * elsewhere,
            "variance_elsewhere": (target - self.mean_elsewhere.value).square().sum(-1) * elsewhere,
            "cosine": nn.functional.cosine_similarity(target, out, dim=-1),
            "energy_out": out.square().sum(-1),
            "product": (out * target).sum(-1),
            "l0": (code.values != 0).sum(-1).double().cpu(),
            "l1": code.values.double().abs().sum(-1).cpu(),
            "overlap": self.match.overlap(record, energy),
            "circuit_energy": energy.sum(-1),
        }
        return {name: value.masked_fill(~counted, 0.0) for name, value in values.items()}

    def _code(self, record: AttentionRecord) -> Code:
        part = record.seen_by(self.lorsa)
        return self.lorsa.encode(part.x, **part.context)

    def _count(self, code: Code, counted: Bool[Tensor, "batch pos"]) -> None:
        stays = (code.values != 0) & counted.to(code.values.device)[..., None]
        n_heads = self.lorsa.cfg.n_ov_heads
        self.n_fired += torch.bincount(code.indices[stays], minlength=n_heads).cpu()
        self.n_counted += int(counted.sum())

    @property
    def density(self) -> Float[Tensor, " ov_head"]:
        """By head, the share of tokens at which it stays."""
        return self.n_fired.double() / max(1, self.n_counted)
