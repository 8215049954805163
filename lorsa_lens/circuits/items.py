"""What the residual stream may hold before a layer, told from the weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.hosts import Host
from lorsa_lens.hosts.ends import position_embeddings, token_embeddings

MAX_POSITIONS = 256
"""Learned positions that are looked at, unless told otherwise."""

ItemKind = Literal["token", "position", "head", "constant"]


@dataclass(frozen=True)
class Item:
    """One thing that the residual stream may hold, at any token."""

    kind: ItemKind
    layer: int
    """Of a head; -1 for the others."""
    index: int
    """Token id, position or head; 0 for the constant."""

    def name(self, strings: tuple[str, ...] | None = None) -> str:
        """As `L0.17`, `position 3`, `constant`, `token 5` or, with their strings, `'word'`."""
        if self.kind == "head":
            return f"L{self.layer}.{self.index}"
        if self.kind == "token" and strings is not None:
            return repr(strings[self.index])
        return self.kind if self.kind == "constant" else f"{self.kind} {self.index}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """Everything that the stream may hold before a layer: what it holds is a sum of these.

    Tokens and positions are what they add to their means; the means, and all biases that are
    written below, are the one constant. Heads are at their typical activation.
    """

    items: tuple[Item, ...]
    vectors: Float[Tensor, "item d_model"]

    def __len__(self) -> int:
        return len(self.items)

    def of_kind(self, *kinds: ItemKind) -> list[int]:
        """Indices of all items of some kinds."""
        return [number for number, item in enumerate(self.items) if item.kind in kinds]


class Moments(NamedTuple):
    """Mean and covariance of what the residual stream holds."""

    mean: Float[Tensor, " d_model"]
    covariance: Float[Tensor, "d_model d_model"]

    def plus(
        self, constant: Float[Tensor, " d_model"], rows: Float[Tensor, "n d_model"]
    ) -> "Moments":
        """Those of the stream with something independent added: a constant, and some rows."""
        return Moments(self.mean + constant, self.covariance + rows.mT @ rows)

    def size(self, *, centred: bool) -> float:
        """Root mean square of an entry, of vectors less their mean entry if `centred`."""
        second = self.covariance + torch.outer(self.mean, self.mean)
        square = second.diagonal().mean()
        if centred:
            square = square - second.mean()
        return square.sqrt().item()


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """Tokens and learned positions, as they stand in the stream before the first layer."""

    token_ids: tuple[int, ...]
    tokens: Float[Tensor, "token d_model"]
    positions: Float[Tensor, "pos d_model"]
    """Zeros where positions enter elsewhere (rotary, ALiBi, shortformer)."""

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean token plus the mean position."""
        return self.tokens.mean(0) + self.positions.mean(0)

    @property
    def token_deviations(self) -> Float[Tensor, "token d_model"]:
        """Tokens less the mean token."""
        return self.tokens - self.tokens.mean(0)

    @property
    def position_deviations(self) -> Float[Tensor, "pos d_model"]:
        """Positions less the mean position."""
        return self.positions - self.positions.mean(0)

    @cached_property
    def token_covariance(self) -> Float[Tensor, "d_model d_model"]:
        """Over the vocabulary, every token alike."""
        return _second_moment(self.token_deviations)

    @cached_property
    def moments(self) -> "Moments":
        """Of the stream before the first layer: every token and every position alike."""
        position_covariance = _second_moment(self.position_deviations)
        return Moments(self.mean, self.token_covariance + position_covariance)

    def items(self, constant: Float[Tensor, " d_model"]) -> Items:
        """The items of the embedding; `constant` is what else is always there."""
        found = [Item("constant", -1, 0), *(Item("token", -1, token) for token in self.token_ids)]
        parts = [(self.mean + constant)[None], self.token_deviations]
        if bool((self.positions != 0).any()):
            found += [Item("position", -1, position) for position in range(len(self.positions))]
            parts.append(self.position_deviations)
        return Items(items=tuple(found), vectors=torch.cat(parts))


def _second_moment(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "d_model d_model"]:
    return rows.mT @ rows / len(rows)


@torch.no_grad()
def read_embeddings(host: Host, tokens: Sequence[int] | None, n_pos: int | None) -> Embeddings:
    """The embeddings of a host.

    Args:
        host: the model.
        tokens: ids of the tokens. None: the vocabulary.
        n_pos: learned positions. None: all, at most 256.

    Raises:
        ValueError: if there is no such token or number of positions.
    """
    d_vocab, n_ctx = int(host.model.cfg.d_vocab), int(host.model.cfg.n_ctx)
    ids = tuple(range(d_vocab)) if tokens is None else tuple(tokens)
    if not ids or not all(0 <= token < d_vocab for token in ids):
        raise ValueError(f"tokens must be ids from 0 to {d_vocab - 1}, at least one")
    n_pos = min(n_ctx, MAX_POSITIONS) if n_pos is None else n_pos
    if not 1 <= n_pos <= n_ctx:
        raise ValueError(f"n_pos = {n_pos}: the model has positions for 1 to {n_ctx} tokens")
    return Embeddings(
        token_ids=ids,
        tokens=token_embeddings(host)[list(ids)].double(),
        positions=position_embeddings(host, n_pos).double(),
    )
