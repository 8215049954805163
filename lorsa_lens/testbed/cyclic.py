"""Random segments that repeat: the language of the two-layer induction model."""

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

_WORD_LIST = (
    "amber basin cedar delta ember fjord glade harbor inlet jasper kelp lagoon maple nectar oasis "
    "pebble quartz river summit tundra umber valley willow xenon yarrow zephyr acorn birch coral "
    "dune elm fern"
)
_WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())


@dataclass(frozen=True)
class CyclicLanguage:
    """``<bos>``, then a segment of distinct random tokens, repeated until the context is full.

    Two rules name a source. ``induction`` (index 0) holds wherever the token has occurred before:
    the source is the position after its most recent earlier occurrence, the answer the token there.
    ``previous_token`` (index 1) is what a layer before an induction head serves: the source is the
    position before, at every position but the first, and no next token follows from it. `label` and
    `sample` give the first, `previous_token` the second, so that each label tensor says one thing.

    Where a token has occurred more than once before, the label names the most recent occurrence
    although every earlier one predicts the same answer, so an induction head that looks at all of
    them has a low `source_mass`. With ``2 * min_period >= n_ctx - 1``, as in
    ``CyclicLanguage(n_ctx=19, min_period=9)``, each source is the only one.

    Attributes:
        n_ctx: Length of a sampled sequence, ``<bos>`` included.
        min_period: Shortest segment.
        max_period: Longest segment, inclusive.

    Raises:
        ValueError: if the periods are not 1 <= min_period <= max_period <= 32, or ``n_ctx`` leaves
            no room for a repeat of the longest segment.
    """

    n_ctx: int = 40
    min_period: int = 8
    max_period: int = 17

    def __post_init__(self) -> None:
        if not 1 <= self.min_period <= self.max_period <= len(_WORDS):
            raise ValueError(
                f"min_period and max_period must satisfy 1 <= min_period <= max_period <= "
                f"{len(_WORDS)}, got {self.min_period} and {self.max_period}"
            )
        if self.n_ctx < self.max_period + 2:
            raise ValueError(
                f"n_ctx must be at least max_period + 2 = {self.max_period + 2} so that every "
                f"segment repeats, got {self.n_ctx}"
            )

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules; `LabelledTokens.rule` indexes this tuple."""
        return ("induction", "previous_token")

    @property
    def vocab(self) -> tuple[str, ...]:
        """``<bos>`` and the 32 words."""
        return (BOS, *_WORDS)

    @cached_property
    def families(self) -> dict[str, tuple[int, ...]]:
        """One family: the words."""
        return {"word": tuple(range(1, len(self.vocab)))}

    def str_tokens(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """The readable strings of one sequence."""
        return token_strings(self.vocab, tokens)

    def sample(self, n_sequences: int, *, seed: int) -> LabelledTokens:
        """Draw sequences with their induction labels; the same seed gives the same sequences.

        Raises:
            ValueError: if ``n_sequences`` is below 1.
        """
        check_n_sequences(n_sequences)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(n_sequences, len(_WORDS), generator=generator).argsort(dim=1) + 1
        period = torch.randint(
            self.min_period, self.max_period + 1, (n_sequences, 1), generator=generator
        )
        place = rearrange(torch.arange(self.n_ctx - 1), "pos -> 1 pos") % period
        bos = torch.zeros((n_sequences, 1), dtype=torch.int64)
        return self.label(torch.cat([bos, order.gather(1, place)], dim=1))

    def label(self, tokens: Int[Tensor, "batch pos"]) -> LabelledTokens:
        """Induction labels of any sequences of this vocabulary.

        Raises:
            ValueError: if ``tokens`` is empty or an id lies outside the vocabulary.
        """
        check_token_ids(tokens, len(self.vocab))
        tokens = tokens.long()
        match = recurrence(tokens)
        holds = match >= 0
        source = torch.where(holds, match + 1, -1)
        answer = torch.where(holds, tokens.gather(1, source.clamp(min=0)), -1)
        return LabelledTokens(tokens, torch.where(holds, 0, -1), source, answer)

    def previous_token(self, tokens: Int[Tensor, "batch pos"]) -> LabelledTokens:
        """The previous-token rule at every position but the first; it demands no answer.

        Raises:
            ValueError: if ``tokens`` is empty or an id lies outside the vocabulary.
        """
        check_token_ids(tokens, len(self.vocab))
        tokens = tokens.long()
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rule = torch.where(position > 0, 1, -1)
        return LabelledTokens(tokens, rule, position - 1, torch.full_like(tokens, -1))
