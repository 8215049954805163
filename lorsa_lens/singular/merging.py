"""Circuits of many prompts: merged, pruned, and grouped by likeness."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lorsa_lens.singular.graph import Circuit, Edge, Node, circuit_of


def merge(circuits: Sequence[Circuit]) -> Circuit:
    """The union of circuits of prompts in which positions mean the same.

    An edge's weight, and a head's attention, is the mean over the prompts in which it appears
    (`n_prompts`); its vectors are all that it had, those of most prompts first.

    Raises:
        ValueError: if there is none.
    """
    if not circuits:
        raise ValueError("circuits is empty: give at least one")
    edges: dict[tuple[Node, Node, str], list[Edge]] = {}
    weights: dict[Node, list[float]] = {}
    counts: dict[Node, int] = {}
    for circuit in circuits:
        for edge in circuit.edges:
            edges.setdefault((edge.up, edge.down, edge.side), []).append(edge)
        for node in circuit.nodes:
            counts[node] = counts.get(node, 0) + 1
        for node, weight in circuit.attention.items():
            weights.setdefault(node, []).append(weight)
    return circuit_of(
        [_mean_edge(group) for group in edges.values()],
        attention={node: sum(values) / len(values) for node, values in weights.items()},
        meta={
            "n_prompts": len(circuits),
            "node_prompts": {node.id: count for node, count in counts.items()},
        },
    )


def prune_by_frequency(merged: Circuit, share: float) -> Circuit:
    """Keep nodes that appear in at least this share of the prompts, and what then reaches a root.

    Raises:
        ValueError: if the circuit was not merged, or `share` is not between 0 and 1.
    """
    if "node_prompts" not in merged.meta:
        raise ValueError("circuit was not merged: give what merge() returned")
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share} must be between 0 and 1")
    counts, least = merged.meta["node_prompts"], share * merged.meta["n_prompts"]
    kept = {node for node in merged.nodes if counts[node.id] >= least}
    return _connected(merged, [e for e in merged.edges if e.up in kept and e.down in kept])


def prune_by_effect(circuit: Circuit, effect: Callable[[Edge], float], least: float) -> Circuit:
    """Keep edges whose ablation does something, and what then reaches a root.

    Args:
        circuit: one prompt's, or a merged one.
        effect: of an edge into a head, for example the change of the logit difference, from
            `intervene`; its mean over prompts for a merged circuit. Edges to the root stay.
        least: the smallest absolute effect that counts.
    """
    edges = [edge for edge in circuit.edges if edge.down.head is None or abs(effect(edge)) >= least]
    return _connected(circuit, edges)


def cluster(circuits: Sequence[Circuit], n_clusters: int, *, edges: bool = False) -> list[int]:
    """Group prompts by circuit: average linkage on the Jaccard distance of their nodes.

    Args:
        circuits: of prompts in which positions mean the same.
        n_clusters: how many groups.
        edges: compare edges instead of nodes.

    Returns:
        The group of every circuit, numbered in the order in which they first appear.

    Raises:
        ValueError: if there are fewer circuits than groups.
    """
    if not 1 <= n_clusters <= len(circuits):
        raise ValueError(f"n_clusters = {n_clusters} must be 1 to {len(circuits)}")
    sets = [_edge_keys(circuit) if edges else set(circuit.nodes) for circuit in circuits]
    distances = [[1 - jaccard(a, b) for b in sets] for a in sets]
    groups = [[number] for number in range(len(circuits))]
    while len(groups) > n_clusters:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        i, j = min(pairs, key=lambda pair: _linkage(distances, groups[pair[0]], groups[pair[1]]))
        groups[i] += groups.pop(j)
    groups.sort(key=min)
    return [
        next(number for number, group in enumerate(groups) if member in group)
        for member in range(len(circuits))
    ]


def jaccard(a: Iterable[object], b: Iterable[object]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0


def _linkage(distances: list[list[float]], a: list[int], b: list[int]) -> float:
    return sum(distances[i][j] for i in a for j in b) / (len(a) * len(b))


def _edge_keys(circuit: Circuit) -> set[tuple[Node, Node, str]]:
    return {(edge.up, edge.down, edge.side) for edge in circuit.edges}


def _mean_edge(group: list[Edge]) -> Edge:
    counts: dict[int, int] = {}
    for edge in group:
        for vector in edge.vectors:
            counts[vector] = counts.get(vector, 0) + 1
    return replace(
        group[0],
        weight=sum(edge.weight for edge in group) / len(group),
        vectors=tuple(sorted(counts, key=lambda vector: (-counts[vector], vector))),
        n_prompts=len(group),
    )


def _connected(circuit: Circuit, edges: list[Edge]) -> Circuit:
    """The circuit of those edges from which a root can be reached."""
    reached = {node for node in circuit.nodes if node.kind == "root"}
    grown = True
    while grown:
        new = {edge.up for edge in edges if edge.down in reached} - reached
        reached |= new
        grown = bool(new)
    kept = [edge for edge in edges if edge.down in reached]
    return circuit_of(kept, attention=circuit.attention, tokens=circuit.tokens, meta=circuit.meta)
