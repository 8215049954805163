"""What watches and holds the nodes of an MLP, or of its transcoder, while the prompt runs again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.circuits.mlp_stages import LinearMLP, MLPPart, TranscoderStage
from lorsa_lens.circuits.probes import Hooks, Probe


class MLPProbe(Probe):
    """An MLP, or the transcoder in its place."""

    stage: LinearMLP | TranscoderStage
    x: Float[Tensor, "pos d_model"]
    """What the MLP received in the last run."""
    measured: Float[Tensor, " writer"]

    def __init__(self, stage: LinearMLP | TranscoderStage, part: MLPPart) -> None:
        self.stage, self.part = stage, part

    @property
    @override
    def writes_at(self) -> str:
        return f"blocks.{self.stage.layer}.hook_mlp_out"

    @override
    def base_hooks(self) -> Hooks:
        return []

    @override
    def hooks(self) -> Hooks:
        return [(self.writes_at, self.hook_mlp_out)]

    @override
    @contextmanager
    def watching(self) -> Iterator[None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module
            if not self._inside:
                self.x = (args[0] if args else next(iter(kwargs.values())))[0].double()

        self._inside = False
        handle = self.part.module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def hook_mlp_out(self, out: Tensor, hook: Any) -> Tensor | None:
        """Holds what the MLP writes."""
        del hook
        if self._inside:
            return None
        if isinstance(self.stage, TranscoderStage):
            written = self._transcoded(self.stage)
        else:
            written = self._linear(out)
        return self._leaves(written.to(out)[None])

    def _linear(self, out: Tensor) -> Float[Tensor, "pos d_model"]:
        assert isinstance(self.stage, LinearMLP)
        if self.live:
            written = out[0].double()
        else:
            self._inside = True
            written = self.part.out + self.part.along(self.x - self.part.x)
            self._inside = False
        writers = self.stage.writers
        self.measured = (written[writers.pos] * self.stage.directions).sum(1)
        if self.direct:
            written = self.part.out
        written = written.clone()
        for node, value in self.edits.items():
            place = self._place[node]
            written[node.pos] = writers.vectors[place] * (value / writers.activations[place])
        return written

    def _transcoded(self, stage: TranscoderStage) -> Float[Tensor, "pos d_model"]:
        code = stage.code
        pre = self.x @ code.W_enc + code.b_enc
        stays = torch.zeros_like(pre, dtype=torch.bool)
        stays[stage.pos, stage.feature] = True
        acts = pre * stays
        if self.live:
            acts = code.encode(self.x)
        if self.direct:
            acts = torch.zeros_like(pre).index_put((stage.pos, stage.feature), stage.acts)
        for node, value in self.edits.items():
            if node.kind == "feature":
                acts[node.pos, node.index] = value
        places, nodes = self._units()
        self.measured = torch.zeros_like(stage.writers.activations)
        self.measured[places] = pre[[n.pos for n in nodes], [n.index for n in nodes]]
        decoded = acts @ code.W_dec + code.b_dec
        return decoded + stage.error

    @override
    def pre_activations(self) -> Float[Tensor, " writer"]:
        return self.measured
