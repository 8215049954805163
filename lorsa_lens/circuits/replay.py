"""The prompt run again in the model itself, nodes held at other activations: what is measured.

The Lorsas are spliced into the host. Layers without one get the exact lift of their own attention,
so that their heads can be held too. Error terms stay those of the prompt. What else stays is the
reader's choice: nothing but that (live), or patterns, norms, MLPs' Jacobians and the heads and
features that stay as well (frozen).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.circuits.attention_stages import AttentionStage, LorsaStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.mlp_probe import MLPProbe
from lorsa_lens.circuits.mlp_stages import LinearMLP, TranscoderStage
from lorsa_lens.circuits.probes import HeadsProbe, LorsaProbe, Probe
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.circuits.targets import Output, Target
from lorsa_lens.hosts import Host, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.frozen_norm import FrozenNorm
from lorsa_lens.splicing import splice


class Measured(NamedTuple):
    """One run."""

    pre_activations: Float[Tensor, " node"]
    """Of heads, features and MLPs, as `AttributionGraph.pre_activations`; 0 for leaves."""
    targets: Float[Tensor, " target"]


class Replay:
    """A prompt that can be run again; made once for many runs.

    Args:
        replacement: the prompt.
        target: what to measure besides the nodes.

    Raises:
        ValueError: if the target does not exist.
    """

    def __init__(self, replacement: LocalReplacement, target: Target | None = None) -> None:
        self.replacement = replacement
        self.output = Output(replacement.stream, target or Target.top_probability())
        self.model = replacement.stream.model
        self.host = host_of(self.model)
        layers = range(len(replacement.stream.layers))
        self.lorsas = [
            replacement.lorsas.get(layer) or Lorsa.from_attention(self.model, layer)
            for layer in layers
        ]
        stages = range(1, len(replacement.stages))
        self.probes = [_probe_of(replacement, i, self.lorsas, self.host) for i in stages]
        self._note_base()

    @cached_property
    def base(self) -> Measured:
        """The run with no node held, frozen or live alike: the prompt as it is."""
        return self.run({})

    @torch.no_grad()
    def run(
        self,
        edits: Mapping[Node, float],
        *,
        live: bool = False,
        direct: bool = False,
    ) -> Measured:
        """Run the prompt with nodes held at activations.

        Args:
            edits: the activations; every other node follows.
            live: patterns, norms, MLPs and selections follow too; otherwise they are frozen.
            direct: every other node keeps what it writes, so that only direct effects are seen.

        Raises:
            ValueError: if a node is not at work on this prompt.
        """
        for node in edits:
            self.replacement.vector(node)
        for probe in self.probes:
            probe.begin(edits, live=live, direct=direct)
        hooks = [("blocks.0.hook_resid_pre", self._inputs(edits))]
        for probe in self.probes:
            hooks += probe.hooks()
        normalized = self._forward(hooks, live=live)
        values = torch.cat(
            [
                torch.zeros_like(self.replacement.stages[0].writers.activations),
                *(probe.pre_activations() for probe in self.probes),
            ]
        )
        return Measured(values, self.output.value(normalized[self.output.pos]))

    def live_gradients(self) -> list[Float[Tensor, "target pos d_model"]]:
        """Of each target, by what each stage writes to the stream, everything following."""
        for probe in self.probes:
            probe.begin({}, live=True, direct=False)
        places = ["blocks.0.hook_resid_pre", *(probe.writes_at for probe in self.probes)]
        written: dict[str, Tensor] = {}

        def add_nothing(out: Tensor, hook: Any, place: str) -> Tensor:
            del hook  # a bridge has other names
            written[place] = torch.zeros_like(out).requires_grad_()
            return out + written[place]

        hooks = [hook for probe in self.probes for hook in probe.hooks()]
        hooks += [(place, partial(add_nothing, place=place)) for place in places]
        with torch.enable_grad():
            normalized = self._forward(hooks, live=True)
            values = self.output.value(normalized[self.output.pos])
        inputs = [written[place] for place in places]
        by_target = [
            torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
            for value in values
        ]
        return [
            torch.cat([torch.zeros_like(given) if g is None else g for g in of_place]).double()
            for given, of_place in zip(inputs, zip(*by_target, strict=True), strict=True)
        ]

    # ---------------------------------------------------------------------------- how it is done

    @torch.no_grad()
    def _note_base(self) -> None:
        """Run once, exact by its error terms, and note what may be frozen."""
        hooks: list[Any] = []
        for probe in self.probes:
            hooks += probe.base_hooks()
        with splice(self.model, self.lorsas, error_term=True):
            self._call(hooks)

    def _forward(self, hooks: list[Any], *, live: bool) -> Float[Tensor, "pos d_model"]:
        """Run with hooks; what the final norm returns."""
        stream = self.replacement.stream
        with ExitStack() as stack:
            stack.enter_context(splice(self.model, self.lorsas))
            for probe in self.probes:
                stack.enter_context(probe.watching())
            if not live:
                stack.enter_context(self._norms_frozen())
            seen = stack.enter_context(self._final())
            self._call(hooks)
        return seen[0].double() if seen else stream.resid_final

    def _call(self, hooks: list[Any]) -> None:
        ids = self.replacement.stream.tokens[None]
        self.host.model.run_with_hooks(ids, fwd_hooks=hooks)

    def _inputs(self, edits: Mapping[Node, float]) -> Callable[..., Tensor]:
        """A hook that changes tokens and positions."""
        stage = self.replacement.stages[0]

        def hook(resid: Tensor, hook: Any) -> Tensor:
            del hook
            change = torch.zeros_like(resid[0], dtype=torch.float64)
            for place, node in enumerate(stage.writers.nodes):
                if node in edits:
                    scale = edits[node] / stage.writers.activations[place] - 1
                    change[node.pos] += stage.writers.vectors[place] * scale
            return resid + change.to(resid)[None]

        return hook

    @contextmanager
    def _final(self) -> Iterator[list[Tensor]]:
        """Within, what the final norm returns is noted; the stream where there is none."""
        seen: list[Tensor] = []
        norm = self.host.final_norm
        module = self.host.block(self.host.n_layers - 1) if norm is None else norm

        def note(module: nn.Module, args: Any, out: Any) -> None:
            del module, args
            seen[:] = [(out[0] if isinstance(out, tuple) else out)[0]]

        # After `_norms_frozen`, so that it sees what that returns.
        handle = module.register_forward_hook(note)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def _norms_frozen(self) -> Iterator[None]:
        """Within, every norm that is read has the scale that it had on the prompt.

        Norms after attention and MLPs are frozen by the probes, behind their hook points.
        """
        pairs: list[tuple[nn.Module | None, FrozenNorm]] = []
        stream = self.replacement.stream
        for layer, part in enumerate(stream.layers):
            before, mlp = self.host.norm_before(layer), self.replacement.mlps.get(layer)
            if self.host.post_norm(layer) is not before:
                pairs.append((before, part.norm))
            if mlp is not None:
                pairs.append((self.host.mlp_norm(layer), mlp.norm))
        pairs.append((self.host.final_norm, stream.final_norm))
        frozen = {id(module): (module, norm) for module, norm in pairs if module is not None}
        handles = [
            module.register_forward_hook(partial(_frozen_output, norm))
            for module, norm in frozen.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _frozen_output(norm: FrozenNorm, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A norm's output, its scale frozen."""
    del module
    received = args[0]
    return (norm.share(received.double()) + norm.bias).to(out)


def _probe_of(replacement: LocalReplacement, i: int, lorsas: Sequence[Lorsa], host: Host) -> Probe:
    """The probe of a stage; `lorsas` are those in place, one a layer."""
    stage = replacement.stages[i]
    if isinstance(stage, LorsaStage | AttentionStage):
        lorsa, post = lorsas[stage.layer], host.post_norm(stage.layer)
        if post is None or lorsa.cfg.output_site == "hook_attn_out":
            after = None
        else:
            after = (post, replacement.stream.layers[stage.layer].post_norm)
        if isinstance(stage, LorsaStage):
            return LorsaProbe(stage, lorsa, after)
        return HeadsProbe(stage, lorsa, after)
    assert isinstance(stage, LinearMLP | TranscoderStage)
    return MLPProbe(stage, replacement.mlps[stage.layer])
