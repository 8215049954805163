"""Why a head attends: its score as a sum over pairs of nodes, one at the query and one at the key.

Queries and keys are linear in what was written to the stream while norms are frozen, so

    score[q, k] attn_scale = sum_a sum_b (R_q (y_a W_Q) f_q) . (R_k (y_b W_K) f_k)

over all nodes a at the query and b at the key, the biases of the head (and of the norm before it)
among them; f holds the frozen norms. The sum is exact and holds at every key ("Tracing Attention
Computation Through Feature Interactions", 2025). Where scores are capped, or ALiBi comes on top, it
is the score before that.

A pair's part in three things is asked for, each a weighted sum of its scores over the keys:

    score      1 at the key
    relative   1 at the key, -1/(n - 1) at each of the other visible keys: what sets the key apart
    weight     the attention weight, by integrated gradients of the softmax (cap and ALiBi included)
               along all scores times alpha, alpha from 0 to 1: parts sum to its change
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.analysis.tables import table
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.low_rank import LowRank, low_rank
from lorsa_lens.circuits.qk_parts import QKNode, QKParts, qk_parts
from lorsa_lens.circuits.replacement import LocalReplacement
from lorsa_lens.singular.qk_head import QKHead
from lorsa_lens.singular.selection import Softmax

if TYPE_CHECKING:
    from pandas import DataFrame

Quantity = Literal["score", "relative", "weight"]

N_STEPS = 1024
"""Steps of the integral over the scores: the parts then sum to the change to about 1e-6."""

BIAS_NAME = "bias.reading"
"""How the biases of the head itself are called in tables and files."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QKTracing:
    """Why one head attends from one token to another; made by `trace_qk`."""

    head: QKHead
    query: int
    key: int
    queries: QKParts
    """Parts of the query."""
    keys: QKParts
    """Parts of all visible keys."""
    scores: Float[Tensor, " key"]
    """Before cap and ALiBi, at every key of the prompt."""
    pattern: Float[Tensor, " key"]
    baseline: float
    """The attention weight if all scores were 0."""
    key_weights: Mapping[Quantity, Float[Tensor, " key"]]
    """What the score with each key counts in each quantity."""

    def __repr__(self) -> str:
        return f"QKTracing({self.head.name}, {self.query} -> {self.key})"

    def total(self, of: Quantity = "score") -> float:
        """What the pairs sum to: the score, the relative score, or the rise of the weight."""
        if of == "weight":
            return self.pattern[self.key].item() - self.baseline
        return (self._weights(of) * self.scores).sum().item()

    def matrix(self, of: Quantity = "score") -> Float[Tensor, "query_part key_part"]:
        """The part of every pair, in the order of `queries.nodes` and `keys.nodes`."""
        return self.queries.vectors @ self._weighted_keys(of).mT / self.head.divisor

    def pairs(self, of: Quantity = "score", *, n: int | None = 50) -> "DataFrame":
        """Pairs of nodes by the size of their part, largest first.

        Args:
            of: which quantity.
            n: rows. None: all.

        Returns:
            Rows with `query_node`, `key_node` (ids; `bias.reading` for the head's own biases),
            `key` (the token of the key node) and `contribution`.
        """
        matrix, chosen = self._shown(of)
        flat = matrix.abs().flatten()
        top = flat.topk(len(flat) if n is None else min(n, len(flat))).indices
        rows = []
        for place in top.tolist():
            a, b = divmod(place, matrix.shape[1])
            key = chosen[b]
            rows.append(
                {
                    "query_node": _name(self.queries.nodes[a]),
                    "key_node": _name(self.keys.nodes[key]),
                    "key": int(self.keys.pos[key]),
                    "contribution": matrix[a, b].item(),
                }
            )
        return table(rows)

    def query_marginals(self, of: Quantity = "score", *, n: int | None = None) -> "DataFrame":
        """What each node at the query gives with everything at the keys: `node`, `contribution`."""
        matrix, _ = self._shown(of)
        return _marginals(self.queries.nodes, matrix.sum(1), n)

    def key_marginals(self, of: Quantity = "score", *, n: int | None = None) -> "DataFrame":
        """What each node at the keys gives with everything at the query: `node`, `contribution`."""
        matrix, chosen = self._shown(of)
        return _marginals([self.keys.nodes[i] for i in chosen], matrix.sum(0), n)

    def by_key(self, of: Quantity = "score") -> Float[Tensor, " key"]:
        """What the nodes at each key give together."""
        parts = self.matrix(of).sum(0)
        return torch.zeros_like(self.scores).index_add(0, self.keys.pos, parts)

    def kinds(self, of: Quantity = "score") -> "DataFrame":
        """Contributions by kinds of nodes: rows `query_kind`, `key_kind`, `contribution`.

        `reading bias` stands for the head's own biases: so query-bias, key-bias and error terms are
        told apart.
        """
        matrix, chosen = self._shown(of)
        rows = [_kind(node) for node in self.queries.nodes]
        columns = [_kind(self.keys.nodes[i]) for i in chosen]
        found: dict[tuple[str, str], float] = {}
        for row in dict.fromkeys(rows):
            own = matrix[[kind == row for kind in rows]].sum(0)
            for column in dict.fromkeys(columns):
                mask = torch.tensor([kind == column for kind in columns])
                found[row, column] = own[mask].sum().item()
        ordered = sorted(found.items(), key=lambda entry: -abs(entry[1]))
        return table(
            [{"query_kind": a, "key_kind": b, "contribution": value} for (a, b), value in ordered]
        )

    def low_rank(self, of: Quantity = "score", *, n: int = 3, n_nodes: int = 5) -> LowRank:
        """The pair matrix by its singular values: a shorter description, if these fall off fast.

        Args:
            of: which quantity.
            n: components that are described.
            n_nodes: nodes on each side of a component.
        """
        _, chosen = self._shown(of)
        keys = self._weighted_keys(of)[chosen] / self.head.divisor
        query_names = [_name(node) for node in self.queries.nodes]
        key_names = [_name(self.keys.nodes[i]) for i in chosen]
        return low_rank(self.queries.vectors, keys, query_names, key_names, n=n, n_nodes=n_nodes)

    def to_dict(self, of: Quantity = "score", *, n: int = 20) -> dict[str, Any]:
        """Plain values for a page, and for graphs: the largest parts by node ids.

        Args:
            of: which quantity.
            n: entries of each list.

        Returns:
            `pair_wise` [query node, key node, part], `top_q_marginal` and `top_k_marginal`
            [node, part], as in published graphs; and `head`, `query`, `key`, `quantity`, `total`,
            `weight`, `effective_rank`.
        """
        pairs = self.pairs(of, n=n)
        marginals = {
            "top_q_marginal": self.query_marginals(of, n=n),
            "top_k_marginal": self.key_marginals(of, n=n),
        }
        return {
            "pair_wise": pairs[["query_node", "key_node", "contribution"]].values.tolist(),
            **{name: frame.values.tolist() for name, frame in marginals.items()},
            "head": self.head.name,
            "query": self.query,
            "key": self.key,
            "quantity": of,
            "total": self.total(of),
            "weight": self.pattern[self.key].item(),
            "effective_rank": self.low_rank(of).effective_rank,
        }

    # ---------------------------------------------------------------------------------- the parts

    def _weights(self, of: Quantity) -> Float[Tensor, " key"]:
        if of not in self.key_weights:
            raise ValueError(f"of = {of!r} must be one of {get_args(Quantity)}")
        return self.key_weights[of]

    def _weighted_keys(self, of: Quantity) -> Float[Tensor, "key_part d_head"]:
        return self.keys.vectors * self._weights(of)[self.keys.pos, None]

    def _shown(self, of: Quantity) -> tuple[Float[Tensor, "query_part shown"], list[int]]:
        """The pair matrix without the parts of keys that do not count, and which parts are left."""
        chosen = (self._weights(of)[self.keys.pos] != 0).nonzero()[:, 0].tolist()
        return self.matrix(of)[:, chosen], chosen


@torch.no_grad()
def trace_qk(
    replacement: LocalReplacement,
    head: Node | QKHead,
    *,
    query: int | None = None,
    key: int | None = None,
) -> QKTracing:
    """Take apart why a head attends where it does, at one key and against all others.

    Args:
        replacement: the prompt. Layers below the head's must be Lorsas or have their attention
            heads as nodes (`attention="heads"`).
        head: a head node (its query-key circuit at its token is traced), an attention head node, or
            any circuit of the prompt's model.
        query: the position that attends; of a node its own.
        key: the position that is attended to. None: that of the node's source, or the one with the
            largest weight.

    Raises:
        ValueError: if the node is no head, a position is not on the prompt or not visible, or a
            layer below has attention that is no node.
    """
    if isinstance(head, Node):
        query, key = head.pos if query is None else query, head.source if key is None else key
        head = _form(replacement, head)
    stream = replacement.stream
    if query is None or not 0 <= query < stream.n_pos:
        raise ValueError(f"query = {query}: give a position from 0 to {stream.n_pos - 1}")
    reading = stream.read(head)
    visible, raw, pattern = reading.visible[query], reading.raw[query], reading.pattern[query]
    key = int(pattern.argmax()) if key is None else key
    if not 0 <= key < stream.n_pos or not bool(visible[key]):
        seen = visible.nonzero()[:, 0].tolist()
        raise ValueError(f"key = {key}: {head.name} at token {query} sees {seen}")
    softmax = Softmax(
        source=key,
        bias=reading.bias[query].masked_fill(~visible, -torch.inf),
        cap=head.spec.attn_scores_soft_cap,
    )
    at_key = torch.zeros_like(raw)
    at_key[key] = 1
    others = visible.to(raw) - at_key
    return QKTracing(
        head=head,
        query=query,
        key=key,
        queries=qk_parts(replacement, reading, "dest", [query]),
        keys=qk_parts(replacement, reading, "src", visible.nonzero()[:, 0].tolist()),
        scores=raw,
        pattern=pattern,
        baseline=softmax.weight(torch.zeros_like(raw)),
        key_weights={
            "score": at_key,
            "relative": at_key - others / others.sum().clamp(min=1),
            "weight": softmax.gradient(raw, n_steps=N_STEPS).masked_fill(~visible, 0.0),
        },
    )


def _form(replacement: LocalReplacement, node: Node) -> QKHead:
    """The query-key form of a node's head."""
    stream = replacement.stream
    if node.kind == "attention_head":
        return stream.reading(node.layer, node.index).head
    if node.kind != "head" or node.layer not in replacement.lorsas:
        raise ValueError(f"{node.id} is no head of the prompt's Lorsas: it attends to nothing")
    lorsa = replacement.lorsas[node.layer]
    circuit = node.index // lorsa.cfg.group_size
    return QKHead.from_lorsa(lorsa, circuit, model=stream.model)


def _name(node: QKNode) -> str:
    return BIAS_NAME if node is None else node.id


def _kind(node: QKNode) -> str:
    return "reading bias" if node is None else node.kind


def _marginals(
    nodes: Sequence[QKNode], values: Float[Tensor, " node"], n: int | None
) -> "DataFrame":
    order = values.abs().argsort(descending=True).tolist()
    return table([{"node": _name(nodes[i]), "contribution": values[i].item()} for i in order[:n]])
