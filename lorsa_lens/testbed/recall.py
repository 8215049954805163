"""Pairs of words that come again: the language of the associative-recall model."""

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.testbed.labels import (
    LabelledTokens,
    check_n_sequences,
    check_token_ids,
    recurrence,
    token_strings,
)

BOS = "<bos>"
N_WORDS = 32
MIN_PERIOD, MAX_PERIOD = 8, 17


@dataclass(frozen=True)
class RecallLanguage:
    """``<bos>``, then pairs of words, a key and its value, drawn again and again from a few.

    One rule, ``recall``, holds where a word has occurred before: the source is the position after
    its most recent occurrence, where its value stands, and the answer is that value. What tells the
    value's position apart is the key before it, so a network needs two layers: heads that move the
    previous token, and heads that look for the current token among what these moved.

    Of pairs alone a network is slow to learn this. So most sequences repeat a segment of words as
    it is, as those of `CyclicLanguage` do, where the rule is the same.

    Attributes:
        n_pairs: Different pairs in a sequence, at most 16.
        n_items: Pairs in a sequence, each drawn from these.
        repeats: Share of the sequences that repeat a segment instead.

    Raises:
        ValueError: if the numbers are not 1 <= n_pairs <= 16, 1 <= n_items, 0 <= repeats <= 1.
    """

    n_pairs: int = 16
    n_items: int = 19
    repeats: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.n_pairs <= N_WORDS // 2 or self.n_items < 1:
            raise ValueError(
                f"n_pairs must be 1 to {N_WORDS // 2} and n_items at least 1, got {self.n_pairs} "
                f"and {self.n_items}"
            )
        if not 0 <= self.repeats <= 1:
            raise ValueError(f"repeats must be between 0 and 1, got {self.repeats}")

    @property
    def n_ctx(self) -> int:
        """Length of a sampled sequence, ``<bos>`` included."""
        return 1 + 2 * self.n_items

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules; `LabelledTokens.rule` indexes this tuple."""
        return ("recall",)

    @cached_property
    def vocab(self) -> tuple[str, ...]:
        """``<bos>`` and the 32 words."""
        return (BOS, *(f"word{number}" for number in range(1, N_WORDS + 1)))

    @cached_property
    def families(self) -> dict[str, tuple[int, ...]]:
        """One family: the words."""
        return {"word": tuple(range(1, N_WORDS + 1))}

    def str_tokens(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """The readable strings of one sequence."""
        return token_strings(self.vocab, tokens)

    def sample(self, n_sequences: int, *, seed: int) -> LabelledTokens:
        """Draw labelled sequences; the same seed gives the same sequences.

        Raises:
            ValueError: if ``n_sequences`` is below 1.
        """
        check_n_sequences(n_sequences)
        generator = torch.Generator().manual_seed(seed)
        words = torch.rand(n_sequences, N_WORDS, generator=generator).argsort(dim=1) + 1
        shape = (n_sequences, self.n_items)
        item = torch.randint(self.n_pairs, shape, generator=generator)
        pairs = rearrange(torch.stack((2 * item, 2 * item + 1)), "two b item -> b (item two)")
        period = torch.randint(MIN_PERIOD, MAX_PERIOD + 1, (n_sequences, 1), generator=generator)
        segment = torch.arange(2 * self.n_items)[None] % period
        repeats = torch.rand(n_sequences, 1, generator=generator) < self.repeats
        bos = torch.zeros((n_sequences, 1), dtype=torch.int64)
        text = words.gather(1, torch.where(repeats, segment, pairs))
        return self.label(torch.cat((bos, text), dim=1))

    def label(self, tokens: Int[Tensor, "batch pos"]) -> LabelledTokens:
        """Labels of any sequences of this vocabulary.

        The rule is named where what followed a word has always been the same: in pairs, at keys.

        Raises:
            ValueError: if ``tokens`` is empty or an id lies outside the vocabulary.
        """
        check_token_ids(tokens, len(self.vocab))
        tokens = tokens.long()
        match = recurrence(tokens)
        source = torch.where(match >= 0, match + 1, -1)
        follower = tokens.gather(1, source.clamp(min=0))
        holds = (match >= 0) & ~_contradicted(tokens, follower)
        source, answer = source.masked_fill(~holds, -1), follower.masked_fill(~holds, -1)
        return LabelledTokens(tokens, torch.where(holds, 0, -1), source, answer)


def _contradicted(tokens: Int[Tensor, "batch pos"], follower: Int[Tensor, "batch pos"]) -> Tensor:
    """Where the same word was, anywhere in the sequence, followed by another word than this."""
    query, key = rearrange(tokens, "b q -> b q 1"), rearrange(tokens, "b k -> b 1 k")
    following = rearrange(torch.nn.functional.pad(tokens[:, 1:], (0, 1)), "b k -> b 1 k")
    position = torch.arange(tokens.shape[1], device=tokens.device)
    has_next = position < tokens.shape[1] - 1
    differs = (query == key) & (following != rearrange(follower, "b q -> b q 1")) & has_next
    return differs.any(dim=2)
