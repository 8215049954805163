"""The cumulative method: singular vectors of the augmented form (SAD, arXiv 2410.00340).

`Omega = [W_Q; b_Q] [W_K; b_K]^T` acts on inputs with a 1 appended, so that biases are inside it. It
exists only where queries and keys are not rotated. Kept as published, to compare with: the appended
1 counts for every head, the other side's magnitude is not used, and only heads are candidates, so
contributions do not sum to the score. For work use `Greedy`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lorsa_lens.singular.basis import HeadBasis, head_basis
from lorsa_lens.singular.components import Component, Firing
from lorsa_lens.singular.graph import Edge, firing_node, node_of
from lorsa_lens.singular.method import Method
from lorsa_lens.singular.qk_head import QKHead
from lorsa_lens.singular.read_in import Side
from lorsa_lens.singular.relative import TRACE_SHARE, above_share
from lorsa_lens.singular.selection import select_cumulative
from lorsa_lens.singular.stream import Stream

FIRES_FROM = 0.5
"""Attention weight from which a head counts as firing."""


@lru_cache(maxsize=256)
def augmented_basis(head: QKHead) -> HeadBasis:
    """The basis of the augmented form; `U` and `V` have d_model + 1 entries.

    Raises:
        ValueError: if the head rotates its queries, or normalizes them: then it has no such form.
    """
    spec = head.spec
    if spec.positional_embedding_type == "rotary" or spec.qk_norm is not None:
        raise ValueError(
            f"{head.name} rotates or normalizes queries and keys, so it has no augmented form "
            "(arXiv 2410.00340 is about learned positions): use Greedy or Relative"
        )
    query, key = head.query, head.key
    return head_basis(torch.cat((query.W, query.b[None])), torch.cat((key.W, key.b[None])))


class AugmentedFiring:
    """One firing in terms of the augmented form."""

    def __init__(self, stream: Stream, firing: Firing) -> None:
        self.stream, self.firing = stream, firing
        self.reading = stream.reading(firing.layer, firing.head)
        self.basis = augmented_basis(self.reading.head)

    @property
    def terms(self) -> Float[Tensor, " k"]:
        """What each singular vector adds to the score, not divided by the attention scale."""
        query, key = self.reading.q[self.firing.dest], self.reading.k[self.firing.src]
        return (query @ self.basis.G_Q) * (self.basis.G_K @ key)

    def upstream(self, side: Side, vectors: list[int]) -> Float[Tensor, "layer head"]:
        """The published contribution of every head of the layers below."""
        position = self.firing.dest if side == "dest" else self.firing.src
        signs = (self.reading.q[self.firing.dest] @ self.basis.G_Q).sign() * self.basis.S.sqrt()
        directions = self.basis.U if side == "dest" else self.basis.V
        read = directions[:, vectors] @ signs[vectors]
        norm = self.stream.layers[self.firing.layer].norm
        along = norm.into(read[:-1, None])[:, 0] / norm.scale[position]
        rows = []
        for number in range(self.firing.layer):
            layer = self.stream.layers[number]
            z = einsum(layer.pattern[:, position], layer.values, "h k, k h d -> h d")
            written = einsum(z, layer.W_out, "h d, h d m -> h m") * layer.out_factor[position]
            rows.append(written @ along + read[-1] / norm.scale[position])
        return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class Cumulative(Method):
    """Explain a score by the largest terms that make it up, and these by the heads behind them."""

    name: ClassVar[str] = "cumulative"

    @override
    def strong(self, stream: Stream, firing: Firing) -> bool:
        reading = stream.reading(firing.layer, firing.head)
        pattern = stream.layers[firing.layer].pattern
        weight = pattern[firing.head, firing.dest, firing.src].item()
        positive = reading.raw[firing.dest, firing.src].item() >= 0
        return weight >= FIRES_FROM and positive and firing.src >= 1

    @override
    def explain(self, stream: Stream, firing: Firing) -> list[Edge]:
        augmented, edges = AugmentedFiring(stream, firing), []
        vectors = select_cumulative(augmented.terms)
        if not vectors:
            return []
        sides: tuple[Side, Side] = ("dest", "src")
        for side in sides:
            position = firing.dest if side == "dest" else firing.src
            contributions = augmented.upstream(side, vectors)
            for index in above_share(contributions.flatten(), TRACE_SHARE):
                layer, head = divmod(index, contributions.shape[1])
                source = _fires_at(stream, layer, head, position)
                edge = Edge(
                    up=node_of(Component(layer, "head", head, source), position),
                    down=firing_node(firing),
                    side=side,
                    weight=contributions[layer, head].item(),
                    vectors=tuple(vectors),
                )
                edges.append(edge)
        return edges


def _fires_at(stream: Stream, layer: int, head: int, dest: int) -> int | None:
    """The token that a head attends to with more than half its weight; there is one at most."""
    weight, source = stream.layers[layer].pattern[head, dest].max(dim=-1)
    return int(source) if weight.item() >= FIRES_FROM else None
