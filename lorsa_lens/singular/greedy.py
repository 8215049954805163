"""The greedy method: components times singular vectors, removed until the head lets go (ACC++).

From "Finding (Highly) Interpretable Prompt-Specific Circuits", arXiv 2602.13483.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from lorsa_lens.singular.breakdown import SIDES, Breakdown
from lorsa_lens.singular.components import Component, Firing
from lorsa_lens.singular.graph import Edge, firing_node, node_of
from lorsa_lens.singular.method import Method, n_keys
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.read_in import Side
from lorsa_lens.singular.selection import Removal, Softmax, attention_threshold, select_greedy
from lorsa_lens.singular.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What one side of a firing owes to whom."""

    side: Side
    removal: Removal
    vectors: dict[Component, tuple[int, ...]]
    """Singular vectors of each component, in the order of their removal."""
    weights: dict[Component, float]
    """By how much the attention weight fell while they were removed."""


@dataclass(frozen=True, kw_only=True)
class Greedy(Method):
    """Remove the terms that carry the attention weight until it is below a threshold.

    The threshold is 2.5 times uniform attention, at most 1.
    """

    name: ClassVar[str] = "greedy"

    ignore_cap: bool = False
    """Run on uncapped scores where the model caps them, as the published program does."""

    split_embedding: bool = False
    """Tokens and learned positions as two components instead of one."""

    @override
    def strong(self, stream: Stream, firing: Firing) -> bool:
        weight = stream.layers[firing.layer].pattern[firing.head, firing.dest, firing.src]
        return weight.item() >= attention_threshold(n_keys(stream, firing))

    @override
    def explain(self, stream: Stream, firing: Firing) -> list[Edge]:
        reading, edges = stream.reading(firing.layer, firing.head), []
        for side in SIDES:
            position = firing.dest if side == "dest" else firing.src
            explanation = self.explain_side(stream, reading, firing.dest, firing.src, side)
            for component, vectors in explanation.vectors.items():
                if component.source is not None and component.source > position:
                    continue  # it acts through other keys only
                edge = Edge(
                    up=node_of(component, position),
                    down=firing_node(firing),
                    side=side,
                    weight=explanation.weights[component],
                    vectors=vectors,
                )
                edges.append(edge)
        return edges

    def explain_side(
        self, stream: Stream, reading: QKReading, dest: int, src: int, side: Side
    ) -> Explanation:
        """One side of the attention of any head, of the host or of a Lorsa.

        Args:
            stream: the prompt.
            reading: the head on it.
            dest: position of the query.
            src: position of the key.
            side: which side.
        """
        terms = self.terms(stream, reading, dest, side)
        removal = select_greedy(
            terms,
            terms.raw,
            self.softmax(reading, dest, src),
            threshold=attention_threshold(int(reading.visible[dest].sum())),
            weight=reading.pattern[dest, src].item(),
        )
        vectors: dict[Component, tuple[int, ...]] = {}
        weights: dict[Component, float] = {}
        for index, drop in zip(removal.indices, removal.drops, strict=True):
            number, vector = divmod(index, terms.n_vectors)
            component = terms.components[number]
            vectors[component] = (*vectors.get(component, ()), vector)
            weights[component] = weights.get(component, 0.0) + drop
        return Explanation(side=side, removal=removal, vectors=vectors, weights=weights)

    def terms(self, stream: Stream, reading: QKReading, dest: int, side: Side) -> Breakdown:
        """The terms of one side."""
        return SIDES[side](stream, reading, dest, split_embedding=self.split_embedding)

    def softmax(self, reading: QKReading, dest: int, src: int) -> Softmax:
        """From raw scores to the attention weight."""
        bias = reading.bias[dest].masked_fill(~reading.visible[dest], -torch.inf)
        cap = None if self.ignore_cap else reading.head.spec.attn_scores_soft_cap
        return Softmax(source=src, bias=bias, cap=cap)
