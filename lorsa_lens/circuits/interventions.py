"""Interventions on the nodes of a graph: what the frozen model predicts, and what is measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import edge_influence
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.circuits.replay import Measured, Replay
from lorsa_lens.circuits.targets import Target


def ablate(nodes: Iterable[Node]) -> dict[Node, float]:
    """Hold nodes at 0: they write nothing."""
    return {node: 0.0 for node in nodes}


def steer(replacement: LocalReplacement, nodes: Iterable[Node], amount: float) -> dict[Node, float]:
    """Hold nodes at their activation on the prompt, and `amount` more.

    Raises:
        ValueError: if a node is not at work on this prompt.
    """
    edits = {}
    for node in nodes:
        replacement.vector(node)
        edits[node] = float(replacement.activations[replacement.places[node]]) + amount
    return edits


@dataclass(frozen=True, eq=False)
class Effects:
    """The changes that an intervention makes: predicted by the frozen model, and measured."""

    nodes: tuple[Node, ...]
    """Heads, features and MLPs that were not held; then the targets."""
    predicted: Float[Tensor, " node"]
    """Changes of pre-activations."""
    measured: Float[Tensor, " node"]

    def of(self, node: Node) -> tuple[float, float]:
        """Predicted and measured change of one node.

        Raises:
            ValueError: if it was held, or is not at work.
        """
        if node not in self.nodes:
            raise ValueError(f"{node.id} was not measured: it was held, or is not at work")
        at = self.nodes.index(node)
        return float(self.predicted[at]), float(self.measured[at])


def intervene(
    replacement: LocalReplacement,
    edits: Mapping[Node, float],
    target: Target | None = None,
    *,
    live: bool = False,
    replay: Replay | None = None,
) -> Effects:
    """Hold nodes at activations; everything after them follows.

    Args:
        replacement: the prompt.
        edits: activations that nodes are held at: of `ablate` or `steer`, or any others.
        target: what to measure besides nodes. None: `Target.top_probability()`.
        live: measure with patterns, norms, MLPs and selections that follow; else frozen ones, and
            the prediction is exact.
        replay: of the same prompt and target, to save a run.

    Raises:
        ValueError: if a node is not at work on this prompt, or `edits` is empty.
    """
    if not edits:
        raise ValueError("edits is empty: give activations to hold nodes at, as ablate(nodes)")
    replay = replay or Replay(replacement, target)
    after, before = replay.run(edits, live=live), replay.base
    changes, at_targets = replacement.respond(edits, replay.output)
    free = [i for i, n in enumerate(replacement.nodes) if not n.is_leaf and n not in edits]
    nodes = tuple(replacement.nodes[i] for i in free)
    measured = after.pre_activations - before.pre_activations
    return Effects(
        nodes=(*nodes, *replay.output.nodes),
        predicted=torch.cat([changes[free], at_targets]),
        measured=torch.cat([measured[free], after.targets - before.targets]),
    )


@dataclass(frozen=True, eq=False)
class EdgeEffects:
    """What ablating the sources of edges takes from their targets, all other nodes held."""

    edges: tuple[tuple[Node, Node], ...]
    """Source and target."""
    predicted: Float[Tensor, " edge"]
    """The edges' weights."""
    measured: Float[Tensor, " edge"]


def edge_effects(
    graph: AttributionGraph,
    replay: Replay,
    edges: Sequence[tuple[Node, Node]],
    *,
    live: bool = False,
    share: float = 1.0,
) -> EdgeEffects:
    """Ablate the source of each edge and measure its target, all other nodes held.

    Args:
        graph: the graph.
        replay: the prompt that can be run again, with the graph's target.
        edges: source and target of each.
        live: measure with patterns, norms and MLPs that follow, else with frozen ones.
        share: take only this share of the source's activation, and divide what is measured by it.

    Raises:
        ValueError: if there is no such edge, or `share` is 0.
    """
    if share == 0:
        raise ValueError("share = 0 changes nothing: 1 ablates the source")
    predicted = [graph.edge(source, target) for source, target in edges]
    before = replay.base
    measured = torch.zeros(len(edges), dtype=torch.float64)
    for source in dict.fromkeys(source for source, _ in edges):
        activation = float(graph.activations[graph.index(source)])
        after = replay.run({source: activation * (1 - share)}, live=live, direct=True)
        for i, (one, target) in enumerate(edges):
            if one == source:
                change = _value(replay, before, target) - _value(replay, after, target)
                measured[i] = change / share
    return EdgeEffects(tuple(edges), torch.tensor(predicted, dtype=torch.float64), measured)


def top_edges(graph: AttributionGraph, n: int) -> list[tuple[Node, Node]]:
    """The `n` edges of the most influence on the targets, the strongest first."""
    scores = edge_influence(graph).flatten()
    best = scores.topk(min(n, int((scores > 0).sum()))).indices.tolist()
    width = len(graph.nodes)
    return [(graph.nodes[i % width], graph.nodes[i // width]) for i in best]


@dataclass(frozen=True)
class PathEffect:
    """The effect of a path's first node on its last through those between, and only these."""

    path: tuple[Node, ...]
    predicted: float
    """Product of the edges, each but the first per unit of its source's activation."""
    measured: float


def path_effect(
    graph: AttributionGraph, replay: Replay, path: Sequence[Node], *, live: bool = False
) -> PathEffect:
    """Ablate the first node of a path and let only the next ones answer, one after the other.

    Args:
        graph: the graph.
        replay: the prompt that can be run again, with the graph's target.
        path: two nodes or more, sources before targets.
        live: measure with patterns, norms and MLPs that follow, else with frozen ones.

    Raises:
        ValueError: if the path has fewer than two nodes, or an edge is missing.
    """
    if len(path) < 2:
        raise ValueError(f"path has {len(path)} nodes: a path has two or more")
    for source, target in pairwise(path):
        if graph.edge(source, target) == 0:
            raise ValueError(f"there is no edge from {source.id} to {target.id}")
    predicted = graph.edge(path[0], path[1])
    for source, target in pairwise(path[1:]):
        predicted *= graph.edge(source, target) / float(graph.activations[graph.index(source)])
    before = replay.base
    held, change = 0.0, 0.0
    for i, (source, target) in enumerate(pairwise(path)):
        if i:
            held = float(graph.activations[graph.index(source)]) + change
        after = replay.run({source: held}, live=live, direct=True)
        change = _value(replay, after, target) - _value(replay, before, target)
    return PathEffect(tuple(path), predicted, -change)


def _value(replay: Replay, measured: Measured, node: Node) -> float:
    """A node's pre-activation in a run."""
    if node in replay.output.nodes:
        return float(measured.targets[replay.output.nodes.index(node)])
    return float(measured.pre_activations[replay.replacement.places[node]])
