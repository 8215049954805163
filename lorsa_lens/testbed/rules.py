"""A language with more rules than its model has heads, and the true source of every rule.

A sequence is ``<bos>``, a topic, then a mix of content tokens and triggers. A trigger asks for a
token that one earlier token determines, and the next token is the answer::

    <bos> music three Alice apple plus_one: four Bob first_person: Alice apple again initial: A

Everything the labels say is a function of the token string up to the query, so `RuleLanguage.label`
labels sampled and edited sequences alike. Answers are ordinary tokens: after ``plus_one: four`` the
last number is that ``four``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.testbed.grammar import BOS, FAMILIES, RULES, TOKEN_IDS, TRIGGERS, VOCAB
from lorsa_lens.testbed.labels import (
    LabelledTokens,
    check_n_sequences,
    check_token_ids,
    token_strings,
)
from lorsa_lens.testbed.reader import Reader, Tables


@dataclass(frozen=True)
class RuleLanguage:
    """The language of eleven rules (see the module docstring).

    Attributes:
        n_ctx: Length of a sampled sequence, ``<bos>`` included.
        trigger_rate: Probability of a trigger where no rule determines the token.
        repeat_rate: Probability that a content word is one the sequence has shown exactly once,
            when there is one; otherwise it is a new word, when there is one. With 0.5 about
            two words in five are repeats, so that dup cannot be guessed from the word alone.

    Raises:
        ValueError: if ``n_ctx`` is below 4 or a rate lies outside [0, 1].

    Example:
        >>> language = RuleLanguage()
        >>> labels = language.sample(2, seed=0)
        >>> labels.tokens.shape
        torch.Size([2, 48])
        >>> language.str_tokens(labels.tokens[0])[0]
        '<bos>'
    """

    n_ctx: int = 48
    trigger_rate: float = 0.4
    repeat_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.n_ctx < 4:
            raise ValueError(f"n_ctx must be at least 4, got {self.n_ctx}")
        for name in ("trigger_rate", "repeat_rate"):
            rate = getattr(self, name)
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {rate}")

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules; `LabelledTokens.rule` indexes this tuple."""
        return tuple(rule.name for rule in RULES)

    @property
    def vocab(self) -> tuple[str, ...]:
        """``<bos>``, the families in order, the triggers, and ``again``."""
        return VOCAB

    @cached_property
    def families(self) -> dict[str, tuple[int, ...]]:
        """Token ids of each family, the triggers included."""
        families = {**FAMILIES, "trigger": TRIGGERS}
        return {
            name: tuple(TOKEN_IDS[token] for token in family) for name, family in families.items()
        }

    def token_id(self, string: str) -> int:
        """Id of a token from its string.

        Raises:
            ValueError: if the vocabulary has no such token.
        """
        if string not in TOKEN_IDS:
            raise ValueError(f"{string!r} is not a token of RuleLanguage; see language.vocab")
        return TOKEN_IDS[string]

    def str_tokens(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """The readable strings of one sequence."""
        return token_strings(self.vocab, tokens)

    def label(self, tokens: Int[Tensor, "batch pos"]) -> LabelledTokens:
        """Label any sequences of this vocabulary, sampled, edited or written by hand.

        A trigger without a source (``plus_one:`` before any number) carries no rule.

        Raises:
            ValueError: if ``tokens`` is empty or an id lies outside the vocabulary.
        """
        check_token_ids(tokens, len(self.vocab))
        on_cpu = tokens.long().cpu()
        reader = Reader(Tables.build(), *on_cpu.shape)
        labels = [reader.read(at, token) for at, token in enumerate(on_cpu.unbind(dim=1))]
        stacked = [torch.stack(columns, dim=1) for columns in zip(*labels, strict=True)]
        return LabelledTokens(on_cpu, *stacked).to(tokens.device)

    def candidates(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Int[Tensor, "batch pos rule"], Int[Tensor, "batch pos rule"]]:
        """The source and the answer that each rule would have if it held at a position.

        -1 where it would find no source. dup has no trigger: it has them where it holds only.

        Raises:
            ValueError: if ``tokens`` is empty or an id lies outside the vocabulary.
        """
        check_token_ids(tokens, len(self.vocab))
        on_cpu = tokens.long().cpu()
        reader = Reader(Tables.build(), *on_cpu.shape)
        columns = [reader.read_all(at, token) for at, token in enumerate(on_cpu.unbind(dim=1))]
        sources, answers = (torch.stack(part, dim=1) for part in zip(*columns, strict=True))
        return sources.to(tokens.device), answers.to(tokens.device)

    def sample(self, n_sequences: int, *, seed: int) -> LabelledTokens:
        """Draw labelled sequences; the same seed gives the same sequences.

        Raises:
            ValueError: if ``n_sequences`` is below 1.
        """
        check_n_sequences(n_sequences)
        generator = torch.Generator().manual_seed(seed)
        reader = Reader(Tables.build(), n_sequences, self.n_ctx)
        topics = torch.tensor(self.families["topic"])
        token = torch.full((n_sequences,), self.token_id(BOS))
        tokens: list[Tensor] = []
        labels: list[tuple[Tensor, Tensor, Tensor]] = []
        for position in range(self.n_ctx):
            if position == 1:
                token = topics[torch.randint(len(topics), (n_sequences,), generator=generator)]
            elif position > 1:
                answer = labels[-1][2]
                token = torch.where(answer >= 0, answer, self._draw(reader, position, generator))
            tokens.append(token)
            labels.append(reader.read(position, token))
        stacked = [torch.stack(columns, dim=1) for columns in zip(*labels, strict=True)]
        return LabelledTokens(torch.stack(tokens, dim=1), *stacked)

    def _draw(
        self, reader: Reader, position: int, generator: torch.Generator
    ) -> Int[Tensor, "batch"]:
        """One token per sequence where no rule determines it: a usable trigger or content."""
        tables, batch = reader.tables, reader.history.shape[0]
        usable = (reader.candidates(position) >= 0).float() * tables.trigger_rates
        trigger = tables.trigger_of_rule[torch.multinomial(usable, 1, generator=generator)]

        content = torch.multinomial(
            tables.content_rates, batch, replacement=True, generator=generator
        )
        content = rearrange(content, "batch -> batch 1")
        words = torch.tensor(self.families["word"])
        counts = reader.count[:, words]
        once, new = (counts == 1).float(), (counts == 0).float()
        want_repeat = torch.rand(batch, 1, generator=generator) < self.repeat_rate
        wanted = torch.where(want_repeat, once, new)
        wanted = torch.where(wanted.any(1, keepdim=True), wanted, torch.ones_like(wanted))
        word = words[torch.multinomial(wanted, 1, generator=generator)]
        content = torch.where(torch.isin(content, words), word, content)

        is_trigger = torch.rand(batch, 1, generator=generator) < self.trigger_rate
        return rearrange(torch.where(is_trigger, trigger, content), "batch 1 -> batch")
