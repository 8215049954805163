"""The relative method: singular vectors of relative attention (ACC).

From "Pinpointing Attention-Causal Communication in Language Models" (NeurIPS 2025). Relative
attention is the raw score of one key less the mean over the others. Each side has a basis of its
own, with the bias of the other side kept: `Omega_d = W_Q R [W_K^T | b_K]` and
`Omega_s = [W_Q^T | b_Q]^T R W_K^T`, where R is the rotation between the two tokens. Scores are not
divided by the attention scale, and a cap on them is passed over.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lorsa_lens.singular.basis import low_rank_svd
from lorsa_lens.singular.components import Component, Firing
from lorsa_lens.singular.graph import Edge, firing_node, node_of
from lorsa_lens.singular.method import Method, n_keys
from lorsa_lens.singular.read_in import Side
from lorsa_lens.singular.selection import select_relative
from lorsa_lens.singular.stream import Stream

TRACE_SHARE = 0.7
"""Components are kept down to that with which their sum exceeds this share of the whole."""


class RelativeFiring:
    """Both sides of one firing, in terms of relative attention."""

    def __init__(self, stream: Stream, firing: Firing) -> None:
        self.stream, self.firing = stream, firing
        self.layer = stream.layers[firing.layer]
        self.reading = reading = stream.reading(firing.layer, firing.head)
        self.W_Q, b_Q = reading.head.query.effective
        self.W_K, b_K = reading.head.key.effective
        rotate_d, rotate_s = reading.rotation.at(firing.dest), reading.rotation.at(firing.src)
        q_factor, k_factor = reading.q_factor[firing.dest], reading.k_factor[firing.src]
        self._left = rotate_d(self.W_Q * q_factor)
        self._left_bias = rotate_d(b_Q * q_factor)
        self._right = rotate_s(self.W_K * k_factor)
        self._right_bias = rotate_s(b_K * k_factor)

    @cached_property
    def key_weights(self) -> Float[Tensor, " key"]:
        """Relative attention as weights of keys: 1 at the source, minus a share elsewhere."""
        visible = self.reading.visible[self.firing.dest].double()
        weights = -visible / max(1.0, visible.sum().item() - 1)
        weights[self.firing.src] = 1
        return weights

    @cached_property
    def bases(self) -> tuple[Float[Tensor, "d_model k"], Float[Tensor, "d_model k"]]:
        """Left vectors of `Omega_d` and right vectors of `Omega_s`, strongest first."""
        U, _, _ = low_rank_svd(self._left, torch.cat((self._right, self._right_bias[None])))
        _, _, V = low_rank_svd(torch.cat((self._left, self._left_bias[None])), self._right)
        return U, V

    @cached_property
    def dest_read(self) -> Float[Tensor, " d_model"]:
        """What relative attention reads of the destination's input."""
        return self._left @ (self.key_weights @ self.reading.k)

    @cached_property
    def src_reads(self) -> Float[Tensor, "key d_model"]:
        """What the score with each key reads of that key's input."""
        reading, dest = self.reading, self.firing.dest
        queries = reading.rotation.transposed(reading.q[dest].expand_as(reading.k))
        return (queries * reading.k_factor[:, None]) @ self.W_K.mT

    def contributions(self, side: Side) -> Float[Tensor, " k"]:
        """What each singular vector adds to relative attention."""
        U, V = self.bases
        x = self.layer.qk_input
        if side == "dest":
            return (x[self.firing.dest] @ U) * (self.dest_read @ U)
        return self.key_weights @ ((self.src_reads @ V) * (x @ V))

    def upstream(
        self, side: Side, vectors: list[int]
    ) -> tuple[list[Component], Float[Tensor, " component"]]:
        """What upstream components add to relative attention through chosen vectors."""
        U, V = self.bases
        if side == "dest":
            P, dest = U[:, vectors], self.firing.dest
            reads = torch.zeros_like(self.layer.x)
            reads[dest] = P @ (P.mT @ self.dest_read)
            return self._written(reads)
        P = V[:, vectors]
        return self._written(self.key_weights[:, None] * (self.src_reads @ P) @ P.mT)

    def _written(
        self, reads: Float[Tensor, "pos d_model"]
    ) -> tuple[list[Component], Float[Tensor, " component"]]:
        """What components write along a direction of each position's input, summed."""
        norm = self.layer.norm
        reads = norm.into(reads.mT).mT / norm.scale[:, None]
        n_sources = self.firing.dest + 1
        components, values = [], []
        for number in range(self.firing.layer):
            layer = self.stream.layers[number]
            by_head = einsum(layer.W_out, reads, "h d m, t m -> h t d") * layer.out_factor[:, None]
            sources = layer.values[:n_sources]
            products = einsum(by_head, sources, "h t d, s h d -> h t s")
            heads = (products * layer.pattern[:, :, :n_sources]).sum(1)
            values.append(rearrange(heads, "h s -> (h s)"))
            pairs = [(head, source) for head in range(len(heads)) for source in range(n_sources)]
            components += [Component(number, "head", *pair) for pair in pairs]
            components += [Component(number, "mlp"), Component(number, "bias")]
            whole = torch.stack((layer.mlp_out, layer.bias_out))
            values.append((whole * reads).sum((1, 2)))
        components.append(Component(0, "embedding"))
        values.append((self.stream.embedding * reads).sum()[None])
        return components, torch.cat(values)


@dataclass(frozen=True, kw_only=True)
class Relative(Method):
    """Explain relative attention by the vectors, then by the components, that make it up."""

    name: ClassVar[str] = "relative"

    @override
    def strong(self, stream: Stream, firing: Firing) -> bool:
        weight = stream.layers[firing.layer].pattern[firing.head, firing.dest, firing.src]
        return weight.item() >= 1 / n_keys(stream, firing)

    @override
    def explain(self, stream: Stream, firing: Firing) -> list[Edge]:
        relative, edges = RelativeFiring(stream, firing), []
        sides: tuple[Side, Side] = ("dest", "src")
        for side in sides:
            position = firing.dest if side == "dest" else firing.src
            vectors = select_relative(relative.contributions(side))
            if not vectors:
                continue
            components, values = relative.upstream(side, vectors)
            for index in above_share(values, TRACE_SHARE):
                component = components[index]
                if component.source is not None and component.source > position:
                    continue
                edge = Edge(
                    up=node_of(component, position),
                    down=firing_node(firing),
                    side=side,
                    weight=values[index].item(),
                    vectors=tuple(vectors),
                )
                edges.append(edge)
        return edges


def above_share(values: Float[Tensor, " n"], share: float) -> list[int]:
    """Indices of all values down to that with which their sum exceeds a share of the whole.

    None if the whole is not positive.
    """
    total = values.sum()
    if not bool(total > 0):
        return []
    ordered = values.sort(descending=True).values
    cut = ordered[int((ordered.cumsum(0) > share * total).int().argmax())]
    return (values >= cut).nonzero()[:, 0].tolist()
