"""The scores of one firing, broken down into upstream components times vectors of the basis.

`X[c, k, t]` is what component c, through vector k, adds to the raw score of the query with key t.
On the destination side c is a part of what the query reads, `X = a_ck b_k(t) / attn_scale`; on the
source side a part of what every key reads. On both sides the sum over c and k is the raw score.
Neither side ever holds X: it is summed over keys with given weights, or made row by row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lorsa_lens.singular.components import Component, Firing
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.read_in import ReadIn, Side, read_in
from lorsa_lens.singular.stream import Stream


class Breakdown(ABC):
    """One side of one firing. Terms are numbered component by component, vector by vector."""

    def __init__(
        self, stream: Stream, reading: QKReading, dest: int, *, split_embedding: bool = False
    ) -> None:
        """Take apart what a query, or its keys, read.

        Args:
            stream: the prompt.
            reading: the head on it.
            dest: position of the query.
            split_embedding: tokens and learned positions as two components instead of one.
        """
        self.stream, self.reading, self.dest = stream, reading, dest
        self.layer = reading.head.layer
        self.n_heads = stream.layers[self.layer].pattern.shape[0]
        self.n_vectors = reading.head.basis.G_Q.shape[1]
        causal = reading.head.spec.attention_dir == "causal"
        self.n_sources = dest + 1 if causal else stream.n_pos
        self._writers = list(_whole_writers(stream, self.layer, split_embedding))

    @cached_property
    def components(self) -> list[Component]:
        """Every component, in the order of the terms."""
        heads = [
            Component(layer, "head", head, source)
            for layer in range(self.layer)
            for head in range(self.n_heads)
            for source in range(self.n_sources)
        ]
        return [*heads, *(component for component, _ in self._writers), OFFSET]

    @property
    def raw(self) -> Float[Tensor, " key"]:
        """The raw scores that the terms sum to."""
        return self.reading.raw[self.dest]

    @abstractmethod
    def weighted(self, weights: Float[Tensor, " key"]) -> Float[Tensor, " term"]:
        """Every term, summed over keys with these weights."""

    @abstractmethod
    def part(self, component: int) -> Float[Tensor, "k key"]:
        """All terms of one component, by its number, at every key."""

    def row(self, index: int) -> Float[Tensor, " key"]:
        """One term at every key."""
        component, vector = divmod(index, self.n_vectors)
        return self.part(component)[vector]

    def _reads(self, upstream: int, read: ReadIn) -> Float[Tensor, "head source d_head"]:
        """What the values of a layer's heads say, before pattern, factors and rotation."""
        layer = self.stream.layers[upstream]
        values = layer.values[: self.n_sources]
        return einsum(values, layer.W_out, "s h d, h d m -> h s m") @ read.W

    def _whole_reads(self, read: ReadIn) -> Float[Tensor, "component pos d_head"]:
        """What is not split by source token, and the offset; not rotated yet."""
        written = torch.stack([written for _, written in self._writers])
        shares = written @ read.W * read.factor[:, None]
        shares[-1] += read.shift  # the embedding, or the learned positions
        return torch.cat((shares, read.offset[None]))


class DestBreakdown(Breakdown):
    """What the query reads: `X = a_ck b_k(t) / attn_scale`."""

    @cached_property
    def a(self) -> Float[Tensor, "component k"]:
        """Every component's part of the query, in the basis."""
        dest, read = self.dest, read_in(self.stream, self.reading, "dest")
        parts = []
        for number in range(self.layer):
            layer = self.stream.layers[number]
            factor = layer.pattern[:, dest, : self.n_sources] * layer.out_factor[dest]
            reads = self._reads(number, read) * factor[..., None] * read.factor[dest]
            parts.append(rearrange(reads, "h s d -> (h s) d"))
        parts.append(self._whole_reads(read)[:, dest])
        return self.reading.rotation.at(dest)(torch.cat(parts)) @ self.reading.head.basis.G_Q

    @cached_property
    def _b(self) -> Float[Tensor, "key k"]:
        return self.reading.b / self.reading.head.divisor

    @override
    def weighted(self, weights: Float[Tensor, " key"]) -> Float[Tensor, " term"]:
        return rearrange(self.a * (weights @ self._b), "c k -> (c k)")

    @override
    def part(self, component: int) -> Float[Tensor, "k key"]:
        return self.a[component, :, None] * self._b.mT


class SrcBreakdown(Breakdown):
    """What the keys read, every key at its own position."""

    @cached_property
    def _a(self) -> Float[Tensor, " k"]:
        return self.reading.a[self.dest] / self.reading.head.divisor

    @cached_property
    def _read(self) -> ReadIn:
        return read_in(self.stream, self.reading, "src")

    @cached_property
    def _head_reads(self) -> list[Float[Tensor, "head source d_head"]]:
        return [self._reads(number, self._read) for number in range(self.layer)]

    @cached_property
    def _whole(self) -> Float[Tensor, "component key k"]:
        keys = self.reading.rotation(self._whole_reads(self._read))
        return keys @ self.reading.head.basis.G_K.mT

    def _factor(self, upstream: int) -> Float[Tensor, "head key source"]:
        layer = self.stream.layers[upstream]
        by_key = layer.out_factor * self._read.factor
        return layer.pattern[:, :, : self.n_sources] * by_key[:, None]

    @override
    def weighted(self, weights: Float[Tensor, " key"]) -> Float[Tensor, " term"]:
        # Keys are summed inside the rotation, so nothing of shape [key, source, d_head] exists.
        rotation, parts = self.reading.rotation, []
        for number, reads in enumerate(self._head_reads):
            factor = self._factor(number) * weights[:, None]
            cos, sin = (
                einsum(factor, table, "h t s, t d -> h s d")
                for table in (rotation.cos, rotation.sin)
            )
            keys = reads * cos + rotation.turned(reads) * sin
            parts.append(rearrange(keys, "h s d -> (h s) d") @ self.reading.head.basis.G_K.mT)
        parts.append(einsum(self._whole, weights, "c t k, t -> c k"))
        return rearrange(torch.cat(parts) * self._a, "c k -> (c k)")

    @override
    def part(self, component: int) -> Float[Tensor, "k key"]:
        n_split = self.layer * self.n_heads * self.n_sources
        if component >= n_split:
            return self._whole[component - n_split].mT * self._a[:, None]
        number, head, source = _unraveled(component, self.n_heads, self.n_sources)
        reads = self._head_reads[number][head, source]
        keys = self.reading.rotation(self._factor(number)[head, :, source, None] * reads)
        return (keys @ self.reading.head.basis.G_K.mT * self._a).mT


def break_down(
    stream: Stream, firing: Firing, side: Side, *, split_embedding: bool = False
) -> Breakdown:
    """One side of a firing of an attention head of the host.

    Args:
        stream: the prompt.
        firing: layer, head, query and key.
        side: `dest` (what the query reads) or `src` (what keys read).
        split_embedding: tokens and learned positions as two components instead of one.
    """
    reading = stream.reading(firing.layer, firing.head)
    return SIDES[side](stream, reading, firing.dest, split_embedding=split_embedding)


SIDES: dict[Side, type[Breakdown]] = {"dest": DestBreakdown, "src": SrcBreakdown}

OFFSET = Component(0, "offset")


def _whole_writers(
    stream: Stream, n_layers: int, split_embedding: bool
) -> Iterator[tuple[Component, Float[Tensor, "pos d_model"]]]:
    """What is not split by source token: MLPs, biases, embeddings."""
    for layer in range(n_layers):
        yield Component(layer, "mlp"), stream.layers[layer].mlp_out
        yield Component(layer, "bias"), stream.layers[layer].bias_out
    if split_embedding:
        yield Component(0, "token"), stream.token_embedding
        yield Component(0, "position"), stream.position_embedding
    else:
        yield Component(0, "embedding"), stream.embedding


def _unraveled(component: int, n_heads: int, n_sources: int) -> tuple[int, int, int]:
    """Layer, head and source of a component that is a head."""
    rest, source = divmod(component, n_sources)
    layer, head = divmod(rest, n_heads)
    return layer, head, source
