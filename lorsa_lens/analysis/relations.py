"""Relations between a token and the earlier token that a head may fetch: sources by name.

Each function gives, for every position, the position of its source, -1 where it has none.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

Sources = Int[Tensor, "batch pos"]


def previous_token(tokens: Int[Tensor, "batch pos"]) -> Sources:
    """The token just before."""
    return _positions(tokens) - 1


def current_token(tokens: Int[Tensor, "batch pos"]) -> Sources:
    """The token itself, except at the first position, where every head has no other choice."""
    positions = _positions(tokens)
    return positions.masked_fill(positions == 0, -1)


def first_token(tokens: Int[Tensor, "batch pos"]) -> Sources:
    """The first token of the sequence (an attention sink), for positions from 2 on."""
    return torch.where(_positions(tokens) >= 2, 0, -1)


def duplicate_token(tokens: Int[Tensor, "batch pos"]) -> Sources:
    """The last earlier occurrence of the same token."""
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = torch.ones_like(same).tril(diagonal=-1)
    return torch.where(same & earlier, _positions(tokens)[:, None, :], -1).amax(-1)


def induction(tokens: Int[Tensor, "batch pos"]) -> Sources:
    """The token after the last earlier occurrence of the same token (arXiv 2209.11895).

    Where that is the current token itself (a token repeated at once) there is no source.
    """
    duplicate = duplicate_token(tokens)
    found = (duplicate >= 0) & (duplicate < _positions(tokens) - 1)
    return torch.where(found, duplicate + 1, -1)


RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous token": previous_token,
    "current token": current_token,
    "first token": first_token,
    "duplicate token": duplicate_token,
    "induction": induction,
}
"""Relations that any text has, by name."""


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
