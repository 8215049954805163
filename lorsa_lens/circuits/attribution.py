"""Attribution graphs: nodes found by their influence on what is explained, edges exact.

The prompt was run once, by `local_replacement`. Each batch of nodes sends its cotangents
[node, pos, d_model] back through the frozen layers once; no row needs a copy of the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import influence
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.circuits.stages import Reading
from lorsa_lens.circuits.targets import Output, Target

MAX_BYTES = 2 * 2**30
"""Memory that a graph may take unless another limit is given."""


class GraphSize(NamedTuple):
    """What a graph would take."""

    n_units: int
    """Heads, features and MLPs in it at most."""
    n_nodes: int
    """Nodes in it at most."""
    n_bytes: int
    """Memory, in bytes: effects of all nodes on those in it, and the batches on the way."""


def graph_size(
    replacement: LocalReplacement, *, n_nodes: int | Literal["all"] = 500, batch_size: int = 64
) -> GraphSize:
    """The size of a graph, known before it is made.

    Args:
        replacement: the prompt.
        n_nodes: as in `attribution_graph`.
        batch_size: as there.
    """
    n_all = len(replacement.nodes)
    n_units = sum(not node.is_leaf for node in replacement.nodes)
    n_leaves = n_all - n_units
    n_units = n_units if n_nodes == "all" else min(n_nodes, n_units)
    n_in = n_units + n_leaves + 10
    rows = (n_units + 10) * n_all
    batch = 6 * batch_size * replacement.stream.resid_final.numel()
    return GraphSize(n_units, n_in, 8 * (2 * rows + 2 * n_in**2 + batch))


@torch.no_grad()
def attribution_graph(
    replacement: LocalReplacement,
    target: Target | None = None,
    *,
    n_nodes: int | Literal["all"] = 500,
    batch_size: int = 64,
    max_bytes: int = MAX_BYTES,
    target_names: Sequence[str] | None = None,
    meta: Mapping[str, object] | None = None,
) -> AttributionGraph:
    """The graph of what leads to a target on one prompt.

    Targets first; then again and again those heads, features and MLPs that have the most influence
    on them by what is known so far, until there are `n_nodes`. Tokens, positions, biases and errors
    come on top. What the others give is in `missing`.

    Args:
        replacement: the prompt, frozen.
        target: what to explain. None: `Target.top_probability()`.
        n_nodes: how many heads, features and MLPs, or `all` that are at work.
        batch_size: nodes whose edges are found together.
        max_bytes: refuse to take more memory than this.
        target_names: the vocabulary as text, for labels of targets.
        meta: plain values to keep with the graph.

    Raises:
        ValueError: if a number is not positive, the graph would take more than `max_bytes`, or the
            target does not exist.
    """
    for name, number in (("n_nodes", n_nodes), ("batch_size", batch_size)):
        if isinstance(number, int) and number < 1:
            raise ValueError(f"{name} = {number} must be positive")
    size = graph_size(replacement, n_nodes=n_nodes, batch_size=batch_size)
    if size.n_bytes > max_bytes:
        raise ValueError(
            f"a graph of {size.n_nodes} nodes on this prompt would take "
            f"{size.n_bytes / 2**30:.1f} GiB, more than max_bytes = {max_bytes / 2**30:.1f} GiB: "
            f"lower n_nodes, shorten the prompt, or raise max_bytes"
        )
    target = target or Target.top_probability()
    output = Output(replacement.stream, target, target_names)
    grown = _grow(replacement, output, size.n_units, batch_size)
    made = {"target": target.to_dict(), "n_nodes": n_nodes, **(meta or {})}
    return _graph(replacement, output, grown, made)


class _Grown(NamedTuple):
    """Targets and units, and what every node gives them."""

    nodes: list[Node]
    effects: Float[Tensor, "target node"]
    reading: Reading


def _grow(replacement: LocalReplacement, output: Output, n_units: int, batch_size: int) -> _Grown:
    """Targets, and the units of the greatest influence on them."""
    found = list(output.nodes)
    n_all = len(replacement.nodes)
    first, reading = replacement.rows(found, output)
    effects = first.new_zeros(len(found) + n_units, n_all)
    effects[: len(found)] = first
    n_targets = len(found)
    constants, values = [reading.constants], [reading.pre_activations]
    # Rows of `effects` by the column of the same node; targets have no column.
    columns = torch.empty(0, dtype=torch.long)
    left = torch.tensor([not node.is_leaf for node in replacement.nodes])
    while len(found) < n_targets + n_units:
        n = min(batch_size, n_targets + n_units - len(found))
        if int(left.sum()) > n:
            known = effects[: len(found)]
            scores = influence(known, known.abs().sum(1), output.weights, columns)
            best = scores.masked_fill(~left, -1.0).topk(n).indices
        else:
            best = left.nonzero()[:, 0]
        left[best] = False
        batch = [replacement.nodes[i] for i in best.tolist()]
        rows, reading = replacement.rows(batch, output)
        effects[len(found) : len(found) + len(batch)] = rows
        constants.append(reading.constants)
        values.append(reading.pre_activations)
        columns = torch.cat([columns, best])
        found += batch
    none = reading.cotangents.new_zeros(0)
    return _Grown(found, effects, Reading(none, torch.cat(constants), torch.cat(values)))


def _graph(
    replacement: LocalReplacement, output: Output, grown: _Grown, meta: Mapping[str, object]
) -> AttributionGraph:
    """The graph of what was grown, with all leaves."""
    units = set(grown.nodes)
    kept = [node for node in replacement.nodes if node.is_leaf or node in units]
    nodes = (*kept, *output.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    rows = torch.tensor([place[node] for node in grown.nodes])
    columns = torch.tensor([replacement.places[node] for node in kept])
    zeros = grown.effects.new_zeros(len(nodes))
    edges = zeros.new_zeros(len(nodes), len(nodes))
    edges[rows[:, None], torch.arange(len(kept))] = grown.effects[:, columns]

    def column(values: Tensor) -> Float[Tensor, " node"]:
        return zeros.index_put((rows,), values)

    inside = edges[rows].sum(1)
    values = torch.cat([replacement.activations[columns], zeros.new_zeros(len(output.nodes))])
    n_targets = len(output.nodes)
    pre_activations = column(grown.reading.pre_activations)
    values[-n_targets:] = pre_activations[-n_targets:]
    weights = zeros.clone()
    weights[-n_targets:] = output.weights
    return AttributionGraph(
        nodes=nodes,
        activations=values,
        edges=edges,
        constants=column(grown.reading.constants),
        missing=column(grown.effects.sum(1) - inside),
        pre_activations=pre_activations,
        target_weights=weights,
        gross=column(grown.effects.abs().sum(1)),
        probabilities=output.probabilities,
        tokens=replacement.tokens,
        n_layers=len(replacement.stream.layers),
        labels=output.labels,
        meta=meta,
    )
