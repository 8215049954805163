"""What a head owes to where it attends: effects of nodes through queries and keys.

The edges of a graph hold patterns fixed, so what decides where a head looks has no edge into it: of
an induction circuit they show what is moved, not the previous-token head that says whence. Here the
pattern follows. If all scores `s` of a head's query grow together from 0 to what they are,

    z - z(0) = sum_k w[k] s[k],   w[k] = int_0^1 A[k] (v[k] - z) da,   A = softmax(cap(a s) + bias)

with values v as they are (integrated gradients, arXiv 1703.01365). A score is the product of a sum
over nodes at the query and a sum over nodes at the key (see `lorsa_lens.circuits.qk_tracing`). Each
pair's part is given half to either node (the Shapley value of a product), so that all parts, with
those of biases, sum to `z - z(0)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.attention_stages import LorsaStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.qk_parts import QKParts, qk_parts
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.singular.qk_head import QKHead, QKReading

N_STEPS = 512
"""Of the integral: its error falls with their square."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionEffects:
    """Effects of nodes on some heads through their patterns."""

    heads: tuple[Node, ...]
    nodes: tuple[Node, ...]
    query: Float[Tensor, "head node"]
    """Through the query."""
    key: Float[Tensor, "head node"]
    """Through the keys."""
    bias: Float[Tensor, " head"]
    """What biases of the head itself give, on both sides."""
    total: Float[Tensor, " head"]
    """`z - z(0)`: what the pattern makes of the head's activation."""

    def __repr__(self) -> str:
        return f"AttentionEffects(heads={len(self.heads)}, nodes={len(self.nodes)})"

    def effect(self, source: Node, head: Node) -> float:
        """What a node gives to a head through its pattern, on both sides.

        Raises:
            ValueError: if one is not here.
        """
        if head not in self.heads or source not in self.nodes:
            raise ValueError(f"no effect of {source.id} on {head.id} was asked for")
        row, column = self.heads.index(head), self.nodes.index(source)
        return float(self.query[row, column] + self.key[row, column])

    def strongest(self, head: Node, n: int = 5) -> list[tuple[Node, float]]:
        """The nodes of the largest effects on a head, by size."""
        row = self.heads.index(head)
        both = self.query[row] + self.key[row]
        order = both.abs().argsort(descending=True, stable=True)[:n].tolist()
        return [(self.nodes[i], float(both[i])) for i in order]


@torch.no_grad()
def attention_effects(replacement: LocalReplacement, heads: Sequence[Node]) -> AttentionEffects:
    """Effects of every node on Lorsa heads through queries and keys, norms frozen.

    Args:
        replacement: the prompt; layers below the heads have no attention that is passed through.
        heads: Lorsa heads at work on it.

    Raises:
        ValueError: if one is no Lorsa head at work on this prompt, or attention below is no node.
    """
    places = replacement.places
    size = (len(heads), len(places))
    query = replacement.activations.new_zeros(size)
    key, bias = torch.zeros_like(query), query.new_zeros(len(heads))
    total = torch.zeros_like(bias)
    for row, head in enumerate(heads):
        if head.kind != "head" or head not in places:
            raise ValueError(f"{head.id} is no Lorsa head at work on this prompt")
        reading, weights, total[row] = _weighted(replacement, head)
        sides = _sides(replacement, reading, head.pos, weights)
        for out, (parts, values) in zip((query, key), sides, strict=True):
            for node, value in zip(parts.nodes, values.tolist(), strict=True):
                if node is None or node not in places:
                    bias[row] += value / 2
                else:
                    out[row, places[node]] += value / 2
    return AttentionEffects(
        heads=tuple(heads),
        nodes=replacement.nodes,
        query=query,
        key=key,
        bias=bias,
        total=total,
    )


def _weighted(
    replacement: LocalReplacement, head: Node
) -> tuple[QKReading, Float[Tensor, " key"], float]:
    """The head's circuit on the prompt, `w`, and `z - z(0)`."""
    stage = replacement.stages[replacement.stage_of[head]]
    assert isinstance(stage, LorsaStage)
    lorsa = stage.lorsa
    form = QKHead.from_lorsa(
        lorsa, head.index // lorsa.cfg.group_size, model=replacement.stream.model
    )
    reading = replacement.stream.read(form)
    resid = replacement.stream.layers[head.layer].resid_pre
    x = stage.norm.share(resid) + stage.norm.bias
    values = x @ lorsa.W_V[head.index].double() + lorsa.b_V[head.index].double()
    raw = reading.raw[head.pos]
    steps = torch.linspace(0, 1, N_STEPS + 1, dtype=raw.dtype)
    path, cap = steps[:, None] * raw, lorsa.cfg.attn_scores_soft_cap
    scores = path if cap is None else cap * torch.tanh(path / cap)
    hidden = ~reading.visible[head.pos]
    pattern = (scores + reading.bias[head.pos]).masked_fill(hidden, -torch.inf).softmax(-1)
    z = pattern @ values
    gradient = pattern * (values - z[:, None])
    if cap is not None:
        gradient = gradient * (1 - torch.tanh(path / cap).square())
    halved = torch.full_like(steps, 1 / N_STEPS)
    halved[[0, -1]] /= 2
    return reading, halved @ gradient, float(z[-1] - z[0])


def _sides(
    replacement: LocalReplacement, reading: QKReading, at: int, weights: Float[Tensor, " key"]
) -> list[tuple[QKParts, Float[Tensor, " part"]]]:
    """Parts of the query and of the keys, and what each gives with all of the other side."""
    visible = reading.visible[at].nonzero()[:, 0].tolist()
    queries = qk_parts(replacement, reading, "dest", [at])
    keys = qk_parts(replacement, reading, "src", visible)
    divisor = reading.head.divisor
    of_queries = queries.vectors @ (weights @ reading.k) / divisor
    of_keys = weights[keys.pos] * (keys.vectors @ reading.q[at]) / divisor
    return [(queries, of_queries), (keys, of_keys)]
