"""A model with Lorsas in place of its attention, read off its weights as a program."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.analysis.sources import head_name
from lorsa_lens.circuits.global_circuit import GlobalCircuit
from lorsa_lens.circuits.global_tables import circuit_name, end_table

LOOKS_AT = 0.25
"""A circuit looks at a distance if this much of its pattern lies there, by positions alone."""

ALIGNED = 0.3
"""A circuit looks for the token at hand among what lower heads fetched if the alignment is this."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a query-key circuit does, as its weights tell."""

    layer: int
    circuit: int
    distances: dict[int, float]
    """Tokens back to where it looks by positions alone, with the share of its pattern there."""
    matches: dict[tuple[int, int], float]
    """Circuits of lower layers (layer, circuit) among whose heads it finds the token at hand, with
    the sum of their matches, in units of scores."""
    alignments: dict[tuple[int, int], float]
    """Of these: see `alignments`."""

    @property
    def name(self) -> str:
        """As `L1.qk3`."""
        return circuit_name(self.layer, self.circuit)


@torch.no_grad()
def alignments(
    circuit: GlobalCircuit, low: int, high: int, *, offset: int = 1
) -> Float[Tensor, "low_circuit high_circuit"]:
    """How purely circuits look for their query's own token among what lower circuits fetched.

    With `T = W_Q R W_K^T sum_i w_O^i w_V^i` over the heads of a lower circuit, the score of token
    t' with a key to which token t was fetched is `e_t' T e_t`. The alignment is the mean of its
    diagonal over the root mean square of all its entries, divided by what the identity gives: 1 if
    equal tokens, and only they, attract each other; about 0 for unrelated weights, -1 if they
    repel.

    Args:
        circuit: the model's Lorsas.
        low: layer of the lower circuits.
        high: layer of the upper ones.
        offset: tokens from key to query, where positions are rotary.
    """
    below, above = circuit.layers[low], circuit.layers[high]
    C = circuit.embeddings.token_covariance
    rank = C.trace().square() / C.square().sum()
    rotate_query, rotate_key = above.rotation(offset)
    rows = []
    for first in range(0, below.n_heads, below.group_size):
        group = slice(first, first + below.group_size)
        moved = below.W_O[group].mT @ below.W_V[:, group].mT
        row = []
        for query, key in zip(above.queries, above.keys, strict=True):
            T = rotate_query(query.W) @ rotate_key(key.W).mT @ moved
            size = ((T.mT @ C @ T) * C).sum().clamp(min=1e-30).sqrt()
            row.append((T * C).sum() / (size * rank.sqrt()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@torch.no_grad()
def roles(circuit: GlobalCircuit, *, offset: int = 1) -> list[Role]:
    """What every query-key circuit does, lowest layer first.

    Args:
        circuit: the model's Lorsas.
        offset: tokens from key to query, where positions are rotary.
    """
    found = []
    for layer, folded in circuit.layers.items():
        distances = circuit.distances(layer)
        aligned: dict[tuple[int, int], Tensor] = {}
        matched: dict[tuple[int, int], Tensor] = {}
        for low in (low for low in circuit.layers if low < layer):
            matches = circuit.matches(low, layer, "key", offset=offset)
            size = circuit.layers[low].group_size
            for group, row in enumerate(alignments(circuit, low, layer, offset=offset)):
                aligned[low, group] = row
                matched[low, group] = matches[group * size : (group + 1) * size].sum(0)
        for number in range(len(folded.circuits)):
            sources = [place for place, row in aligned.items() if row[number] >= ALIGNED]
            shares = enumerate(distances[number].tolist())
            found.append(
                Role(
                    layer=layer,
                    circuit=number,
                    distances={back: share for back, share in shares if share >= LOOKS_AT},
                    matches={place: matched[place][number].item() for place in sources},
                    alignments={place: aligned[place][number].item() for place in sources},
                )
            )
    return found


def program(
    circuit: GlobalCircuit,
    *,
    strings: Sequence[str] | None = None,
    offset: int = 1,
    n_heads: int = 4,
) -> str:
    """The model as a program in plain words: what each circuit looks at, what its heads move.

    Args:
        circuit: the model's Lorsas.
        strings: of all tokens.
        offset: tokens from key to query, where positions are rotary.
        n_heads: heads of each layer that are shown; those that write most.
    """
    found = roles(circuit, offset=offset)
    back = {(role.layer, role.circuit): role.distances for role in found}
    lines = []
    for layer, folded in circuit.layers.items():
        lines.append(f"layer {layer}: {folded.n_heads} heads in {len(folded.circuits)} circuits")
        lines += [f"  {_sentence(role, back)}" for role in found if role.layer == layer]
        copying = circuit.copying(layer)
        copies, total = int((copying > 0).sum()), copying.sum().item()
        lines.append(
            f"  {copies} of {folded.n_heads} heads raise the token they read; together {total:+.1f}"
        )
        lines += [
            f"    {row['head']} reads {row['reads']}, raises {row['raises']} by {row['logit']:.2f}"
            for row in end_table(circuit, layer, strings=strings, n=n_heads).to_dict("records")
        ]
        lines += _composing(circuit, layer, offset, n_heads)
    return "\n".join(lines)


def _sentence(role: Role, back: dict[tuple[int, int], dict[int, float]]) -> str:
    said = []
    if role.distances:
        ordered = sorted(role.distances.items(), key=lambda entry: -entry[1])
        places = ", ".join(f"{distance} back ({share:.2f})" for distance, share in ordered)
        said.append(f"by positions alone it looks {places}")
    if role.matches:
        strongest = sorted(role.matches, key=lambda place: -role.matches[place])
        parts = []
        for place in strongest:
            reach = "/".join(map(str, sorted(back[place]))) or "?"
            parts.append(
                f"{circuit_name(*place)} ({reach} back; match {role.matches[place]:+.1f}, "
                f"alignment {role.alignments[place]:.2f})"
            )
        said.append("it looks for the token at hand among what was fetched by " + ", ".join(parts))
    return f"{role.name}: {'; '.join(said) or 'nothing that weights alone tell'}"


def _composing(circuit: GlobalCircuit, layer: int, offset: int, n: int) -> list[str]:
    """The strongest matches of lower heads on the key side of a layer's circuits."""
    lines = []
    for low in (low for low in circuit.layers if low < layer):
        matches = circuit.matches(low, layer, "key", offset=offset)
        n_circuits = matches.shape[1]
        top = matches.flatten().topk(min(n, matches.numel()))
        names = [
            f"{head_name(low, place // n_circuits)} -> {circuit_name(layer, place % n_circuits)} "
            f"({value:+.2f})"
            for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        lines.append(f"  through keys: {', '.join(names)}")
    return lines
