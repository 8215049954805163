"""Signals: what an edge says, as a vector in the space that its reader reads."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from lorsa_lens.singular.graph import Edge
from lorsa_lens.singular.interventions import check_edges, coordinates, firing_of, written
from lorsa_lens.singular.stream import Stream

Flavour = Literal["read", "normalized", "raw"]


def signal(stream: Stream, edge: Edge, *, flavour: Flavour = "read") -> Float[Tensor, " d_model"]:
    """The part of what a component writes that lies in the edge's singular vectors.

    Args:
        stream: the prompt on which the edge was found.
        edge: into a head.
        flavour: `read`: what counts for the score, normalized and rotated as the head does it;
            `normalized`: the projection of the component's share of the normalized stream;
            `raw`: the projection of what the component writes.

    Raises:
        ValueError: for an edge to the root, or of biases that nobody writes, or an unknown flavour.
    """
    if flavour not in get_args(Flavour):
        raise ValueError(f"flavour = {flavour!r} must be one of {get_args(Flavour)}")
    check_edges([edge], "exact" if flavour == "read" else "local")
    firing, position, vectors = firing_of(edge), edge.up.dest, list(edge.vectors)
    basis = stream.reading(firing.layer, firing.head).head.basis
    directions = (basis.U if edge.side == "dest" else basis.V)[:, vectors]
    if flavour == "read":
        parts = coordinates(stream, edge)[vectors]
        return directions @ (parts / basis.S[vectors] if edge.side == "dest" else parts)
    vector = written(stream, edge)
    if flavour == "normalized":
        norm = stream.layers[firing.layer].norm
        vector = norm.share(vector.expand(stream.n_pos, -1))[position]
    return directions @ (directions.mT @ vector)
