"""Attention on a prompt with its pattern frozen: a Lorsa, or the layer's own heads."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.stages import Change, Reading, Stage, leaves, unfolded, writers_of
from lorsa_lens.hosts import InputNorm
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.frozen_norm import no_norm
from lorsa_lens.singular.stream import LayerStream, Stream
from lorsa_lens.site import reads_normalized

Attention = Literal["frozen", "heads", "heads_by_source"]
"""What becomes of layers without a Lorsa: no nodes (edges pass), a node for each head and token,
or one for each head, token and source token."""


class LorsaStage(Stage):
    """The heads of a Lorsa that stay, its bias, and what it misses.

    With the pattern A and the set of heads that stay frozen (arXiv 2504.20938, section 3)

        z[q] = sum_k A[q, k] (w_V . norm(stream)[k] + b_V)
    """

    def __init__(
        self, lorsa: Lorsa, layer: int, stream: Stream, input_norm: InputNorm | None
    ) -> None:
        part = stream.layers[layer]
        self.layer, self.lorsa = layer, lorsa
        self.norm = part.norm
        if input_norm is not None and reads_normalized(lorsa):
            self.norm = unfolded(part.norm, *input_norm)
        # The Lorsa may replace what comes after the norm after attention.
        after = lorsa.cfg.output_site == "hook_attn_out"
        self.post = no_norm(part.attn_out) if after else part.post_norm
        self._encode(part, stream)

    @torch.no_grad()
    def _encode(self, part: LayerStream, stream: Stream) -> None:
        double = copy.deepcopy(self.lorsa).double().eval()
        double.reset_hooks(including_permanent=True)
        x = self.norm.share(part.resid_pre) + self.norm.bias
        shift = part.qk_positions
        if shift is not None and self.norm is not part.norm:
            shift = shift * part.norm.gain / self.norm.gain
        context = {
            "qk_input": None if shift is None else (x + shift)[None],
            "positions": stream.positions[None],
            "keep": None if part.keep is None else part.keep[None],
        }
        code = double.encode(x[None], **context)
        at, slot = code.values[0].nonzero(as_tuple=True)
        self.query, self.head = at, code.indices[0].expand(len(x), -1)[at, slot]
        self.z = code.values[0][at, slot]
        circuits, self.circuit = (self.head // double.cfg.group_size).unique(return_inverse=True)
        self.circuits = {int(circuit): i for i, circuit in enumerate(circuits)}
        self.pattern = double.pattern(x[None], circuits.tolist(), **context)[0]
        self.W_V, self.b_V = double.W_V[self.head], double.b_V[self.head]
        self._write(part, double)
        self.places = [self.units[node] for node in self.nodes]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        mixed = einsum(self.pattern[self.circuit, self.query], x, "n k, k m -> n m")
        seen = self.pattern[self.circuit, self.query].sum(1)
        self.pre = (mixed * self.W_V).sum(1) + seen * self.b_V
        if not torch.allclose(self.pre, self.z, rtol=1e-6, atol=1e-9):
            raise ValueError(
                f"layer {self.layer}: the Lorsa's activations are not those it selects"
            )

    def _write(self, part: LayerStream, double: Lorsa) -> None:
        n_pos = len(part.resid_pre)
        self.nodes = [
            Node("head", self.layer, pos, head)
            for pos, head in zip(self.query.tolist(), self.head.tolist(), strict=True)
        ]
        written = self.post.share(self.z[:, None] * double.W_O[self.head], self.query)
        bias = self.post.share(double.b_O.expand(n_pos, -1)) + self.post.bias
        error = part.attn_out - bias
        error = error.index_add(0, self.query, -written)
        self.writers = writers_of(
            [
                (self.nodes, written, self.z),
                (leaves("bias", self.layer, n_pos, "attn"), bias, None),
                (leaves("error", self.layer, n_pos, "attn"), error, None),
            ],
            n_pos,
        )
        live = set(self.writers.nodes)  # without heads that write nothing
        keep = [i for i, node in enumerate(self.nodes) if node in live]
        self.nodes = [self.nodes[i] for i in keep]
        for name in ("query", "head", "z", "circuit", "W_V", "b_V"):
            setattr(self, name, getattr(self, name)[keep])

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        chosen = [self.place[node] for node in nodes]
        pattern = self.pattern[self.circuit[chosen], self.query[chosen]]
        W_V, b_V = self.W_V[chosen], self.b_V[chosen]
        c = self.norm.pull(pattern[:, :, None] * W_V[:, None, :])
        constants = pattern.sum(1) * (W_V @ self.norm.bias + b_V)
        return Reading(c, constants, self.pre[chosen])

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        pattern = self.pattern[self.circuit, self.query]
        mixed = pattern @ self.norm.share(change)
        return self._answers(self.places, (mixed * self.W_V).sum(1))


class AttentionStage(Stage):
    """A layer's own attention: frozen and passed through, or its heads as nodes.

    Its bias nodes write the biases of values and output, and the rounding of the host.
    """

    def __init__(self, layer: int, stream: Stream, attention: Attention) -> None:
        part = stream.layers[layer]
        self.layer, self.part, self.norm = layer, part, part.norm
        self.attention = attention
        self.W_V = part.weights.W_V.double()
        n_pos = stream.n_pos
        nodes = self._candidates()
        written = self._vectors(part.values)
        bias = part.attn_out.index_add(
            0, torch.tensor([node.pos for node in nodes], dtype=torch.long), -written
        )
        if attention == "frozen":
            bias = bias - self._mix(self._values(self.norm.share(part.resid_pre)))
        parts = [(nodes, written, None), (leaves("bias", layer, n_pos, "attn"), bias, None)]
        self.writers = writers_of(parts, n_pos)
        self._live = [i for i, node in enumerate(nodes) if node in self.units]
        self._places = [self.units[nodes[i]] for i in self._live]

    def _candidates(self) -> list[Node]:
        n_heads, n_pos = self.part.pattern.shape[:2]
        if self.attention == "frozen":
            return []
        if self.attention == "heads":
            places = [(q, h, None) for q in range(n_pos) for h in range(n_heads)]
        else:
            seen = rearrange(self.part.pattern, "h q k -> q h k").nonzero()
            places = [tuple(place) for place in seen.tolist()]
        return [Node("attention_head", self.layer, q, h, k) for q, h, k in places]

    def _vectors(self, values: Float[Tensor, "key head d_head"]) -> Float[Tensor, "node d_model"]:
        """What the nodes write of such values."""
        part = self.part
        if self.attention == "frozen":
            return values.new_zeros(0, part.W_out.shape[-1])
        pattern = part.pattern * part.out_factor[:, None]
        if self.attention == "heads":
            z = einsum(pattern, values, "h q k, k h d -> q h d")
            return rearrange(einsum(z, part.W_out, "q h d, h d m -> q h m"), "q h m -> (q h) m")
        by_query = rearrange(pattern, "h q k -> q h k")
        q, h, k = rearrange(part.pattern, "h q k -> q h k").nonzero(as_tuple=True)
        moved = einsum(values, part.W_out, "k h d, h d m -> k h m")
        return by_query[q, h, k][:, None] * moved[k, h]

    def _values(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos head d_head"]:
        return einsum(x, self.W_V, "k m, h m d -> k h d")

    def _mix(self, values: Float[Tensor, "key head d_head"]) -> Change:
        """What all heads write of such values."""
        part = self.part
        z = einsum(part.pattern, values, "h q k, k h d -> q h d")
        return part.out_factor[:, None] * einsum(z, part.W_out, "q h d, h d m -> q m")

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        part = self.part
        places = [self.units[node] for node in nodes]
        norms = self.writers.activations[places]
        unit = self.writers.vectors[places] / norms[:, None]
        heads = [node.index for node in nodes]
        queries = self.writers.pos[places]
        pattern = part.pattern[heads, queries] * part.out_factor[queries, None]
        for row, node in zip(pattern, nodes, strict=True):
            if node.source is not None:
                only = row[node.source].clone()
                row.zero_()[node.source] = only
        values = einsum(unit, part.W_out[heads], "n m, n d m -> n d")
        c = einsum(values, self.W_V[heads], "n d, n m d -> n m")
        cotangents = self.norm.pull(pattern[:, :, None] * c[:, None, :])
        b_V = part.weights.b_V.double()[heads]
        constants = pattern.sum(1) * (c @ self.norm.bias + (values * b_V).sum(1))
        return Reading(cotangents, constants, norms)

    def by_head(self, c: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row head pos d_model"]:
        """Functionals of what each head writes, as functionals of the stream before the layer."""
        part = self.part
        values = einsum(c * part.out_factor[:, None], part.W_out, "b q m, h d m -> b h q d")
        moved = einsum(part.pattern, values, "h q k, b h q d -> b h k d")
        return self.norm.pull(einsum(moved, self.W_V, "b h k d, h m d -> b h k m"))

    @override
    def pull(self, c: Float[Tensor, "row pos d_model"]) -> Tensor | None:
        if self.attention != "frozen":
            return None
        part = self.part
        values = einsum(c * part.out_factor[:, None], part.W_out, "b q m, h d m -> b q h d")
        moved = einsum(part.pattern, values, "h q k, b q h d -> b k h d")
        return self.norm.pull(einsum(moved, self.W_V, "b k h d, h m d -> b k m"))

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        values = self._values(self.norm.share(change))
        answers = torch.zeros_like(self.writers.activations)
        if self._live:
            unit = self.writers.vectors[self._places] / self.writers.activations[self._places, None]
            answers[self._places] = (self._vectors(values)[self._live] * unit).sum(1)
        return answers, self._mix(values)

    @override
    def own_answer(self, place: int, change: Change) -> Float[Tensor, " d_model"]:
        if place not in self._places:
            return torch.zeros_like(change[0])
        row = self._live[self._places.index(place)]
        return self._vectors(self._values(self.norm.share(change)))[row]
