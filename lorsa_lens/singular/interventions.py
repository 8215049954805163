"""Ablate or boost what an edge says, and see what the model does.

* `exact`: subtract from the rotated query (or key) what the component adds through the edge's
  vectors. The raw score then changes by exactly the attributed amount, whatever the architecture.
* `local`: subtract the component's projection onto the vectors from what the query (or key) is
  made from, as published. Under rotary positions that is not what was attributed; a key that
  several heads share changes for all of them.
* `global`: subtract the projection where the component writes it, for everything downstream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.singular.breakdown import break_down
from lorsa_lens.singular.components import Component, Firing
from lorsa_lens.singular.edits import Edit, edited
from lorsa_lens.singular.graph import Edge
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.singular.seeds import check_position, check_tokens, written_by
from lorsa_lens.singular.stream import Stream

Mode = Literal["exact", "local", "global"]


@dataclass(frozen=True, kw_only=True)
class EdgeEffect:
    """What an intervention did to one edge."""

    edge: Edge
    attention_before: float
    attention_after: float
    score_before: float
    """Raw score, before cap and bias."""
    score_after: float
    attributed: float
    """What the edge's vectors add to the raw score."""
    cosine: float
    """Between the vector that was touched before and after: the query or key (`exact`), what it is
    made from (`local`), what the component's module writes (`global`)."""
    norm_ratio: float
    """Length of the touched vector, after over before."""
    delta_norm: float
    """Length of what was subtracted or added."""


@dataclass(frozen=True, kw_only=True)
class InterventionReport:
    """What an intervention on one or several edges did."""

    mode: Mode
    boost: bool
    effects: tuple[EdgeEffect, ...]
    logit_difference_before: float | None
    logit_difference_after: float | None


@torch.no_grad()
def intervene(
    stream: Stream,
    edges: Edge | Sequence[Edge],
    *,
    mode: Mode = "exact",
    boost: bool = False,
    answer: int | Sequence[int] | None = None,
    wrong: int | Sequence[int] | None = None,
    position: int = -1,
) -> InterventionReport:
    """Run the prompt without (or with twice) what some edges say, all at once.

    Args:
        stream: the prompt on which the edges were found.
        edges: one or several edges into heads.
        mode: `exact`, or one of the published ways, `local` and `global`.
        boost: add instead of subtract.
        answer: token, or tokens, whose logit counts. None: no logits are reported.
        wrong: token, or tokens, to compare with.
        position: where logits are read.

    Raises:
        ValueError: for an edge to the root, or from biases of the reading head itself where the
            mode needs somebody who writes them.
    """
    chosen = [edges] if isinstance(edges, Edge) else list(edges)
    if mode not in get_args(Mode):
        raise ValueError(f"mode = {mode!r} must be one of {get_args(Mode)}")
    check_edges(chosen, mode)
    sign = 1.0 if boost else -1.0
    deltas = [sign * delta_of(stream, edge, mode) for edge in chosen]
    edits, hooks = [], []
    for edge, delta in zip(chosen, deltas, strict=True):
        if mode == "global":
            hooks.append(_global_hook(edge, delta))
            edits.append(_watch(stream, edge))
        else:
            edits += _edits(stream, edge, delta, mode)
    with edited(stream, edits) as measured:
        logits = stream.model.run_with_hooks(  # type: ignore[operator]
            stream.tokens[None], fwd_hooks=hooks
        )
    effects = tuple(
        _effect(stream, edge, delta, mode, sign, measured)
        for edge, delta in zip(chosen, deltas, strict=True)
    )
    difference = partial(_logit_difference, stream, answer, wrong, position)
    return InterventionReport(
        mode=mode,
        boost=boost,
        effects=effects,
        logit_difference_before=difference(stream.logits),
        logit_difference_after=difference(logits[0].double()),
    )


def random_control(stream: Stream, edge: Edge, *, seed: int = 0) -> Edge:
    """The edge with as many random vectors from among those that it does not have.

    If fewer are left, with all of these.
    """
    firing = firing_of(edge)
    n_vectors = stream.reading(firing.layer, firing.head).head.basis.G_Q.shape[1]
    others = [vector for vector in range(n_vectors) if vector not in edge.vectors]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(others), generator=generator)[: len(edge.vectors)].tolist()
    return replace(edge, vectors=tuple(others[index] for index in drawn))


def delta_of(stream: Stream, edge: Edge, mode: Mode) -> Float[Tensor, " dim"]:
    """What an edge says, as a vector of the query or key (`exact`) or of the stream.

    In the stream it is seen as its reader sees it (`local`: centred, divided by the norm's scale)
    or as it is written (`global`: centred).
    """
    firing, position = firing_of(edge), _position(edge)
    reading = stream.reading(firing.layer, firing.head)
    basis, vectors = reading.head.basis, list(edge.vectors)
    if mode == "exact":
        parts = coordinates(stream, edge)[vectors]
        if edge.side == "dest":
            return parts @ basis.G_K[vectors]
        return basis.G_Q[:, vectors] @ parts
    norm = stream.layers[firing.layer].norm
    directions = (basis.U if edge.side == "dest" else basis.V)[:, vectors]
    signal = directions @ (directions.mT @ written(stream, edge))
    if mode == "local":
        return norm.share(signal.expand(stream.n_pos, -1))[position]
    return signal - signal.mean() if norm.centred else signal


def coordinates(stream: Stream, edge: Edge) -> Float[Tensor, " k"]:
    """The component's part of the rotated query (or key), in the head's basis."""
    firing = firing_of(edge)
    reading = stream.reading(firing.layer, firing.head)
    component, split = _component(edge), edge.up.kind in ("token", "position")
    side = break_down(stream, firing, edge.side, split_embedding=split)
    part = side.part(side.components.index(component))[:, firing.src]
    other = reading.b[firing.src] if edge.side == "dest" else reading.a[firing.dest]
    return part * reading.head.divisor / other


def _edits(stream: Stream, edge: Edge, delta: Tensor, mode: Mode) -> list[Edit]:
    firing = firing_of(edge)
    edit = Edit(layer=firing.layer, head=firing.head, side=edge.side, position=_position(edge))
    if mode == "exact":
        return [replace(edit, rotated=delta)]
    heads = [firing.head]
    if edge.side == "src":  # published: a key shared by several heads changes for all
        W_K = stream.layers[firing.layer].weights.W_K
        heads = [head for head in range(len(W_K)) if torch.equal(W_K[head], W_K[firing.head])]
    return [replace(edit, head=head, read=delta) for head in heads]


def _watch(stream: Stream, edge: Edge) -> Edit:
    """An edit that changes nothing, so that the head is measured."""
    firing = firing_of(edge)
    nothing = torch.zeros_like(stream.layers[firing.layer].x[0])
    return Edit(layer=firing.layer, head=firing.head, side="dest", position=0, read=nothing)


def _global_hook(edge: Edge, delta: Tensor) -> tuple[str, Any]:
    def add(output: Tensor, hook: Any) -> Tensor:
        del hook
        changed = output.clone()
        changed[:, _position(edge)] += delta.to(output)
        return changed

    return _writing_hook(edge), add


def _writing_hook(edge: Edge) -> str:
    kinds = {"head": "hook_attn_out", "bias": "hook_attn_out", "mlp": "hook_mlp_out"}
    return f"blocks.{edge.up.layer}.{kinds.get(edge.up.kind, 'hook_resid_pre')}"


def _effect(
    stream: Stream,
    edge: Edge,
    delta: Tensor,
    mode: Mode,
    sign: float,
    measured: dict[tuple[int, int], QKReading],
) -> EdgeEffect:
    firing = firing_of(edge)
    before = stream.reading(firing.layer, firing.head)
    after, at = measured[firing.layer, firing.head], (firing.dest, firing.src)
    touched = _touched(stream, edge, mode)
    changed = touched + delta
    exact = delta if mode == "exact" else sign * delta_of(stream, edge, "exact")
    if edge.side == "dest":
        attributed = exact @ before.k[firing.src]
    else:
        attributed = exact @ before.q[firing.dest]
    return EdgeEffect(
        edge=edge,
        attention_before=before.pattern[at].item(),
        attention_after=after.pattern[at].item(),
        score_before=before.raw[at].item(),
        score_after=after.raw[at].item(),
        attributed=sign * attributed.item() / before.head.divisor,
        cosine=torch.cosine_similarity(touched, changed, dim=0).item(),
        norm_ratio=(changed.norm() / touched.norm()).item(),
        delta_norm=delta.norm().item(),
    )


def _touched(stream: Stream, edge: Edge, mode: Mode) -> Float[Tensor, " dim"]:
    """The vector that the intervention changes, before."""
    firing, position = firing_of(edge), _position(edge)
    if mode == "exact":
        reading = stream.reading(firing.layer, firing.head)
        return reading.q[position] if edge.side == "dest" else reading.k[position]
    if mode == "local":
        return stream.layers[firing.layer].qk_input[position]
    layer = stream.layers[edge.up.layer]
    outputs = {"head": layer.attn_out, "bias": layer.attn_out, "mlp": layer.mlp_out}
    return outputs.get(edge.up.kind, stream.embedding)[position]


def _logit_difference(
    stream: Stream,
    answer: int | Sequence[int] | None,
    wrong: int | Sequence[int] | None,
    position: int,
    logits: Float[Tensor, "pos vocab"],
) -> float | None:
    if answer is None:
        return None
    row = logits[check_position(stream, position)]
    difference = row[check_tokens(stream, "answer", answer)].mean()
    if wrong is not None:
        difference = difference - row[check_tokens(stream, "wrong", wrong)].mean()
    return difference.item()


def firing_of(edge: Edge) -> Firing:
    """The firing that an edge into a head belongs to."""
    firing = edge.down.firing
    assert firing is not None  # checked before
    return firing


def _position(edge: Edge) -> int:
    return edge.up.dest


def written(stream: Stream, edge: Edge) -> Float[Tensor, " d_model"]:
    """What the edge's component writes to the stream, at its position."""
    return written_by(stream, _component(edge), _position(edge))


def _component(edge: Edge) -> Component:
    source = edge.up.src if edge.up.kind == "head" else None
    return Component(edge.up.layer, edge.up.kind, edge.up.head, source)  # type: ignore[arg-type]


def check_edges(edges: Sequence[Edge], mode: Mode) -> None:
    """Raise a ValueError for edges that an intervention cannot be on."""
    if not edges:
        raise ValueError("edges is empty: give one or several edges of a circuit")
    for edge in edges:
        if edge.down.firing is None:
            raise ValueError(
                f"the edge from {edge.up.id} goes to {edge.down.id}, which attends to nothing: "
                "give edges into heads"
            )
        if edge.up.kind == "offset" and mode != "exact":
            raise ValueError(
                f"the edge from {edge.up.id} is a bias of the head that reads it, which nobody "
                "writes to the stream: use mode = 'exact'"
            )
        if edge.up.kind == "head" and edge.up.src is None:
            raise ValueError(
                f"the edge from {edge.up.id} is of a whole head: interventions are on what a head "
                "read from one token"
            )
