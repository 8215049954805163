"""A matrix of pair contributions by its singular values: a shorter description of a score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.analysis.tables import table
from lorsa_lens.singular.basis import low_rank_svd

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The pair matrix as a few products of a query-side and a key-side combination of nodes."""

    singular_values: tuple[float, ...]
    components: "DataFrame"
    """`component`, `singular_value`, `energy` (share of the sum of squares), `side`, `node`,
    `loading` (entry of the singular vector; the nodes with the largest)."""

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the squared singular values' shares."""
        squares = torch.tensor(self.singular_values, dtype=torch.float64).square()
        shares = squares[squares > 0] / squares.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))

    def rank_at(self, energy: float) -> int:
        """How many components hold a share of the sum of squares."""
        squares = torch.tensor(self.singular_values, dtype=torch.float64).square()
        reached = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
        return int(reached.int().argmax()) + 1


def low_rank(
    queries: Float[Tensor, "query_part d_head"],
    keys: Float[Tensor, "key_part d_head"],
    query_names: Sequence[str],
    key_names: Sequence[str],
    *,
    n: int,
    n_nodes: int,
) -> LowRank:
    """The singular values of `queries @ keys^T`, which has no higher rank than a head is wide.

    Args:
        queries: parts of the query.
        keys: parts of the keys.
        query_names: of the first.
        key_names: of the second.
        n: components that are described.
        n_nodes: names on each side of a component.
    """
    U, S, V = low_rank_svd(queries, keys)
    energy = S.square() / S.square().sum().clamp(min=1e-30)
    rows = []
    for component in range(min(n, len(S))):
        for side, names, vectors in (("query", query_names, U), ("key", key_names, V)):
            loadings = vectors[:, component]
            for i in loadings.abs().topk(min(n_nodes, len(loadings))).indices.tolist():
                rows.append(
                    {
                        "component": component,
                        "singular_value": S[component].item(),
                        "energy": energy[component].item(),
                        "side": side,
                        "node": names[i],
                        "loading": loadings[i].item(),
                    }
                )
    return LowRank(singular_values=tuple(S.tolist()), components=table(rows))
