"""The parts of a local replacement model: what each reads of the stream, and what it writes.

A stage is one module on one prompt, with everything frozen that is not linear. Its nodes write
vectors to the residual stream; its units (heads, features, MLPs) also read the stream, linearly.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lorsa_lens.circuits.graph import Kind, Module, Node
from lorsa_lens.singular.frozen_norm import FrozenNorm
from lorsa_lens.singular.stream import Stream

Change = Float[Tensor, "pos d_model"]
"""A change of what the stream holds, or of what is written to it."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Writers:
    """Nodes of one stage, sorted by position, and what each writes."""

    nodes: tuple[Node, ...]
    vectors: Float[Tensor, "writer d_model"]
    """What it writes to the stream, at its activation."""
    activations: Float[Tensor, " writer"]
    n_pos: int

    @cached_property
    def pos(self) -> Int[Tensor, " writer"]:
        """Where each writes."""
        return torch.tensor([node.pos for node in self.nodes], dtype=torch.long)

    @cached_property
    def _starts(self) -> list[int]:
        edges = torch.arange(self.n_pos + 1)
        return [int(start) for start in torch.searchsorted(self.pos, edges)]

    def effects(self, c: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row writer"]:
        """What linear functionals of the stream read of each writer."""
        parts = [
            c[:, pos] @ self.vectors[start:stop].mT
            for pos, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False))
            if stop > start
        ]
        return torch.cat(parts, dim=1) if parts else c.new_zeros(len(c), 0)

    def total(self, scale: Float[Tensor, " writer"] | None = None) -> Change:
        """What all of them write together, each times its `scale`."""
        vectors = self.vectors if scale is None else self.vectors * scale[:, None]
        out = vectors.new_zeros(self.n_pos, vectors.shape[1])
        return out.index_add(0, self.pos, vectors)


def writers_of(
    parts: Sequence[tuple[Sequence[Node], Float[Tensor, "_ d_model"], Tensor | None]],
    n_pos: int,
) -> Writers:
    """Writers of several kinds, sorted.

    Args:
        parts: nodes, what they write, and their activations (None: the norms of that). Those that
            write nothing are left out.
        n_pos: tokens of the prompt.
    """
    nodes = [node for part, _, _ in parts for node in part]
    vectors = torch.cat([vectors for _, vectors, _ in parts])
    norms = vectors.norm(dim=1)
    given = [norms.new_zeros(0)]
    start = 0
    for part, _, activations in parts:
        stop = start + len(part)
        given.append(norms[start:stop] if activations is None else activations)
        start = stop
    live = norms > 0
    order = sorted(
        (i for i in range(len(nodes)) if live[i]), key=lambda i: (nodes[i].pos, nodes[i].order)
    )
    return Writers(
        nodes=tuple(nodes[i] for i in order),
        vectors=vectors[order],
        activations=torch.cat(given)[order],
        n_pos=n_pos,
    )


def leaves(kind: Kind, layer: int, n_pos: int, module: Module) -> list[Node]:
    """A bias or error node at every position."""
    return [Node(kind, layer, pos, module=module) for pos in range(n_pos)]


class Reading(NamedTuple):
    """What some nodes read of the residual stream."""

    cotangents: Float[Tensor, "target pos d_model"]
    """The stream's part in each pre-activation is `(cotangent * stream).sum()`."""
    constants: Float[Tensor, " target"]
    """The rest of it."""
    pre_activations: Float[Tensor, " target"]


class Stage(ABC):
    """One module of the local replacement model."""

    writers: Writers
    reads_after: int = -1
    """Index of the last stage whose writing this one reads."""
    layer: int

    @cached_property
    def units(self) -> dict[Node, int]:
        """Nodes that read, with their places among the writers."""
        return {node: i for i, node in enumerate(self.writers.nodes) if not node.is_leaf}

    @abstractmethod
    def read(self, nodes: Sequence[Node]) -> Reading:
        """What these units read."""

    def pull(self, c: Float[Tensor, "row pos d_model"]) -> Tensor | None:
        """What passes through without being a node, backwards: None where nothing does.

        Args:
            c: functionals of the stream after this stage.

        Returns:
            What is to be added to them, before this stage.
        """
        del c
        return None

    @abstractmethod
    def respond(self, change: Change) -> tuple[Float[Tensor, " writer"], Change]:
        """How this stage answers a change of the stream that it reads, all frozen.

        Returns:
            For each writer the change of its activation (of leaves 0), and the change of all that
            is written.
        """

    def own_answer(self, place: int, change: Change) -> Float[Tensor, " d_model"]:
        """The part of one writer in what `respond` says is written."""
        answers, _ = self.respond(change)
        return self.writers.vectors[place] * (answers[place] / self.writers.activations[place])

    def _answers(
        self, units: Sequence[int], changes: Tensor
    ) -> tuple[Float[Tensor, " writer"], Change]:
        """`respond`, given by how much the activations of units change that write one direction."""
        activations = self.writers.activations
        out = torch.zeros_like(activations)
        out[list(units)] = changes
        # A unit whose activation is 0 is no writer, so this divides by none.
        scale = torch.where(out == 0, out, out / activations)
        return out, self.writers.total(scale)


class Embedding(Stage):
    """What tokens and learned positions write before the first layer."""

    def __init__(self, stream: Stream) -> None:
        ids = stream.tokens.tolist()
        n_pos = stream.n_pos
        self.layer = -1
        tokens = [Node("token", -1, pos, ids[pos]) for pos in range(n_pos)]
        positions = [Node("position", -1, pos) for pos in range(n_pos)]
        self.writers = writers_of(
            [(tokens, stream.token_embedding, None), (positions, stream.position_embedding, None)],
            n_pos,
        )

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        raise ValueError("tokens and positions read nothing")

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        return torch.zeros_like(self.writers.activations), torch.zeros_like(change)


def unfolded(
    norm: FrozenNorm, gain: Float[Tensor, " d_model"], bias: Float[Tensor, " d_model"]
) -> FrozenNorm:
    """A norm without an affine part that it ends in."""
    gain, bias = gain.double(), bias.double()
    return replace(norm, gain=norm.gain / gain, bias=(norm.bias - bias) / gain)
