"""Sources that positions and repetitions alone define, in any text.

Each function gives for every query the keys that are its sources, none where it has none.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch query key"]


def previous(tokens: Tokens, offset: int = 1) -> Mask:
    """The token `offset` before."""
    return distances(tokens) == offset


def current(tokens: Tokens) -> Mask:
    """The token itself, except at the first position, where there is no other choice."""
    mask = distances(tokens) == 0
    mask[:, 0] = False
    return mask


def first(tokens: Tokens) -> Mask:
    """The first token (an attention sink), for queries from position 2 on."""
    mask = torch.zeros_like(distances(tokens), dtype=torch.bool)
    mask[:, 2:, 0] = True
    return mask


def duplicate(tokens: Tokens) -> Mask:
    """Earlier occurrences of the same token (arXiv 2211.00593, section 3.2)."""
    return same(tokens) & (distances(tokens) > 0)


def induction(tokens: Tokens) -> Mask:
    """Tokens after earlier occurrences of the same token (arXiv 2209.11895)."""
    return later(duplicate(tokens)) & (distances(tokens) > 0)


def gapped_induction(tokens: Tokens, gap: int = 1) -> Mask:
    """Tokens that follow `gap` others after an earlier occurrence of the token `gap` before.

    Plain induction sources are left out: the tokens in between must differ.
    """
    mask = duplicate(tokens)
    for _ in range(gap):  # both the query and its match move on
        mask = torch.nn.functional.pad(mask[:, :-1, :-1], (1, 0, 1, 0))
    return later(mask) & ~induction(tokens) & (distances(tokens) > 0)


def distances(tokens: Tokens) -> Int[Tensor, "batch query key"]:
    """Positions from each key to each query."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return (at[:, None] - at[None, :]).expand(tokens.shape[0], -1, -1).clone()


def same(tokens: Tokens) -> Mask:
    """Whether key and query are the same token."""
    return tokens[:, :, None] == tokens[:, None, :]


def later(mask: Mask) -> Mask:
    """The keys after those of a mask."""
    return torch.nn.functional.pad(mask[:, :, :-1], (1, 0))


def next_tokens(tokens: Tokens) -> Tokens:
    """The token after each, -1 after the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
