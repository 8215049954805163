"""Nodes in groups: by hand, by behaviour label, and the graph of the groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph, Node


def with_supernodes(
    graph: AttributionGraph, groups: Mapping[str, Sequence[Node]]
) -> AttributionGraph:
    """A graph with groups of nodes, in place of those that it had.

    Raises:
        ValueError: if a node is not in the graph or in two groups, or a group is empty.
    """
    seen: dict[Node, str] = {}
    for name, group in groups.items():
        if not group:
            raise ValueError(f"supernode {name!r} is empty")
        for node in group:
            graph.index(node)
            if node in seen:
                raise ValueError(f"{node.id} is in supernodes {seen[node]!r} and {name!r}")
            seen[node] = name
    return replace(graph, supernodes={name: tuple(group) for name, group in groups.items()})


def group_by_label(
    graph: AttributionGraph, labels: Mapping[tuple[int, int], str], *, by_position: bool = True
) -> AttributionGraph:
    """Groups of heads with the same behaviour.

    Args:
        graph: the graph.
        labels: behaviours, by layer and head, as `lorsa_lens.analysis` finds them.
        by_position: whether heads of one layer at different tokens are different groups.
    """
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        label = labels.get((node.layer, node.index)) if node.kind == "head" else None
        if label is not None:
            name = f"{label}, L{node.layer}"
            groups.setdefault(f"{name}@{node.pos}" if by_position else name, []).append(node)
    return with_supernodes(graph, groups)


@dataclass(frozen=True, eq=False)
class SupernodeGraph:
    """A graph whose nodes are groups, and single nodes that are in none."""

    names: tuple[str, ...]
    """Of groups; ids of single nodes."""
    edges: Float[Tensor, "target source"]
    """Sums of the direct effects between the members."""


def supernode_graph(graph: AttributionGraph) -> SupernodeGraph:
    """Add up the edges between groups."""
    group_of = {node: name for name, group in graph.supernodes.items() for node in group}
    of_node = [group_of.get(node, node.id) for node in graph.nodes]
    names = tuple(dict.fromkeys(of_node))
    member = torch.zeros(len(names), len(of_node), dtype=graph.edges.dtype)
    for column, name in enumerate(of_node):
        member[names.index(name), column] = 1.0
    return SupernodeGraph(names, member @ graph.edges @ member.mT)
