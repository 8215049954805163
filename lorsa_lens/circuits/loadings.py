"""Head loadings: how much of an edge each original attention head carries.

Layers without a Lorsa are frozen and passed through. An edge is then the sum over all paths from
its source to its target: straight through the stream, or through heads of such layers. Paths are
told apart by the first head on them, the one that reads the source itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorsa_lens.circuits.attention_stages import AttentionStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.circuits.targets import Output, Target


@dataclass(frozen=True)
class HeadLoadings:
    """An edge as a sum (Kamath et al. 2025, "Tracing Attention Computation", head loadings)."""

    source: Node
    target: Node
    direct: float
    """Straight through the stream."""
    heads: Mapping[tuple[int, int], float]
    """By layer and head: through it first, from the source's token to where it writes."""

    @property
    def edge(self) -> float:
        """The direct effect of the source on the target."""
        return self.direct + sum(self.heads.values())

    @property
    def strongest(self) -> list[tuple[tuple[int, int], float]]:
        """Heads, those of the largest loadings first."""
        return sorted(self.heads.items(), key=lambda item: -abs(item[1]))


@torch.no_grad()
def head_loadings(
    replacement: LocalReplacement, source: Node, target: Node, explained: Target | None = None
) -> HeadLoadings:
    """How much of an edge each head of layers without a Lorsa carries.

    Args:
        replacement: the prompt, with `attention="frozen"`.
        source: any node that writes.
        target: a head, a feature, an MLP, or a logit of `explained`.
        explained: the target that the graph was made for. None: `Target.top_probability()`.

    Raises:
        ValueError: if a node is not at work on this prompt, or the target reads nothing.
    """
    output = Output(replacement.stream, explained or Target.top_probability())
    vector, at = replacement.vector(source), source.pos
    first = replacement.stage_of[source]
    reading, (level,) = replacement.read([target], output)
    own = reading.cotangents
    direct = float(own[0, at] @ vector) if level >= first else 0.0
    heads: dict[tuple[int, int], float] = {}
    c = own
    for i in range(level, first, -1):
        stage = replacement.stages[i]
        if isinstance(stage, AttentionStage) and stage.attention == "frozen":
            by_head = stage.by_head(c)[0]
            loads = by_head[:, at] @ vector
            heads |= {(stage.layer, head): float(load) for head, load in enumerate(loads)}
            c = c + by_head.sum(0)[None]
    return HeadLoadings(source, target, direct, heads)
