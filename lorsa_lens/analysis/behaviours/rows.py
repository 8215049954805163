"""Scores of one layer's heads as rows of a table."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorsa_lens.analysis.behaviours.catalogue import Behaviour
from lorsa_lens.analysis.behaviours.effects import Hits, joined
from lorsa_lens.analysis.behaviours.null import sign_test
from lorsa_lens.analysis.behaviours.scores import SourceMask, Tally, tally_lorsa, tally_patterns
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.hosts import Host
from lorsa_lens.hosts.ends import logit_directions
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

Kind = Literal["ov", "qk", "attention"]

HEADS_AT_A_TIME = 512
"""Heads whose effects on all logits are held at once."""


class Subject(NamedTuple):
    """A layer, its Lorsa, and what it received."""

    host: Host
    layer: int
    lorsa: Lorsa
    record: AttentionRecord


def rows_of(
    subject: Subject,
    texts: Tensor,
    masks: Mapping[str, SourceMask],
    behaviours: Mapping[str, Behaviour],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of all heads of a layer for all behaviours, p-values not yet corrected.

    Args:
        subject: the layer.
        texts: the sequences.
        masks: sources by behaviour.
        behaviours: the behaviours.
        batch_size: sequences at a time.
    """
    host, layer, lorsa, record = subject
    original = Lorsa.from_attention(host.model, layer)
    own = tally_patterns(original, record, masks, batch_size=batch_size)
    hits = _hits(host, lorsa, behaviours)
    circuits, heads, energy = tally_lorsa(lorsa, record, texts, masks, hits, batch_size=batch_size)
    rows = []
    for name, mask in masks.items():
        n_queries = int(mask.true.any(-1).sum())
        shared = {
            "behaviour": name,
            "layer": layer,
            "attended": float(own[name].mean("share").max()),
            "query_share": n_queries / texts.numel(),
        }
        rows += _table_rows(shared, "attention", own[name], n_queries)
        rows += _table_rows(shared, "qk", circuits[name], n_queries)
        columns = {"energy": heads[name].weight / energy.clamp(min=1e-30)}
        columns["score"] = heads[name].mean("share")
        if name in hits:
            columns["score"] = columns["effect"] = heads[name].mean("effect")
        if behaviours[name].selective:
            columns["score"] = columns["score"] * columns["energy"]
        rows += _table_rows(shared, "ov", heads[name], n_queries, columns)
    return rows


def _hits(host: Host, lorsa: Lorsa, behaviours: Mapping[str, Behaviour]) -> dict[str, Hits]:
    """Which heads have which effect, for behaviours that have one."""
    effects = {name: one.effect for name, one in behaviours.items() if one.effect is not None}
    parts: dict[str, list[Hits]] = {name: [] for name in effects}
    if effects:
        for vectors in torch.split(lorsa.W_O.detach(), HEADS_AT_A_TIME):
            logits = logit_directions(host, vectors)
            for name, effect in effects.items():
                parts[name].append(effect.hits(logits))
    return {name: joined(found) for name, found in parts.items()}


_NAMES = {"ov": head_name, "qk": "L{}Q{}".format, "attention": "L{}H{}".format}


def _table_rows(
    shared: Mapping[str, Any],
    kind: Kind,
    tally: Tally,
    n_queries: int,
    own_columns: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    share = tally.mean("share")
    unknown = torch.full_like(share, torch.nan)
    columns = {
        "score": share,
        "share": share,
        "null": tally.mean("null"),
        "effect": unknown,
        "energy": unknown,
        "strength": tally.weight / max(1, n_queries),
        "n_queries": tally.n_queries,
        "p_value": sign_test(tally.n_above, tally.n_below),
        **(own_columns or {}),
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    return [
        {
            **shared,
            "kind": kind,
            "head": head,
            "name": _NAMES[kind](shared["layer"], head),
            **{name: values[head] for name, values in lists.items()},
        }
        for head in range(tally.n_heads)
    ]
