"""Positions at which a layer mostly fetches from an attention sink.

Where heads have nothing to do, they attend to one token of the sequence, often the first. What they
write then is much the same everywhere and can make up most of a layer's variance, so that the
FVU says little about the rest.
"""

from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

SinkRule = Literal["attention", "first"]
"""`attention`: see `sink_positions`. `first`: the first position of every context."""

SINK_ATTENTION = 0.3
"""A key is a sink of a head if it gets at least this much of the attention of the queries after
it, on average (arXiv 2410.10781, section 3) ..."""

SINK_ENERGY = 0.5
"""... and a position is a sink position if more than this share of what the heads write there is
fetched from sinks."""


def check_rule(rule: str) -> None:
    """Refuse what is no rule.

    Raises:
        ValueError: if so.
    """
    if rule not in get_args(SinkRule):
        raise ValueError(f"sinks = {rule!r} must be one of {', '.join(get_args(SinkRule))}")


def sink_positions(
    attention: Lorsa,
    record: AttentionRecord,
    counted: Bool[Tensor, "batch pos"],
    rule: SinkRule = "attention",
) -> Bool[Tensor, "batch pos"]:
    """Which positions are sink positions of a layer.

    By the rule `attention`, key k of a sequence is a sink of head h if the counted queries after
    it (all others, where attention is bidirectional) give it at least `SINK_ATTENTION` on average,
    and they are at least half of the counted ones. Position q is a sink position if

        sum_h |sum_{k sink of h} A^h[q,k] v^h[k] W_O^h|^2
            > SINK_ENERGY * sum_h |sum_k A^h[q,k] v^h[k] W_O^h|^2

    Args:
        attention: the layer's own attention, as its exact lift.
        record: what the layer received.
        counted: tokens that count.
        rule: the rule.
    """
    if rule == "first":
        first = torch.zeros_like(counted)
        first[:, 0] = True
        return first
    part = record.seen_by(attention)
    queries = counted.to(part.x.device)
    causal = attention.cfg.attention_dir == "causal"
    values = torch.nn.functional.linear(part.x, attention.W_V, attention.b_V)
    values = rearrange(values, "b k (h d) -> h b k d", h=attention.cfg.n_qk_heads)
    writes = rearrange(attention.W_O, "(h d) m -> h d m", h=attention.cfg.n_qk_heads)
    fetched = torch.zeros(counted.shape, dtype=torch.float64, device=part.x.device)
    written = torch.zeros_like(fetched)
    blocks = attention.pattern_blocks(
        part.x, [[head] for head in range(attention.cfg.n_qk_heads)], **part.context
    )
    for head, block in enumerate(blocks):
        pattern = block[:, 0].to(values.dtype)
        to_sinks = pattern * _sink_keys(pattern, queries, causal)[:, None]
        written += _energy(pattern, values[head], writes[head])
        fetched += _energy(to_sinks, values[head], writes[head])
    return (fetched > SINK_ENERGY * written).cpu()


def _sink_keys(
    pattern: Float[Tensor, "batch query key"], counted: Bool[Tensor, "batch query"], causal: bool
) -> Bool[Tensor, "batch key"]:
    """Keys that most queries look at."""
    n = pattern.shape[-1]
    others = ~torch.eye(n, dtype=torch.bool, device=pattern.device)
    asking = others.tril() if causal else others  # [query, key]
    n_asking = einsum(counted.double(), asking.double(), "b q, q k -> b k")
    received = einsum(pattern.double(), counted.double(), asking.double(), "b q k, b q, q k -> b k")
    enough = (2 * n_asking >= counted.sum(-1, keepdim=True)) & (n_asking > 0)
    return enough & (received >= SINK_ATTENTION * n_asking)


def _energy(pattern: Tensor, values: Tensor, write: Tensor) -> Float[Tensor, "batch query"]:
    return (pattern @ values @ write).double().square().sum(-1)
