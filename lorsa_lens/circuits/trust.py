"""How far a graph can be believed: what it predicts against what the model does."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.first_order import first_order_effects
from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.circuits.influence import node_influence
from lorsa_lens.circuits.interventions import (
    ablate,
    edge_effects,
    intervene,
    top_edges,
)
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.circuits.replay import Replay
from lorsa_lens.circuits.scores import graph_scores
from lorsa_lens.circuits.targets import Target


@dataclass(frozen=True)
class Agreement:
    """Predicted against measured numbers."""

    correlation: float
    """Pearson's; NaN for fewer than two numbers or where all are equal."""
    sign_agreement: float
    """Share of the predictions of the right sign."""
    largest_error: float
    """Largest difference, relative to the largest prediction."""
    n: int


def agreement(predicted: Float[Tensor, " effect"], measured: Float[Tensor, " effect"]) -> Agreement:
    """Compare predictions with measurements."""
    n = len(predicted)
    if not n:
        return Agreement(float("nan"), float("nan"), float("nan"), 0)
    correlation = torch.tensor(float("nan"))
    if n > 1:
        centred = torch.stack([predicted - predicted.mean(), measured - measured.mean()])
        norms = centred.norm(dim=1)
        correlation = (centred[0] @ centred[1]) / (norms[0] * norms[1])
    largest = predicted.abs().max().clamp(min=torch.finfo(predicted.dtype).tiny)
    return Agreement(
        correlation=float(correlation),
        sign_agreement=float((predicted.sign() == measured.sign()).double().mean()),
        largest_error=float((predicted - measured).abs().max() / largest),
        n=n,
    )


@dataclass(frozen=True)
class TrustReport:
    """What a graph predicts against what was measured, and how much it explains."""

    edges_frozen: Agreement
    """Direct effects, patterns, norms and selections frozen: right to rounding, or the graph is
    wrong."""
    edges_live: Agreement
    """Direct effects with all of these following: what freezing hides."""
    nodes_live: Agreement
    """Effects of ablating nodes on the targets, everything after them following, against what the
    frozen model predicts."""
    nodes_first_order: Agreement
    """The same against `first_order_effects`: what remains is curvature."""
    replacement: float
    completeness: float

    def __str__(self) -> str:
        rows = [
            ("edges, frozen", self.edges_frozen),
            ("edges, live", self.edges_live),
            ("nodes, live", self.nodes_live),
            ("first order", self.nodes_first_order),
        ]
        lines = [f"{'':14}  Pearson  same sign  largest error    n"]
        lines += [
            f"{name:14}  {a.correlation:7.3f}  {a.sign_agreement:9.0%}  {a.largest_error:13.1e}"
            f"  {a.n:3d}"
            for name, a in rows
        ]
        scores = f"replacement {self.replacement:.3f}, completeness {self.completeness:.3f}"
        return "\n".join([*lines, scores])


def trust_report(
    replacement: LocalReplacement,
    graph: AttributionGraph,
    target: Target | None = None,
    *,
    n_edges: int = 50,
    n_nodes: int = 20,
) -> TrustReport:
    """Ablate sources of a graph's strongest edges, and its strongest nodes, in the model itself.

    Args:
        replacement: the prompt.
        graph: its graph.
        target: what the graph explains. None: `Target.top_probability()`.
        n_edges: how many edges to measure.
        n_nodes: how many heads, features and MLPs to ablate.

    Raises:
        ValueError: if a number is not positive.
    """
    for name, number in (("n_edges", n_edges), ("n_nodes", n_nodes)):
        if number < 1:
            raise ValueError(f"{name} = {number} must be positive")
    replay = Replay(replacement, target)
    edges = top_edges(graph, n_edges)
    found = [edge_effects(graph, replay, edges, live=live) for live in (False, True)]
    frozen, live = (agreement(effects.predicted, effects.measured) for effects in found)
    scores = graph_scores(graph)
    nodes = top_units(graph, n_nodes)
    predicted, measured = _ablations(replacement, replay, nodes)
    followed = first_order_effects(replay)
    to_first_order = torch.tensor([followed.of(node) for node in nodes], dtype=predicted.dtype)
    return TrustReport(
        edges_frozen=frozen,
        edges_live=live,
        nodes_live=agreement(predicted, measured),
        nodes_first_order=agreement(to_first_order, measured),
        replacement=scores.replacement,
        completeness=scores.completeness,
    )


def top_units(graph: AttributionGraph, n: int) -> list[Node]:
    """The heads, features and MLPs of the most influence, the strongest first."""
    scores = node_influence(graph)
    units = [i for i, n in enumerate(graph.nodes) if not n.is_leaf and n.kind != "logit"]
    best = sorted(units, key=lambda i: -float(scores[i]))[:n]
    return [graph.nodes[i] for i in best]


def _ablations(
    replacement: LocalReplacement, replay: Replay, nodes: list[Node]
) -> tuple[Tensor, Tensor]:
    """Predicted and measured changes of the targets, together by weight, for each ablated node."""
    weights = replay.output.weights
    n_targets = len(weights)
    effects = [intervene(replacement, ablate([node]), replay=replay, live=True) for node in nodes]
    empty = weights.new_zeros(0)
    predicted = [effect.predicted[-n_targets:] @ weights for effect in effects]
    measured = [effect.measured[-n_targets:] @ weights for effect in effects]
    return (torch.stack(predicted), torch.stack(measured)) if nodes else (empty, empty)
