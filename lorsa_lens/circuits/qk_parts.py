"""The queries and keys of a head on a prompt, as sums over the nodes that wrote what they read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.circuits.attention_stages import AttentionStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.read_in import Side, read_in

BIAS = None
"""Stands among nodes for the biases of the head itself and of the norm before it."""

QKNode = Node | None
"""A node, or `BIAS`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QKParts:
    """Parts of a query, or of several keys: norms, also those of queries and keys, frozen."""

    nodes: tuple[QKNode, ...]
    pos: Int[Tensor, " part"]
    """At which token each is read."""
    vectors: Float[Tensor, "part d_head"]
    """Rotated as at that token; over the parts of one token they sum to its query or key."""


def qk_parts(
    replacement: LocalReplacement, reading: QKReading, side: Side, positions: Sequence[int]
) -> QKParts:
    """Take the queries (`dest`) or the keys (`src`) at some tokens apart.

    Args:
        replacement: the prompt.
        reading: the head on it.
        side: which side.
        positions: the tokens.

    Raises:
        ValueError: if a layer below has attention that is no node.
    """
    layer = reading.head.layer
    below = replacement.stages[: replacement.before_attention(layer) + 1]
    for stage in below:
        if isinstance(stage, AttentionStage) and stage.attention == "frozen":
            raise ValueError(
                f"what reaches layer {layer} through the attention of layer {stage.layer} is no "
                "node: make the local replacement with attention='heads'"
            )
    read = read_in(replacement.stream, reading, side)
    at = torch.tensor(sorted(positions), dtype=torch.long)
    nodes: list[QKNode] = [BIAS] * len(at)
    found, parts = [at], [read.offset[at]]
    if bool(read.shift.any()):  # shortformer: positions past the norm
        nodes += [Node("position", -1, pos) for pos in at.tolist()]
        found.append(at)
        parts.append(read.shift[at])
    for stage in below:
        writers = stage.writers
        chosen = torch.isin(writers.pos, at).nonzero()[:, 0]
        pos = writers.pos[chosen]
        nodes += [writers.nodes[i] for i in chosen.tolist()]
        found.append(pos)
        parts.append((writers.vectors[chosen] @ read.W) * read.factor[pos, None])
    where = torch.cat(found)
    vectors = reading.rotation.at(where)(torch.cat(parts))
    return QKParts(nodes=tuple(nodes), pos=where, vectors=vectors)
