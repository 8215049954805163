"""Circuits without any input: how Lorsa heads of different layers read what others write.

In the residual stream a head of layer m reads what a head of layer l < m writes through its own
weights. For heads i (below) and j (above), tokens t, and circuits h, with norms folded in:

    value side      w_O^i . w_V^j                           what j fetches of what i wrote
    key side        (y W_Q^h + b_Q^h) R (w_O^i W_K^h)       what i adds to the score of its token
    query side      (w_O^i W_Q^h) R (y W_K^h + b_K^h)       what i adds to the scores it asks for
    logits          w_O^i . W_U[:, t]

These are the virtual weights of "A Mathematical Framework for Transformer Circuits" (2021) for
rank-1 heads, and the global weights of "Circuit Tracing" (2025). R is the rotation over the
distance of query and key: the identity unless positions are rotary. A cap acts on scores after
these sums.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.circuits.folded import FoldedLayer, FoldedSide, Held, final_norm, fold, held_norm
from lorsa_lens.circuits.items import Item, Items, Moments, read_embeddings
from lorsa_lens.circuits.replacement import lorsas_by_layer
from lorsa_lens.hosts import host_of
from lorsa_lens.lorsa import Lorsa

QKSide = Literal["query", "key"]

MAX_ITEMS = 20_000
"""Items whose pairs are held at once: 3.2 GB."""


class GlobalCircuit:
    """Lorsas of one model, read off their weights.

    Layers without a Lorsa, and MLPs, are passed over: these are the direct paths between Lorsas,
    the embedding and the unembedding.
    """

    def __init__(
        self,
        model: nn.Module,
        lorsas: Lorsa | Iterable[Lorsa] | Mapping[int, Lorsa],
        *,
        tokens: Sequence[int] | None = None,
        n_pos: int | None = None,
        scales: Mapping[int, float] | None = None,
        post_scales: Mapping[int, float] | None = None,
        activations: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Fold norms into weights; nothing is run but the embedding.

        Args:
            model: a HookedTransformer or a TransformerBridge, nothing in place.
            lorsas: at most one for each layer.
            tokens: ids of the tokens that the stream may begin with. None: the vocabulary.
            n_pos: learned positions that it may begin with. None: all, at most 256.
            scales: at which norms are held, by layer; the final norm's by the number of layers.
                None: the root mean square that the stream has where all its parts are independent:
                a token, a position, heads below (each at k of n tokens). The mean of a corpus is
                better: `Coactivation.scales`.
            post_scales: the same for norms after attention: what heads write together. None: if
                they are independent.
            activations: typical size of every head's z, by layer. None: the root mean square of
                the values that a head fetches from embeddings, if it attends to one token. That of
                a corpus is better: `Coactivation.activations`.

        Raises:
            ValueError: if a Lorsa has no layer or one that another has, or does not fit the model,
                or there is none; if a token is not in the vocabulary.
        """
        self.model, self.host = model, host_of(model)
        given = lorsas.values() if isinstance(lorsas, Mapping) else lorsas
        found = lorsas_by_layer(given, self.host.n_layers, self.host.d_model)
        if not found:
            raise ValueError("lorsas is empty: give at least one")
        self.lorsas = dict(sorted(found.items()))
        self.embeddings = read_embeddings(self.host, tokens, n_pos)
        self._final_scale = (scales or {}).get(self.host.n_layers)
        self.layers: dict[int, FoldedLayer] = {}
        for layer, lorsa in self.lorsas.items():
            held = Held(
                scale=(scales or {}).get(layer),
                post_scale=(post_scales or {}).get(layer),
                activations=(activations or {}).get(layer),
            )
            moments = self._moments(layer)
            self.layers[layer] = fold(model, lorsa, self.embeddings, moments, held)

    def held_at(
        self,
        scales: Mapping[int, float],
        post_scales: Mapping[int, float],
        activations: Mapping[int, Tensor],
    ) -> "GlobalCircuit":
        """The same with other scales and activations; see the constructor."""
        return GlobalCircuit(
            self.model,
            self.lorsas,
            tokens=self.embeddings.token_ids,
            n_pos=len(self.embeddings.positions),
            scales=scales,
            post_scales=post_scales,
            activations=activations,
        )

    @property
    def activations(self) -> dict[int, Float[Tensor, " ov_head"]]:
        """Typical size of every head's z, by layer."""
        return {layer: folded.activations for layer, folded in self.layers.items()}

    # ------------------------------------------------------------------------- heads and heads

    def value_weights(self, low: int, high: int) -> Float[Tensor, "up down"]:
        """`w_O^i . w_V^j`: what one unit of z of a lower head adds to the value of a higher one."""
        below, above = self._pair(low, high)
        return below.W_O @ above.W_V

    def strengths(self, low: int, high: int, side: QKSide, *, offset: int = 1) -> Tensor:
        """How much lower heads move the scores of a layer's circuits, in units of scores.

        The root mean square of what a head at its typical activation adds to the score, over what
        the other side may be: a token, a position, heads (each at k of n tokens), and the constant.

        Args:
            low: layer of the heads.
            high: layer of the circuits.
            side: where the heads have written: at the query's token or at the key's.
            offset: tokens from key to query, which matters where positions are rotary.

        Returns:
            Strengths [up, circuit].
        """
        below, above = self._pair(low, high)
        mean, covariance = self._moments(high)
        columns = []
        for circuit in range(len(above.circuits)):
            other = self._side(above, circuit, _other(side), offset)
            bias = mean @ other.W + other.b
            gram = torch.outer(bias, bias) + other.W.mT @ covariance @ other.W
            own = below.W_O @ self._side(above, circuit, side, offset).W
            columns.append(((own @ gram) * own).sum(1).clamp(min=0).sqrt())
        strengths = torch.stack(columns, dim=1) / above.circuits[0].divisor
        return strengths * self.layers[low].activations[:, None]

    def matches(self, low: int, high: int, side: QKSide, *, offset: int = 1) -> Tensor:
        """How much a head makes a circuit look for its own token, in units of scores.

        If head i has fetched token t to the key, it adds
        `s(t', t) = (e_t' W_Q) R (w_O^i W_K) v^i(t)` to the score of a query whose token is t'. Its
        match is the mean of `s(t, t)` less the mean of `s(t', t)`: by how much equal tokens attract
        each other through it. It is positive for heads that serve an induction circuit. With
        `side="query"` the head has written at the query.

        Args:
            low: layer of the heads.
            high: layer of the circuits.
            side: where the heads have written.
            offset: as in `strengths`.

        Returns:
            Matches [up, circuit].
        """
        below, above = self._pair(low, high)
        fetched = self.embeddings.token_covariance @ below.W_V
        columns = []
        for circuit in range(len(above.circuits)):
            other = self._side(above, circuit, _other(side), offset).W
            own = below.W_O @ self._side(above, circuit, side, offset).W
            columns.append(((fetched.mT @ other) * own).sum(1))
        return torch.stack(columns, dim=1) / above.circuits[0].divisor

    def pair_scores(
        self, layer: int, circuit: int, *, offset: int = 1
    ) -> tuple[Items, Float[Tensor, "query key"]]:
        """What every pair of items adds to the score of a circuit: at the query, and at the key.

        For items that the stream really holds, at these activations and with the norm at this
        scale, the entries sum to the score (before a cap; ALiBi comes on top).

        Args:
            layer: of the circuit.
            circuit: which.
            offset: as in `strengths`.

        Returns:
            The items, and a matrix of scores.

        Raises:
            ValueError: if there is no such layer or circuit, or there are too many items.
        """
        folded = self._layer(layer)
        if not 0 <= circuit < len(folded.circuits):
            raise ValueError(f"circuit = {circuit}: layer {layer} has {len(folded.circuits)}")
        items = self.items(layer)
        if len(items) > MAX_ITEMS:
            raise ValueError(
                f"the stream may hold {len(items)} items, so there are {len(items) ** 2} pairs: "
                "make the circuit with fewer tokens, tokens=[...]"
            )
        sides = []
        for name in get_args(QKSide):
            side = self._side(folded, circuit, name, offset)
            projected = items.vectors @ side.W
            projected[0] += side.b  # the constant comes first
            sides.append(projected)
        return items, sides[0] @ sides[1].mT / folded.circuits[0].divisor

    def items(self, layer: int) -> Items:
        """What the stream may hold before a layer: embeddings, and heads at typical activations."""
        embedded = self.embeddings.items(self._biases_below(layer))
        found, parts = list(embedded.items), [embedded.vectors]
        for low, folded in self._below(layer):
            found += [Item("head", low, head) for head in range(folded.n_heads)]
            parts.append(folded.W_O * self.layers[low].activations[:, None])
        return Items(items=tuple(found), vectors=torch.cat(parts))

    # --------------------------------------------------------------------------------- the ends

    def token_values(
        self, layer: int, heads: Sequence[int] | None = None
    ) -> Float[Tensor, "token ov_head"]:
        """What all heads, or some, fetch from each token, less that from the mean token."""
        W_V = self._layer(layer).W_V
        return self.embeddings.token_deviations @ (W_V if heads is None else W_V[:, list(heads)])

    def logit_weights(
        self, layer: int, heads: Sequence[int] | None = None
    ) -> Float[Tensor, "ov_head d_vocab"]:
        """What one unit of z of all heads, or some, adds to logits, less the vocabulary's mean."""
        W_O = self._layer(layer).W_O
        logits = (W_O if heads is None else W_O[list(heads)]) @ self._unembedding
        return logits - logits.mean(1, keepdim=True)

    def copying(self, layer: int) -> Float[Tensor, " ov_head"]:
        """How much a head raises the logit of the token that it fetches, in logits.

        The mean over tokens t of `v(t) logit(t)`, both less their means: the token's own logit
        against those of others. Tokens count alike.
        """
        tokens, folded = self.embeddings.token_deviations, self._layer(layer)
        moment = tokens.mT @ self._unembedding[:, list(self.embeddings.token_ids)].mT / len(tokens)
        return ((folded.W_V.mT @ moment) * folded.W_O).sum(1)

    def distances(self, layer: int) -> Float[Tensor, "circuit offset"]:
        """How far back circuits look, as positions alone tell: the mean weight at each distance.

        The pattern where every token is the mean token, averaged over queries that have a key at
        the distance, up to half of the positions.
        """
        folded, n_pos = self._layer(layer), len(self.embeddings.positions)
        stream = self.embeddings.positions + self.embeddings.tokens.mean(0)
        x = folded.input(stream + self._biases_below(layer))
        n_offsets = max(1, n_pos // 2)
        rows = []
        for circuit in folded.circuits:
            pattern = circuit.reading(x).pattern[n_offsets - 1 :]
            by_offset = [
                pattern.diagonal(n_offsets - 1 - offset).mean() for offset in range(n_offsets)
            ]
            rows.append(torch.stack(by_offset))
        return torch.stack(rows)

    # ------------------------------------------------------------------------------- the parts

    @cached_property
    def _unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        W_U, _ = self.host.unembedding
        n_layers, norm = self.host.n_layers, final_norm(self.host, self.embeddings.tokens)
        norm = held_norm(norm, self._moments(n_layers), self._final_scale)
        return norm.into(W_U.double()) / norm.scale

    def _layer(self, layer: int) -> FoldedLayer:
        if layer not in self.layers:
            raise ValueError(f"layer = {layer}: there are Lorsas of layers {sorted(self.layers)}")
        return self.layers[layer]

    def _pair(self, low: int, high: int) -> tuple[FoldedLayer, FoldedLayer]:
        below, above = self._layer(low), self._layer(high)
        if low >= high:
            raise ValueError(f"low = {low}, high = {high}: heads act on layers above their own")
        return below, above

    def _below(self, layer: int) -> list[tuple[int, FoldedLayer]]:
        return [(low, folded) for low, folded in sorted(self.layers.items()) if low < layer]

    def _biases_below(self, layer: int) -> Float[Tensor, " d_model"]:
        biases = [folded.b_O for _, folded in self._below(layer)]
        return sum(biases, torch.zeros_like(self.embeddings.tokens[0]))

    def _moments(self, layer: int) -> Moments:
        """Of the stream before a layer, its parts taken as independent."""
        moments = self.embeddings.moments
        for _, folded in self._below(layer):
            written = folded.W_O * folded.activations[:, None]
            moments = moments.plus(folded.b_O, folded.density**0.5 * written)
        return moments

    def _side(self, folded: FoldedLayer, circuit: int, side: QKSide, offset: int) -> FoldedSide:
        """One side of a circuit, rotated as at a distance."""
        rotate_query, rotate_key = folded.rotation(offset)
        own = folded.queries[circuit] if side == "query" else folded.keys[circuit]
        rotate = rotate_query if side == "query" else rotate_key
        return FoldedSide(W=rotate(own.W), b=rotate(own.b))


def _other(side: QKSide) -> QKSide:
    if side not in get_args(QKSide):
        raise ValueError(f"side = {side!r} must be one of {get_args(QKSide)}")
    return "key" if side == "query" else "query"
