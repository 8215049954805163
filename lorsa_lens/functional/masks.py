"""Which keys a query may see, and how far away they are, without a [query, key] tensor at rest."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The rule of which keys each query sees; rows of it are made when they are needed.

    Queries are the last `n_queries` of `n_keys` slots: before them lie the keys of a cache.
    """

    n_queries: int
    """Queries of this call."""

    n_keys: int
    """Keys: those of a cache, then this call's own."""

    causal: bool = True
    """A query sees no key after itself."""

    window: int | None = None
    """A query sees no key more than `window - 1` slots before itself."""

    keep: Bool[Tensor, "batch #query key"] | None = None
    """Keys that may be seen at all (padding is not), for each query or for all alike."""

    @property
    def offset(self) -> int:
        """Slot of the first query: the number of keys in the cache."""
        return self.n_keys - self.n_queries

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 key that any of the queries `start` to `stop - 1` can see."""
        first = 0
        if self.window is not None:
            first = max(0, self.offset + start - self.window + 1)
        last = min(self.n_keys, self.offset + stop) if self.causal else self.n_keys
        return first, last

    def first_hidden(self, queries: tuple[int, int], keys: tuple[int, int]) -> int:
        """The first of some keys that some of the queries may not see; all see those before it."""
        if self.window is not None or self.keep is not None:
            return keys[0]
        return max(keys[0], self.offset + queries[0] + 1) if self.causal else keys[1]

    def distances(
        self, queries: tuple[int, int], keys: tuple[int, int], device: torch.device
    ) -> Int[Tensor, "query key"]:
        """Slots from each key to each query; negative for keys after it."""
        query_slots = torch.arange(*queries, device=device) + self.offset
        return query_slots[:, None] - torch.arange(*keys, device=device)[None, :]

    def visible(
        self, queries: tuple[int, int], keys: tuple[int, int], device: torch.device
    ) -> Bool[Tensor, "#batch query key"] | None:
        """Whether each of some queries sees each of some keys; None where all see all."""
        visible: Tensor | None = None
        distances = self.distances(queries, keys, device)
        if self.causal and keys[1] > self.offset + queries[0] + 1:
            visible = distances >= 0
        if self.window is not None and keys[0] < self.offset + queries[1] - self.window:
            near = distances < self.window
            visible = near if visible is None else visible & near
        if visible is not None:
            visible = visible[None]
        if self.keep is not None:
            rows = slice(None) if self.keep.shape[1] == 1 else slice(*queries)
            kept = self.keep[:, rows, slice(*keys)]
            visible = kept if visible is None else visible & kept
            visible = visible.expand(-1, queries[1] - queries[0], -1)
        return visible


def plain_alibi_slopes(n_heads: int) -> list[float]:
    """Slopes `2 ** (-8 i / n_heads)` for i = 1 to `n_heads` (ALiBi, arXiv 2108.12409)."""
    return [2.0 ** (-8 * i / n_heads) for i in range(1, n_heads + 1)]


def alibi_bias(
    slopes: Float[Tensor, " head"], distances: Int[Tensor, "query key"]
) -> Float[Tensor, "head query key"]:
    """The bias on scores: minus the slope for each position that a key lies back."""
    return -slopes[:, None, None] * distances.clamp(min=0).to(slopes.dtype)
