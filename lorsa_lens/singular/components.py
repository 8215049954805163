"""Who writes to the residual stream: the names of its parts."""

from typing import Literal, NamedTuple, get_args

Kind = Literal["head", "mlp", "bias", "embedding", "token", "position", "offset"]

KINDS: tuple[Kind, ...] = get_args(Kind)


class Component(NamedTuple):
    """One summand of what a head reads."""

    layer: int
    kind: Kind
    """`head` (one head, one source token), `mlp`, `bias` (what an attention layer's biases write),
    `embedding` (or `token` and `position` apart), `offset` (biases of the reading head itself and
    of the norm before it)."""
    head: int | None = None
    source: int | None = None
    """Heads: the token that was read."""

    @property
    def label(self) -> str:
        """As `L3.1` for a head, `L3 mlp`, `embedding`."""
        if self.kind == "head":
            return f"L{self.layer}.{self.head}"
        return f"L{self.layer} {self.kind}" if self.kind in ("mlp", "bias") else self.kind


class Firing(NamedTuple):
    """One head attending from one token to another."""

    layer: int
    head: int
    dest: int
    src: int
