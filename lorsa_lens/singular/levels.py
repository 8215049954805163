"""Two levels of one model: the same firing through attention heads and through a Lorsa's circuits.

Both levels read the same stream, so both are explained by the same upstream components: the host's
attention heads by source token, MLPs, biases, embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.basis import haar
from lorsa_lens.singular.greedy import Explanation, Greedy
from lorsa_lens.singular.merging import jaccard
from lorsa_lens.singular.qk_head import QKHead, QKReading
from lorsa_lens.singular.read_in import Side
from lorsa_lens.singular.seeds import written_by
from lorsa_lens.singular.selection import attention_threshold
from lorsa_lens.singular.stream import Stream

SIDES: tuple[Side, Side] = ("dest", "src")
SPAN_TOLERANCE = 1e-6
"""Singular values below this share of the largest span nothing."""

N_ROTATIONS = 20
"""Rotations that make up the null of a subspace overlap."""


@dataclass(frozen=True, kw_only=True)
class SideAgreement:
    """One side of one Lorsa circuit's firing, against the attention heads' of the same firing."""

    jaccard: float
    """Of the selected components: its own, and the union of the attention heads'."""
    pearson: float
    """Correlation of the attributed mass per component: its own, and the attention heads' sum."""
    overlap: float
    """Mean squared cosine between the span of its selected vectors and that of the heads'."""
    overlap_null: float
    """The same for as many vectors of randomly rotated bases of the circuit."""
    ablated: float
    """Its attention weight when what the attention heads' edges say is gone from what it reads."""
    ablated_original: float
    """The mean attention weight of the attention heads when what its edges say is gone."""
    n_selected: int
    """Pairs of component and vector that it needs."""
    n_selected_original: float
    """The mean over attention heads."""


@dataclass(frozen=True, kw_only=True)
class HeadComparison:
    """One Lorsa circuit's firing against the attention heads' of the same firing."""

    qk_head: int
    attention: float
    nearest_head: int
    """The attention head whose pattern at the query is nearest."""
    pattern_distance: float
    """Total variation distance to it: 0 equal, 1 disjoint."""
    sides: dict[Side, SideAgreement]


@dataclass(frozen=True, kw_only=True)
class LevelComparison:
    """One firing, explained on both levels."""

    layer: int
    dest: int
    src: int
    heads: tuple[int, ...]
    """Attention heads that attend, and their weights."""
    head_attention: tuple[float, ...]
    comparisons: tuple[HeadComparison, ...]
    """One for each circuit of the Lorsa that attends."""

    def mean(self, side: Side, name: str) -> float:
        """The mean of a field of `SideAgreement` over the circuits; NaN if there are none."""
        values = [getattr(comparison.sides[side], name) for comparison in self.comparisons]
        return sum(values) / len(values) if values else float("nan")


@torch.no_grad()
def compare_levels(
    stream: Stream, lorsa: Lorsa, dest: int, src: int, *, method: Greedy | None = None
) -> LevelComparison:
    """Explain attention from one token to another on both levels, and compare.

    Heads and circuits take part if their attention weight reaches the method's threshold.

    Args:
        stream: the prompt, of the host without splice.
        lorsa: of the layer, made or trained on this host.
        dest: position of the query.
        src: position of the key.
        method: how firings are explained. None: `Greedy()`.

    Raises:
        ValueError: if the Lorsa has no layer, or the prompt has no such positions.
    """
    if lorsa.cfg.layer is None:
        raise ValueError("the Lorsa's cfg.layer is None: say which layer it belongs to")
    if not 0 <= src <= dest < stream.n_pos:
        raise ValueError(f"dest = {dest}, src = {src}: give 0 <= src <= dest <= {stream.n_pos - 1}")
    method, layer = method or Greedy(), lorsa.cfg.layer
    n_heads = len(stream.layers[layer].weights.W_Q)
    originals = [stream.reading(layer, head) for head in range(n_heads)]
    circuits = [
        stream.read(QKHead.from_lorsa(lorsa, head, model=stream.model))
        for head in range(lorsa.cfg.n_qk_heads)
    ]
    heads = [r for r in originals if _attends(r, dest, src)]
    found = {
        side: [_explained(stream, r, dest, src, side, method) for r in heads] for side in SIDES
    }
    comparisons = [
        _compare(stream, reading, originals, found, dest, src, method)
        for reading in circuits
        if heads and _attends(reading, dest, src)
    ]
    return LevelComparison(
        layer=layer,
        dest=dest,
        src=src,
        heads=tuple(reading.head.index for reading in heads),
        head_attention=tuple(reading.pattern[dest, src].item() for reading in heads),
        comparisons=tuple(comparisons),
    )


@dataclass(frozen=True, kw_only=True)
class _Explained:
    """One head's side of the firing."""

    reading: QKReading
    explanation: Explanation
    mass: Float[Tensor, " component"]
    """Integrated gradients, summed over vectors."""


def _attends(reading: QKReading, dest: int, src: int) -> bool:
    threshold = attention_threshold(int(reading.visible[dest].sum()))
    return reading.pattern[dest, src].item() >= threshold


def _explained(
    stream: Stream, reading: QKReading, dest: int, src: int, side: Side, method: Greedy
) -> _Explained:
    terms = method.terms(stream, reading, dest, side)
    gradients = terms.weighted(method.softmax(reading, dest, src).gradient(terms.raw))
    return _Explained(
        reading=reading,
        explanation=method.explain_side(stream, reading, dest, src, side),
        mass=reduce(gradients, "(component k) -> component", "sum", k=terms.n_vectors),
    )


def _compare(
    stream: Stream,
    reading: QKReading,
    originals: Sequence[QKReading],
    found: dict[Side, list[_Explained]],
    dest: int,
    src: int,
    method: Greedy,
) -> HeadComparison:
    distances = [
        (reading.pattern[dest] - original.pattern[dest]).abs().sum().item() / 2
        for original in originals
    ]
    nearest = min(range(len(distances)), key=distances.__getitem__)
    sides = {}
    for side in SIDES:
        own = _explained(stream, reading, dest, src, side, method)
        sides[side] = _agreement(stream, own, found[side], dest, src, side)
    return HeadComparison(
        qk_head=reading.head.index,
        attention=reading.pattern[dest, src].item(),
        nearest_head=originals[nearest].head.index,
        pattern_distance=distances[nearest],
        sides=sides,
    )


def _agreement(
    stream: Stream, own: _Explained, others: list[_Explained], dest: int, src: int, side: Side
) -> SideAgreement:
    union = {component for other in others for component in other.explanation.vectors}
    masses = torch.stack((own.mass, sum((o.mass for o in others), torch.zeros_like(own.mass))))
    spanned = _span(torch.cat([_selected(other, side) for other in others], dim=1))
    mine = _selected(own, side)
    position = dest if side == "dest" else src
    said = sum(
        (_said(stream, other, side, position) for other in others), torch.zeros_like(spanned[:, 0])
    )
    without = [
        _weight_without(stream, other.reading, _said(stream, own, side, position), dest, src, side)
        for other in others
    ]
    counts = [len(other.explanation.removal.indices) for other in others]
    return SideAgreement(
        jaccard=jaccard(own.explanation.vectors, union),
        pearson=torch.corrcoef(masses)[0, 1].item(),
        overlap=_overlap(_span(mine), spanned),
        overlap_null=_overlap_null(own.reading, mine.shape[1], spanned, side),
        ablated=_weight_without(stream, own.reading, said / len(others), dest, src, side),
        ablated_original=sum(without) / len(without),
        n_selected=len(own.explanation.removal.indices),
        n_selected_original=sum(counts) / len(counts),
    )


def _directions(reading: QKReading, side: Side) -> Float[Tensor, "d_model k"]:
    return reading.head.basis.U if side == "dest" else reading.head.basis.V


def _selected(explained: _Explained, side: Side) -> Float[Tensor, "d_model n"]:
    """The singular vectors that an explanation selected, for any component."""
    vectors = {v for chosen in explained.explanation.vectors.values() for v in chosen}
    return _directions(explained.reading, side)[:, sorted(vectors)]


def _span(vectors: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of what some unit vectors span."""
    if vectors.shape[1] == 0:
        return torch.zeros_like(vectors[:, :1]) if len(vectors) else vectors
    U, S, _ = torch.linalg.svd(vectors, full_matrices=False)
    rank = int((S / S[0] > SPAN_TOLERANCE).sum())
    spanned: Tensor = U[:, :rank]
    return spanned


def _overlap(a: Float[Tensor, "d_model m"], b: Float[Tensor, "d_model n"]) -> float:
    """Mean squared cosine between two subspaces, over the directions of the smaller one."""
    return ((a.mT @ b).square().sum() / min(a.shape[1], b.shape[1])).item()


def _overlap_null(
    reading: QKReading, n: int, spanned: Float[Tensor, "d_model rank"], side: Side
) -> float:
    """The overlap of the first `n` vectors of rotated bases, mean over rotations."""
    directions = _directions(reading, side)
    values = [
        _overlap(_span(directions @ haar(directions.shape[1], seed)[:, :n]), spanned)
        for seed in range(N_ROTATIONS)
    ]
    return sum(values) / len(values)


def _said(
    stream: Stream, explained: _Explained, side: Side, position: int
) -> Float[Tensor, " d_model"]:
    """What selected components say through selected vectors, in the head's normalized input."""
    norm = stream.layers[explained.reading.head.layer].norm
    directions = _directions(explained.reading, side)
    total = torch.zeros_like(directions[:, 0])
    for component, vectors in explained.explanation.vectors.items():
        if component.kind == "offset":
            continue
        written = written_by(stream, component, position)
        share = norm.share(written.expand(stream.n_pos, -1))[position]
        chosen = directions[:, list(vectors)]
        total += chosen @ (chosen.mT @ share)
    return total


def _weight_without(
    stream: Stream,
    reading: QKReading,
    said: Float[Tensor, " d_model"],
    dest: int,
    src: int,
    side: Side,
) -> float:
    """The attention weight of a head whose query (or key) does not read something."""
    layer = stream.layers[reading.head.layer]
    x = layer.qk_input.clone()
    x[dest if side == "dest" else src] -= said
    changed = reading.head.reading(x, positions=stream.positions, keep=layer.keep)
    raw = reading.raw.clone()
    if side == "dest":
        raw[dest] = changed.q[dest] @ reading.k.mT / reading.head.divisor
    else:
        raw[:, src] = reading.q @ changed.k[src] / reading.head.divisor
    return torch.softmax(reading.scores(raw)[dest], dim=-1)[src].item()
