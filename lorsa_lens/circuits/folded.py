"""Lorsas as they act on the residual stream: norms folded in, with their scales held at a mean.

A norm reads `(y - mean(y) if it centres) * gain / scale + bias`. Gain, centring and bias go into
the weights exactly. The scale differs from token to token: it is held at one number for each layer.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.circuits.items import Embeddings, Moments
from lorsa_lens.circuits.stages import unfolded
from lorsa_lens.hosts import Host, host_of
from lorsa_lens.hosts.ends import attention_input
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.frozen_norm import FrozenNorm, freeze, no_norm
from lorsa_lens.singular.projection import Projection
from lorsa_lens.singular.qk_head import QKHead
from lorsa_lens.singular.rotation import Rotation, rotation_of

Vectors = Float[Tensor, "n d_model"]

N_PROBED = 16
"""Vectors on which a norm is read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldedSide:
    """The queries, or the keys, of one circuit: `y W + b` of what the stream holds."""

    W: Float[Tensor, "d_model d_qk_head"]
    b: Float[Tensor, " d_qk_head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldedLayer:
    """One Lorsa in terms of the residual stream, in float64."""

    layer: int
    circuits: tuple[QKHead, ...]
    queries: tuple[FoldedSide, ...]
    """Of each circuit."""
    keys: tuple[FoldedSide, ...]
    W_V: Float[Tensor, "d_model ov_head"]
    """What heads read of the stream."""
    b_V: Float[Tensor, " ov_head"]
    W_O: Float[Tensor, "ov_head d_model"]
    """What heads add to the stream, behind a norm after attention if there is one."""
    b_O: Float[Tensor, " d_model"]
    norm: FrozenNorm
    """Before attention, with the one scale."""
    post_scale: float
    """At which the norm after attention is held; 1 if there is none."""
    activations: Float[Tensor, " ov_head"]
    """Typical size of every head's z."""
    group_size: int
    density: float
    """Share of tokens at which a head stays, all alike: k / n_ov_heads."""

    @property
    def n_heads(self) -> int:
        """Number of rank-1 heads."""
        return len(self.W_O)

    def rotation(self, offset: int) -> tuple[Rotation, Rotation]:
        """Rotations of queries and of keys that are `offset` tokens before them."""
        head = self.circuits[0]
        positions = torch.tensor([offset, 0], device=self.W_O.device)
        both = rotation_of(head.spec, head.query.W.shape[-1], positions)
        return both.at(0), both.at(1)

    def input(self, y: Vectors) -> Vectors:
        """What attention receives where the stream is `y`."""
        return _at_each(self.norm, y).share(y) + self.norm.bias


class Held(NamedTuple):
    """What is held at one value in a layer; None: as the weights tell."""

    scale: float | None = None
    """Of the norm before attention."""
    post_scale: float | None = None
    """Of the norm after attention, if there is one."""
    activations: Float[Tensor, " ov_head"] | None = None
    """Typical size of every head's z."""


def fold(
    model: nn.Module, lorsa: Lorsa, embeddings: Embeddings, moments: Moments, held: Held
) -> FoldedLayer:
    """Fold the norms of a layer into the weights of its Lorsa.

    Queries' and keys' own norms are held at the mean over the tokens.

    Args:
        model: the host.
        lorsa: with its `cfg.layer`.
        embeddings: what the stream begins with.
        moments: of the stream before the layer.
        held: scales and activations that are known.
    """
    host, layer = host_of(model), lorsa.cfg.layer
    assert layer is not None  # checked before
    norm = held_norm(norm_before(host, layer, embeddings.tokens), moments, held.scale)
    circuits = tuple(
        QKHead.from_lorsa(lorsa, head, model=model) for head in range(lorsa.cfg.n_qk_heads)
    )
    seen = norm
    if circuits[0].input_norm is not None:  # the Lorsa reads the normalized stream
        seen = unfolded(norm, *circuits[0].input_norm)
    x = _at_each(seen, embeddings.tokens).share(embeddings.tokens) + seen.bias
    W_V = lorsa.W_V.detach().double().mT
    b_V = seen.bias @ W_V + lorsa.b_V.detach().double()
    W_V = seen.into(W_V) / seen.scale
    activations = held.activations
    if activations is None:
        variance = ((embeddings.moments.covariance @ W_V) * W_V).sum(0)
        activations = ((moments.mean @ W_V + b_V).square() + variance).sqrt()
    density = (lorsa.cfg.k or lorsa.cfg.n_ov_heads) / lorsa.cfg.n_ov_heads
    W_O, b_O = lorsa.W_O.detach().double(), lorsa.b_O.detach().double()
    post = _post_norm(host, lorsa, layer, W_O)
    if post is not None:
        rows = density**0.5 * activations[:, None] * W_O
        post = held_norm(post, Moments(b_O, rows.mT @ rows), held.post_scale)
        W_O = _at_each(post, W_O).share(W_O)
        b_O = post.share(b_O[None])[0] + post.bias
    return FoldedLayer(
        layer=layer,
        circuits=circuits,
        queries=tuple(_side(seen, circuit.query, x) for circuit in circuits),
        keys=tuple(_side(seen, circuit.key, x) for circuit in circuits),
        W_V=W_V,
        b_V=b_V,
        W_O=W_O,
        b_O=b_O,
        norm=norm,
        post_scale=1.0 if post is None else post.scale.item(),
        activations=activations.double(),
        group_size=lorsa.cfg.group_size,
        density=density,
    )


def _side(seen: FrozenNorm, projection: Projection, x: Vectors) -> FoldedSide:
    W, b = projection.effective
    factor = projection.factor(x).mean()
    W, b = W * factor, b * factor
    return FoldedSide(W=seen.into(W) / seen.scale, b=seen.bias @ W + b)


def norm_before(host: Host, layer: int, tokens: Vectors) -> FrozenNorm | None:
    """The norm before a layer's attention, None if there is none; read on the first tokens."""
    probed = tokens[:N_PROBED]
    like = next(host.model.parameters())
    received = attention_input(host, layer, probed[:, None].to(like))[:, 0].double()
    if torch.equal(received, probed.to(like).double()):
        return None
    return freeze(host.norm_before(layer), probed, received)


def final_norm(host: Host, tokens: Vectors) -> FrozenNorm | None:
    """The norm before the unembedding, None if there is none; read on the first tokens."""
    return None if host.final_norm is None else read_norm(host.final_norm, tokens[:N_PROBED])


def held_norm(norm: FrozenNorm | None, moments: Moments, scale: float | None) -> FrozenNorm:
    """A norm with one scale; None for it: the root mean square of what it divides."""
    if norm is None:
        return no_norm(moments.mean[None])
    size = moments.size(centred=norm.centred) if scale is None else scale
    return replace(norm, scale=moments.mean.new_tensor([size]))


def read_norm(norm: nn.Module, probed: Vectors) -> FrozenNorm:
    """A norm, with its scales where the stream holds these vectors."""
    like = next(norm.parameters(), probed)
    with torch.no_grad():
        out: Tensor = norm(probed.to(like)[None])[0]
    return freeze(norm, probed, out.double())


def _at_each(norm: FrozenNorm, rows: Vectors) -> FrozenNorm:
    return replace(norm, scale=norm.scale.expand(len(rows)))


def _post_norm(host: Host, lorsa: Lorsa, layer: int, W_O: Vectors) -> FrozenNorm | None:
    """The norm behind what a Lorsa writes, if there is one; read on the first heads."""
    norm = host.post_norm(layer)
    if norm is None or lorsa.cfg.output_site == "hook_attn_out":
        return None
    return read_norm(norm, W_O[:N_PROBED])
