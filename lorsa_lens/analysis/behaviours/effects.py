"""What a head does to the token that it is about: the written half of a behaviour."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """For source tokens, the token that a head should promote or demote, among which others.

    A head of rank one that fetches z from a source adds z w_O, so it promotes most the candidate
    on which `z w_O` has the largest logit.
    """

    answers: dict[int, int]
    """By source token, the token concerned."""

    families: list[list[int]]
    """Candidates: each answer competes with its own family."""

    promotes: bool = True
    """Whether the answer should have the largest logit, or else the smallest."""

    def hits(self, logits: Float[Tensor, "head d_vocab"]) -> "Hits":
        """Which heads have the effect on which source tokens.

        Args:
            logits: what each head's writing vector adds to the logits.
        """
        n_heads, d_vocab = logits.shape
        extremes = torch.zeros(2, n_heads, d_vocab, dtype=torch.bool, device=logits.device)
        rows = torch.arange(n_heads, device=logits.device)
        for family in self.families:
            members = torch.tensor(family, device=logits.device)
            candidates = logits[:, members]
            extremes[0, rows, members[candidates.argmax(1)]] = True
            extremes[1, rows, members[candidates.argmin(1)]] = True
        answers = torch.tensor(list(self.answers.values()), device=logits.device)
        none = torch.zeros(n_heads, 1, dtype=torch.bool, device=logits.device)
        largest, smallest = (torch.cat((of[:, answers], none), 1) for of in extremes)
        column = torch.full((d_vocab,), len(answers), device=logits.device)
        column[list(self.answers)] = torch.arange(len(answers), device=logits.device)
        up, down = (largest, smallest) if self.promotes else (smallest, largest)
        return Hits(up, down, column)


class Hits(NamedTuple):
    """Whether each head treats the answer to each source token as an effect says."""

    positive: Bool[Tensor, "head source"]
    """With positive z; the last column, of tokens that are no source, is false."""

    negative: Bool[Tensor, "head source"]
    """With negative z."""

    column: Int[Tensor, " d_vocab"]
    """The column of each token."""

    def of(
        self, tokens: Int[Tensor, "batch key"], values: Float[Tensor, "batch key head"]
    ) -> Bool[Tensor, "batch key head"]:
        """Whether what each head fetches at each token has the effect."""
        column = self.column[tokens]
        up, down = (rearrange(hit[:, column], "h b k -> b k h") for hit in self[:2])
        return torch.where(values > 0, up, down)


def joined(parts: Sequence[Hits]) -> Hits:
    """The hits of several groups of heads as one."""
    positive, negative = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    return Hits(positive, negative, parts[0].column)


def copying(tokens: list[int], *, promotes: bool = True) -> Effect:
    """The effect on the very token that is fetched, among others of its kind."""
    return Effect({token: token for token in tokens}, [tokens], promotes)


def succession(orders: list[list[int]]) -> Effect:
    """The effect on the token after the one that is fetched, in its order."""
    answers = {a: b for order in orders for a, b in pairwise(order)}
    return Effect(answers, orders)
