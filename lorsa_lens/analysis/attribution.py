"""What a head's activation is made of: source tokens, and the components that wrote them.

With the pattern and the norm before the layer held fixed, a pre-activation is linear in the
residual stream, which is a sum of what the embedding, attention heads and MLPs wrote:

    z_pre[q] = sum_k A[q, k] (w_V . x[k] + b_V),   x[k] = gain * resid[k] / scale[k] + bias

(direct feature attribution, arXiv 2406.17759, section 4, for a head of rank one).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.sources import head_name
from lorsa_lens.functional.code import to_dense
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.site import reads_normalized

NORM_TOLERANCE = 1e-3
"""How far, relative to its length, an input may be from a norm of the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """One activation as a sum over components and tokens."""

    layer: int
    head: int
    query: int

    components: tuple[str, ...]
    """What wrote: `embedding`, `positions`, attention heads (`L0H3`) or Lorsa heads (`L0.42`),
    `L0.mlp`, biases, and `rest` for what none of these explains (0 to rounding in most models)."""

    by_key: Float[Tensor, "component key"]
    """Contributions to the pre-activation, by the token at which the component had written them
    and from which the head fetched them."""

    by_origin: Float[Tensor, "component token"]
    """The same, with what upstream heads wrote traced to the tokens they had fetched it from."""

    @property
    def activation(self) -> float:
        """The head's pre-activation at the query: the sum of all contributions."""
        return float(self.by_key.sum())

    @property
    def by_token(self) -> Float[Tensor, " key"]:
        """The z pattern: contributions of source tokens, whoever wrote them."""
        return self.by_key.sum(0)

    @property
    def by_component(self) -> dict[str, float]:
        """Contributions of components, largest in size first."""
        totals = self.by_key.sum(1)
        order = totals.abs().argsort(descending=True).tolist()
        return {self.components[index]: float(totals[index]) for index in order}


@torch.no_grad()
def attribute(
    model: nn.Module,
    lorsa: Lorsa,
    tokens: Int[Tensor, " pos"],
    head: int,
    query: int,
    *,
    upstream: Iterable[Lorsa] = (),
) -> Attribution:
    """Attribute a head's pre-activation at one position to everything before its layer.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place at this layer.
        lorsa: whose head; its `cfg.layer` says where it reads.
        tokens: one sequence.
        head: which rank-1 head.
        query: at which position.
        upstream: Lorsas of earlier layers; their heads take the place of the attention heads
            there, and what they miss is the row `L0.error`.

    Raises:
        ValueError: if the head or the position does not exist, or the layer does not read a norm
            of the residual stream.
    """
    layer = _checked_layer(lorsa, tokens, head, query)
    given = {_layer_of(other): other for other in upstream}
    layers = range(layer + 1)
    records = record_attention(model, tokens[None], layers)
    streams = _streams(model, tokens, layer)
    seen = records[layer].seen_by(lorsa)
    frozen = _frozen_norm(lorsa, records[layer], seen, streams[f"blocks.{layer}.hook_resid_pre"])
    pattern = lorsa.pattern(seen.x, [head // lorsa.cfg.group_size], **seen.context)[0, 0, query]
    reader = _Reader(lorsa.W_V[head].double(), pattern.double(), frozen)

    rows: dict[str, Tensor] = {}
    origins: dict[str, Tensor] = {}
    for name, written in _streams_written(streams, records, layer).items():
        rows[name] = reader.read(written)
    for below in range(layer):
        if records[below].attn_out is not None:
            continue  # a norm stands between heads and the stream: the layer is one component
        if below in given:
            names, by_head = _lorsa_heads(given[below], records[below], reader, below)
        else:
            names, by_head = _attention_heads(model, records[below], reader, below)
        whole = rows.pop(f"L{below}.attn")
        for index, name in enumerate(names):
            rows[name], origins[name] = by_head[index].sum(1), by_head[index].sum(0)
        chosen = given.get(below)
        bias = chosen.b_O if chosen is not None else Lorsa.from_attention(model, below).b_O
        rows[f"L{below}.bias"] = reader.read(bias.double().expand(len(tokens), -1))
        if chosen is not None:
            explained = rows[f"L{below}.bias"] + by_head.sum((0, 2))
            rows[f"L{below}.error"] = whole - explained
    rows["rest"] = reader.read(streams[f"blocks.{layer}.hook_resid_pre"]) - sum(rows.values())
    rows["norm bias"] = reader.pattern * (reader.read_vector @ frozen.bias)
    rows["value bias"] = reader.pattern * lorsa.b_V[head].double()
    return Attribution(
        layer=layer,
        head=head,
        query=query,
        components=tuple(rows),
        by_key=torch.stack(list(rows.values())),
        by_origin=torch.stack([origins.get(name, row) for name, row in rows.items()]),
    )


class _FrozenNorm(NamedTuple):
    """`x = gain * centre(resid) / scale + bias`, as it was at each position."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, " pos"]
    centres: bool


class _Reader(NamedTuple):
    """What a head reads of the residual stream at each key, as seen from one query."""

    read_vector: Float[Tensor, " d_model"]
    pattern: Float[Tensor, " key"]
    norm: _FrozenNorm

    @property
    def direction(self) -> Tensor:
        direction = self.read_vector * self.norm.gain
        return direction - direction.mean() if self.norm.centres else direction

    def read(self, written: Float[Tensor, "key d_model"]) -> Float[Tensor, " key"]:
        """Contribution of what was written at each key."""
        return self.pattern / self.norm.scale * (written @ self.direction)


def _checked_layer(lorsa: Lorsa, tokens: Tensor, head: int, query: int) -> int:
    if not 0 <= head < lorsa.cfg.n_ov_heads:
        raise ValueError(f"head = {head}, but the Lorsa has heads 0 to {lorsa.cfg.n_ov_heads - 1}")
    if not 0 <= query < len(tokens):
        raise ValueError(f"query = {query}, but the tokens have positions 0 to {len(tokens) - 1}")
    return _layer_of(lorsa)


def _layer_of(lorsa: Lorsa) -> int:
    if lorsa.cfg.layer is None:
        raise ValueError("a Lorsa's cfg.layer is None: say which layer it belongs to")
    return lorsa.cfg.layer


def _streams(model: nn.Module, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """Parts of the residual stream before a layer [pos, d_model], by hook name."""
    wanted = {"hook_pos_embed", "blocks.0.hook_resid_pre", f"blocks.{layer}.hook_resid_pre"}
    wanted |= {f"blocks.{below}.hook_mlp_out" for below in range(layer)}
    _, cache = cast(Any, model).run_with_cache(
        tokens[None], names_filter=lambda name: name in wanted
    )
    return {name: cache[name][0].double() for name in wanted if name in cache}


def _streams_written(
    streams: Mapping[str, Tensor], records: Mapping[int, AttentionRecord], layer: int
) -> dict[str, Tensor]:
    """What the components before a layer added to the stream, attention layers as wholes."""
    start = streams["blocks.0.hook_resid_pre"]
    written = {"embedding": start}
    if "hook_pos_embed" in streams:
        positions = streams["hook_pos_embed"].expand_as(start)
        written = {"embedding": start - positions, "positions": positions}
    for below in range(layer):
        record = records[below]
        added = record.out if record.attn_out is None else record.attn_out
        written[f"L{below}.attn"] = added[0].double()
        if f"blocks.{below}.hook_mlp_out" in streams:
            written[f"L{below}.mlp"] = streams[f"blocks.{below}.hook_mlp_out"]
    return written


def _frozen_norm(
    lorsa: Lorsa, record: AttentionRecord, seen: AttentionRecord, resid: Tensor
) -> _FrozenNorm:
    """The norm before the layer as the linear map it was, found from its input and output."""
    gain, bias = torch.ones_like(resid[0]), torch.zeros_like(resid[0])
    if record.input_norm is not None and not reads_normalized(lorsa):
        gain, bias = (part.double() for part in record.input_norm)
    scaled = seen.x[0].double() - bias
    for centres in (False, True):
        stream = (resid - resid.mean(-1, keepdim=True) if centres else resid) * gain
        scale = stream.square().sum(-1) / (stream * scaled).sum(-1)
        missing = (scaled - stream / scale[:, None]).norm() / scaled.norm()
        if missing < NORM_TOLERANCE:
            return _FrozenNorm(gain, bias, scale, centres)
    raise ValueError(
        f"what layer {lorsa.cfg.layer} reads is no LayerNorm or RMS norm of the residual stream "
        f"(relative distance {float(missing):.2g}), so it cannot be attributed to its parts"
    )


def _attention_heads(
    model: nn.Module, record: AttentionRecord, reader: _Reader, layer: int
) -> tuple[list[str], Float[Tensor, "head key token"]]:
    """Contributions of an attention layer's heads, by where they wrote and whence they fetched."""
    exact = Lorsa.from_attention(model, layer)
    seen = record.seen_by(exact)
    n_heads = exact.cfg.n_qk_heads
    pattern = exact.pattern(seen.x, range(n_heads), **seen.context)[0].double()
    values = nn.functional.linear(seen.x[0].double(), exact.W_V.double())
    aimed = values * (exact.W_O.double() @ reader.direction)
    by_head = reduce(aimed, "token (head d) -> token head", "sum", head=n_heads)
    factor = reader.pattern / reader.norm.scale
    names = [f"L{layer}H{head}" for head in range(n_heads)]
    contributions = einsum(
        factor, pattern, by_head, "key, head key token, token head -> head key token"
    )
    return names, contributions


def _lorsa_heads(
    lorsa: Lorsa, record: AttentionRecord, reader: _Reader, layer: int
) -> tuple[list[str], Float[Tensor, "head key token"]]:
    """The same for the heads of a Lorsa that stay anywhere."""
    seen = record.seen_by(lorsa)
    stays = to_dense(lorsa.encode(seen.x, **seen.context), lorsa.cfg.n_ov_heads)[0] != 0
    heads = torch.nonzero(stays.any(0))[:, 0].tolist()
    z_pattern = lorsa.z_pattern(seen.x, heads, **seen.context)[0].double()
    aimed = lorsa.W_O[heads].double() @ reader.direction
    factor = reader.pattern / reader.norm.scale * rearrange(stays[:, heads], "key head -> head key")
    contributions = einsum(
        factor, z_pattern, aimed, "head key, head key token, head -> head key token"
    )
    return [head_name(layer, head) for head in heads], contributions
