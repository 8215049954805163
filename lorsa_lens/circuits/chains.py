"""The strongest chain of heads: what one head writes, the next moves, or looks for."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import shares
from lorsa_lens.circuits.score_effects import AttentionEffects

Via = Literal["values", "pattern"]
"""How a node acts on the next: by what this moves, or by where it looks."""


class Chain(NamedTuple):
    """Heads, features and MLPs that act on each other, and the target at the end."""

    nodes: tuple[Node, ...]
    via: tuple[Via, ...]
    """How each acts on the next; one fewer than `nodes`."""
    share: float
    """Product of the shares on the way."""


def strongest_chain(
    graph: AttributionGraph, effects: AttentionEffects, *, to: Node | None = None
) -> Chain:
    """The chain of the largest product of shares, from a unit that no other acts on to a target.

    A node's share in the next is its direct effect, relative to the sizes of all (`values`), or its
    effect through the pattern, relative to the sizes of all those (`pattern`), whichever is more.

    Args:
        graph: the graph, with the units that may be in the chain.
        effects: of all nodes on heads of the graph through their patterns.
        to: which target. None: the one of the largest weight.

    Raises:
        ValueError: if `to` is no node of the graph, or no unit acts on it.
    """
    end = graph.index(to or graph.nodes[int(graph.target_weights.argmax())])
    unit = ~graph.of_kind("token", "position", "bias", "error")
    by_values = shares(graph) * unit
    by_pattern = _pattern_shares(graph, effects) * unit
    both = torch.maximum(by_values, by_pattern)
    best = torch.zeros(len(graph.nodes), dtype=both.dtype)
    best[end], follow = 1.0, [-1] * len(graph.nodes)
    for t in range(len(graph.nodes) - 1, -1, -1):  # targets come after their sources
        through = best[t] * both[t]
        for s in (through > best).nonzero()[:, 0].tolist():
            best[s], follow[s] = through[s], t
    first = unit & (both.sum(1) == 0) & (best > 0)
    first[end] = False
    if not bool(first.any()):
        raise ValueError(f"no head, feature or MLP of the graph acts on {graph.nodes[end].id}")
    path = [int(best.masked_fill(~first, -1.0).argmax())]
    share = float(best[path[0]])
    while follow[path[-1]] >= 0:
        path.append(follow[path[-1]])
    via = _via(path, by_values, by_pattern)
    return Chain(tuple(graph.nodes[i] for i in path), via, share)


def _via(path: Sequence[int], by_values: Tensor, by_pattern: Tensor) -> tuple[Via, ...]:
    steps = pairwise(path)
    return tuple("pattern" if by_pattern[t, s] > by_values[t, s] else "values" for s, t in steps)


def _pattern_shares(
    graph: AttributionGraph, effects: AttentionEffects
) -> Float[Tensor, "target source"]:
    """Shares of sources in what heads owe to their patterns."""
    sizes = (effects.query + effects.key).abs()
    sizes = sizes / (sizes.sum(1) + effects.bias.abs()).clamp(min=1e-300)[:, None]
    column = {node: i for i, node in enumerate(effects.nodes)}
    out = torch.zeros_like(graph.edges)
    here = [(i, column[node]) for i, node in enumerate(graph.nodes) if node in column]
    for row, head in enumerate(effects.heads):
        if head in graph.positions_of:
            places, columns = (torch.tensor(part) for part in zip(*here, strict=True))
            out[graph.index(head), places] = sizes[row, columns]
    return out
