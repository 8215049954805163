"""The strings of a model's tokens, and which of them are words, names, ordinals or delimiters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lorsa_lens.analysis.pieces import readable_pieces
from lorsa_lens.hosts import host_of

ORDERS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "digits": "0 1 2 3 4 5 6 7 8 9 10 11 12",
        "numbers": "zero one two three four five six seven eight nine ten eleven twelve",
        "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
        "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "months": "January February March April May June July August September October November "
        "December",
        "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
        "roman": "I II III IV V VI VII VIII IX X",
    }.items()
}
"""Sequences whose successor heads have been described (arXiv 2312.09230, section 2)."""

_NAME_LIST = (
    "Adam Alex Alice Amy Andrew Anna Anne Arthur Ben Benny Bob Brian Carl Carol Charles Charlie "
    "Chris Daisy Dan Daniel David Edward Ella Emily Emma Eric Eve Frank Fred Gary George Grace "
    "Greg Harry Henry Jack Jake James Jane Jason Jen Jenny Jessica Jill Jim Jimmy Joe John Johnny "
    "Jordan Joseph Josh Julia Kate Kevin Kim Laura Lea Lee Leo Lily Lisa Lucy Luke Mark Martin "
    "Mary Matt Max Mia Michael Mike Molly Nick Olivia Patrick Paul Peter Rachel Richard Robert "
    "Rose Ryan Sam Sara Sarah Scott Simon Sophie Spot Steve Steven Sue Susan Thomas Tim Timmy Tom "
    "Tommy Tony Victoria William Zoe"
)
NAMES: tuple[str, ...] = tuple(_NAME_LIST.split())
"""Common first names in English."""

DELIMITERS = frozenset(".,;:!?()[]{}\"'\n-|/") | {"...", "--", "\n\n", "''", "``", "<0x0A>"}
"""Strings of tokens that end or part phrases."""


@dataclass(frozen=True)
class Vocabulary:
    """The strings of all tokens.

    Args:
        strings: by token id, with a leading space where the token begins a word.
        tokenizer: a Hugging Face tokenizer, to read templates with. None: templates are read word
            by word.
        special: ids that stand for no text, such as BOS.
        bos: the token that sequences begin with, if any.
    """

    strings: tuple[str, ...]
    tokenizer: Any = None
    special: frozenset[int] = frozenset()
    bos: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Vocabulary":
        """The vocabulary of a model's tokenizer.

        Raises:
            ValueError: if the model has no tokenizer.
        """
        host_of(model)
        tokenizer = cast(Any, model).tokenizer
        if tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: give vocabulary=Vocabulary(strings of all tokens)"
            )
        return cls(
            tuple(readable_pieces(tokenizer, int(cast(Any, model).cfg.d_vocab))),
            tokenizer,
            frozenset(tokenizer.all_special_ids),
            tokenizer.bos_token_id,
        )

    def __len__(self) -> int:
        return len(self.strings)

    @cached_property
    def marks_words(self) -> bool:
        """Whether leading spaces tell words from their continuations; else each token is a word."""
        return any(string.startswith(" ") and len(string) > 1 for string in self.strings)

    def begins_word(self, token: int) -> bool:
        """Whether a word begins with this token."""
        return not self.marks_words or not self.strings[token][:1].isalpha()

    def id_of(self, word: str) -> int | None:
        """The token that is a word, preferably with the space before it."""
        for string in (f" {word}", word):
            if string in self._ids:
                return self._ids[string]
        return None

    def known(self, words: Iterable[str]) -> dict[str, int]:
        """Those words that are one token, with their ids."""
        found = {word: self.id_of(word) for word in words}
        return {word: token for word, token in found.items() if token is not None}

    def marked(self, tokens: Iterable[int]) -> Bool[Tensor, " d_vocab"]:
        """True for these tokens."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[sorted(tokens)] = True
        return mask

    def encode(self, text: str) -> list[int] | None:
        """Token ids of a text, without special ones; None where it cannot be written."""
        if self.tokenizer is not None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        known = [self.id_of(word) for word in text.split()]
        return None if None in known else cast(list[int], known)

    def read(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        """The strings of some tokens."""
        return [self.strings[int(token)] for token in tokens]

    @cached_property
    def _ids(self) -> dict[str, int]:
        reversed_ids = reversed(list(enumerate(self.strings)))
        return {string: token for token, string in reversed_ids if token not in self.special}

    # --------------------------------------------------------------------------------- families

    @cached_property
    def names(self) -> dict[str, int]:
        """First names that are one token."""
        return self.known(NAMES)

    @cached_property
    def delimiters(self) -> list[int]:
        """Tokens that end or part phrases."""
        parts = enumerate(self.strings)
        return [token for token, string in parts if (string.strip(" ") or string) in DELIMITERS]

    @cached_property
    def orders(self) -> dict[str, list[int]]:
        """Ordered sequences of tokens: the longest stretch of each that has no gap, if 3 long."""
        found = {}
        for name, words in ORDERS.items():
            best: list[int] = []
            stretch: list[int] = []
            for token in (self.id_of(word) for word in words):
                stretch = [] if token is None else [*stretch, token]
                best = max(best, stretch, key=len)
            if len(best) >= 3:
                found[name] = best
        return found

    @cached_property
    def words(self) -> list[int]:
        """Ordinary words: letters only, at least two, none of the families above."""
        ordered = (token for order in self.orders.values() for token in order)
        taken = {*self.special, *self.names.values(), *ordered}
        return [
            token
            for token, string in enumerate(self.strings)
            if token not in taken
            and self.begins_word(token)
            and len(string.strip()) > 1
            and string.strip().isalpha()
        ]
