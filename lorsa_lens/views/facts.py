"""What is known about one head, as plain numbers and strings, ready to be shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Weighted = tuple[str, float]
"""A token and its weight."""


@dataclass(frozen=True)
class Excerpt:
    """A context in which a head stays.

    Attributes:
        tokens: The strings of its tokens, as the tokenizer gives them.
        query: Where the head is active.
        activation: Its activation z there.
        z_pattern: What each token contributes to it, `A[query, k] v[k]`.

    Raises:
        ValueError: If the lengths differ, the query is no position, or a value is not finite.
    """

    tokens: Sequence[str]
    query: int
    activation: float
    z_pattern: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.z_pattern) != len(self.tokens):
            raise ValueError(
                f"z_pattern has {len(self.z_pattern)} values for {len(self.tokens)} tokens"
            )
        if not 0 <= self.query < len(self.tokens):
            raise ValueError(f"query is {self.query}, the tokens are 0 to {len(self.tokens) - 1}")
        if not all(map(math.isfinite, (self.activation, *self.z_pattern))):
            raise ValueError("activation and z_pattern must be finite numbers")

    def sources(self, n: int, min_share: float) -> list[int]:
        """Return the keys with the largest share of `|A v|`, largest first.

        Args:
            n: At most so many.
            min_share: And each with at least this share.
        """
        total = sum(map(abs, self.z_pattern)) or 1.0
        order = sorted(range(len(self.tokens)), key=lambda key: -abs(self.z_pattern[key]))
        return [key for key in order[:n] if abs(self.z_pattern[key]) / total >= min_share]


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """Everything a card shows about one head. What is not known is left out.

    Attributes:
        layer: Its layer.
        head: Its index there.
        behaviours: Scores of the behaviours that it was named after, by name.
        density: Share of tokens at which it stays.
        max_activation: The largest `|z|`.
        mean_offset: Mean distance from source to query, in tokens.
        excerpts: Contexts with large `|z|`, largest first.
        raises: Tokens whose logits a positive activation raises most.
        lowers: Tokens whose logits it lowers most.
        reads_most: Tokens from which it fetches the largest values.
        reads_least: Tokens from which it fetches the smallest values.
        origins: Share of each attention head of the layer in what it carries.
        effective_heads: Effective number of attention heads behind it.
    """

    layer: int
    head: int
    behaviours: Mapping[str, float] = field(default_factory=dict)
    density: float = math.nan
    max_activation: float = math.nan
    mean_offset: float = math.nan
    excerpts: Sequence[Excerpt] = ()
    raises: Sequence[Weighted] = ()
    lowers: Sequence[Weighted] = ()
    reads_most: Sequence[Weighted] = ()
    reads_least: Sequence[Weighted] = ()
    origins: Mapping[int, float] = field(default_factory=dict)
    effective_heads: float = math.nan

    @property
    def name(self) -> str:
        """`L1.42`: head 42 of layer 1."""
        return f"L{self.layer}.{self.head}"
