"""What watches and holds the nodes of one stage while the prompt is run again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.circuits.attention_stages import AttentionStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.stages import Stage
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.frozen_norm import FrozenNorm

Hooks = list[tuple[str, Any]]
After = tuple[nn.Module, FrozenNorm] | None
"""A norm between what is replaced and the stream: the module, and what it is on the prompt."""


class Probe(ABC):
    """Holds and measures one stage's nodes in a run of the host."""

    stage: Stage
    edits: Mapping[Node, float]
    live: bool
    direct: bool

    def begin(self, edits: Mapping[Node, float], *, live: bool, direct: bool) -> None:
        """Set what the next run does."""
        self.live, self.direct = live, direct
        self.edits = {node: value for node, value in edits.items() if node in self._place}

    @property
    def _place(self) -> dict[Node, int]:
        if not hasattr(self, "_places"):
            self._places = {node: i for i, node in enumerate(self.stage.writers.nodes)}
        return self._places

    @property
    @abstractmethod
    def writes_at(self) -> str:
        """The hook point of what it writes to the stream."""

    @abstractmethod
    def base_hooks(self) -> Hooks:
        """Hooks that note, in a run that is exact, what may be frozen."""

    @abstractmethod
    def hooks(self) -> Hooks:
        """Hooks that hold and measure."""

    @abstractmethod
    def pre_activations(self) -> Float[Tensor, " writer"]:
        """What was measured in the last run; 0 for leaves."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What must be in place besides hooks."""
        yield

    def _leaves(self, out: Tensor, kinds: Sequence[str] = ("bias", "error")) -> Tensor:
        """What is written to the stream, with nodes that write one vector held."""
        change = torch.zeros_like(out[0], dtype=torch.float64)
        for node, value in self.edits.items():
            if node.kind in kinds:
                place = self._place[node]
                scale = value / self.stage.writers.activations[place] - 1
                change[node.pos] += self.stage.writers.vectors[place] * scale
        return out + change.to(out)[None]

    def _units(self) -> tuple[list[int], list[Node]]:
        """Places and nodes of what reads."""
        return list(self.stage.units.values()), list(self.stage.units)


class AttentionProbe(Probe):
    """Attention through hook points of the Lorsa in its place."""

    def __init__(self, stage: Stage, lorsa: Lorsa, after: After) -> None:
        self.stage, self.lorsa, self.after = stage, lorsa, after
        self.prefix = f"blocks.{stage.layer}.attn.lorsa."
        self.base: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    @property
    @override
    def writes_at(self) -> str:
        return f"blocks.{self.stage.layer}.hook_attn_out"

    @override
    def base_hooks(self) -> Hooks:
        def note(name: str) -> tuple[str, Any]:
            def hook(tensor: Tensor, hook: Any) -> None:
                del hook
                self.base[name] = tensor.detach().clone()

            return self.prefix + name, hook

        return [
            note(name) for name in ("hook_pattern", "hook_values", "hook_acts_post", "hook_error")
        ]

    @override
    def hooks(self) -> Hooks:
        names = ("hook_pattern", "hook_values", "hook_acts_pre", "hook_acts_post", "hook_recons")
        hooks: Hooks = [(self.prefix + name, getattr(self, name)) for name in names]
        return [*hooks, (self.writes_at, self.hook_attn_out)]

    def hook_pattern(self, pattern: Tensor, hook: Any) -> Tensor:
        """Holds the pattern where it is frozen."""
        del hook
        self.seen["pattern"] = pattern if self.live else self.base["hook_pattern"]
        return self.seen["pattern"]

    def hook_values(self, values: Tensor, hook: Any) -> None:
        """Notes values."""
        del hook
        self.seen["values"] = values

    def hook_acts_pre(self, acts: Tensor, hook: Any) -> None:
        """Notes activations before selection."""
        del hook
        self.seen["pre"] = acts

    def hook_acts_post(self, acts: Tensor, hook: Any) -> Tensor:
        """Holds the selection, activations of nodes, or all of them."""
        del hook
        base = self.base["hook_acts_post"]
        if self.direct and self._has_units():
            acts = base.clone()
        elif not self.live:
            acts = self.seen["pre"] * (base != 0)
        return self._held(acts.clone())

    def hook_recons(self, out: Tensor, hook: Any) -> Tensor:
        """Adds the error of the prompt."""
        del hook
        return out + self.base["hook_error"].to(out)

    def hook_attn_out(self, out: Tensor, hook: Any) -> Tensor:
        """Holds biases and errors, and the scale of a norm after attention where it is frozen."""
        del hook
        if self.after is not None and not self.live:
            norm = self.after[1]
            out = (norm.share(self.seen["returned"].double()) + norm.bias).to(out)
        return self._leaves(out)

    @override
    @contextmanager
    def watching(self) -> Iterator[None]:
        if self.after is None:
            yield
            return

        def note(module: nn.Module, args: Any) -> None:
            del module
            self.seen["returned"] = args[0]

        handle = self.after[0].register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _has_units(self) -> bool:
        return True

    @abstractmethod
    def _held(self, acts: Tensor) -> Tensor: ...


class LorsaProbe(AttentionProbe):
    """The heads of a Lorsa."""

    @override
    def _held(self, acts: Tensor) -> Tensor:
        for node, value in self.edits.items():
            if node.kind == "head":
                acts[0, node.pos, node.index] = value
        return acts

    @override
    def pre_activations(self) -> Float[Tensor, " writer"]:
        out = torch.zeros_like(self.stage.writers.activations)
        places, nodes = self._units()
        at = [node.pos for node in nodes]
        out[places] = self.seen["pre"][0, at, [node.index for node in nodes]].double()
        return out


class HeadsProbe(AttentionProbe):
    """A layer's own heads, through its exact lift: one rank-1 head per dimension of a head.

    The lift writes the bias of values as part of its own bias; a head node has it in what it
    writes, so it is added here.
    """

    stage: AttentionStage

    def __init__(self, stage: AttentionStage, lorsa: Lorsa, after: After) -> None:
        super().__init__(stage, lorsa, after)
        self.b_V = stage.part.weights.b_V.double()

    @override
    def _has_units(self) -> bool:
        return self.stage.attention != "frozen"

    def _parts(self, pattern: Tensor, values: Tensor) -> Float[Tensor, "unit d_head"]:
        """What each head node mixes, biases of values included."""
        _, nodes = self._units()
        heads, queries = [node.index for node in nodes], [node.pos for node in nodes]
        n_heads = len(self.b_V)
        by_head = rearrange(values[0].double(), "k (h d) -> h k d", h=n_heads) + self.b_V[:, None]
        weights = pattern[0].double()[heads, queries]
        only = torch.ones_like(weights)
        for row, node in zip(only, nodes, strict=True):
            if node.source is not None:
                row.zero_()[node.source] = 1.0
        return torch.einsum("nk,nkd->nd", weights * only, by_head[heads])

    @override
    def _held(self, acts: Tensor) -> Tensor:
        _, nodes = self._units()
        if not any(node in self.edits for node in nodes):
            return acts
        d_head = self.b_V.shape[1]
        base = self._parts(self.base["hook_pattern"], self.base["hook_values"])
        now = base if self.direct else self._parts(self.seen["pattern"], self.seen["values"])
        activations = self.stage.writers.activations
        for row, node in enumerate(nodes):
            if node in self.edits:
                scale = self.edits[node] / activations[self._place[node]]
                at = slice(node.index * d_head, (node.index + 1) * d_head)
                acts[0, node.pos, at] += (scale * base[row] - now[row]).to(acts)
        return acts

    @override
    def pre_activations(self) -> Float[Tensor, " writer"]:
        out = torch.zeros_like(self.stage.writers.activations)
        places, nodes = self._units()
        if nodes:
            part = self.stage.part
            mixed = self._parts(self.seen["pattern"], self.seen["values"])
            unit = self.stage.writers.vectors[places]
            unit = unit / self.stage.writers.activations[places, None]
            at = [node.pos for node in nodes]
            written = torch.einsum("nd,ndm->nm", mixed, part.W_out[[n.index for n in nodes]])
            out[places] = (written * unit).sum(1) * part.out_factor[at]
        return out
