"""Prompts made for one behaviour each: random fillers around the tokens that matter.

Each function draws sequences [n, n_pos] of one length; they begin with BOS where the vocabulary
has one. Places are random, so that no source is at a fixed distance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.analysis.strings import Vocabulary

TEMPLATES = (
    "Then,{A} and{B} went to the store.{B} gave a drink to{A}",
    "One day,{A} met{B} in the park.{B} was happy to see{A}",
    "When{A} and{B} got a toy,{B} wanted to give it to{A}",
)
"""Sentences in which a name is due again (arXiv 2211.00593)."""


@dataclass
class Prompter:
    """Draws prompts of a vocabulary; the same seed draws the same.

    Args:
        vocabulary: the strings of all tokens.
        n_pos: length of a sequence.
        seed: for what is random.
    """

    vocabulary: Vocabulary
    n_pos: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        bos = self.vocabulary.bos
        self.start = [] if bos is None else [bos]
        ordinary = self.vocabulary.words
        if len(ordinary) < self.n_pos // 2:  # few words: any tokens with text will do
            ordinary = [i for i in range(len(self.vocabulary)) if i not in self.vocabulary.special]
        self.fillers = ordinary

    # ---------------------------------------------------------------------------------- parts

    def randint(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, tokens: Sequence[int], n: int) -> list[int]:
        """`n` different tokens; some more than once where there are too few."""
        chosen: list[int] = []
        while len(chosen) < n:
            order = torch.randperm(len(tokens), generator=self.generator).tolist()
            chosen += [tokens[index] for index in order[: n - len(chosen)]]
        return chosen

    def padded(self, core: Sequence[int], without: Sequence[int] = ()) -> list[int]:
        """Fillers, then what matters, with fillers after it where there is room."""
        fillers = [token for token in self.fillers if token not in {*core, *without}]
        room = self.n_pos - len(self.start) - len(core)
        before = self.randint(min(4, max(room, 0)), max(room, 0))
        around = self.pick(fillers, max(room, 0))
        return [*self.start, *around[:before], *core, *around[before:]][: self.n_pos]

    def sequences(self, n: int, draw: Callable[[], list[int]]) -> Int[Tensor, "n pos"]:
        """`n` sequences."""
        return torch.tensor([draw() for _ in range(n)])

    # ---------------------------------------------------------------------------------- prompts

    def plain(self, n: int) -> Int[Tensor, "n pos"]:
        """Random tokens."""
        return self.sequences(n, lambda: self.padded([]))

    def shuffled_repeats(self, n: int) -> Int[Tensor, "n pos"]:
        """A segment, then its tokens in another order."""

        def draw() -> list[int]:
            room = self.n_pos - len(self.start)
            period = self.randint(room // 3, room // 2)
            segment = self.pick(self.fillers, period)
            again = self.pick(segment, room - period)
            return [*self.start, *segment, *again]

        return self.sequences(n, draw)

    def repeats(self, n: int) -> Int[Tensor, "n pos"]:
        """A segment of random length, repeated to the end."""

        def draw() -> list[int]:
            room = self.n_pos - len(self.start)
            segment = self.pick(self.fillers, self.randint(room // 4, room // 2))
            return [*self.start, *(segment * room)[:room]]

        return self.sequences(n, draw)

    def gapped_repeats(self, n: int) -> Int[Tensor, "n pos"]:
        """A segment repeated, every second token of which is another one each time."""

        def draw() -> list[int]:
            room = self.n_pos - len(self.start)
            half = self.randint(room // 6, room // 4)
            kept = self.pick(self.fillers, half)
            others = self.pick([t for t in self.fillers if t not in kept] or self.fillers, room)
            body = [kept[at // 2 % half] if at % 2 == 0 else others[at // 2] for at in range(room)]
            return [*self.start, *body]

        return self.sequences(n, draw)

    def subtokens(self, n: int) -> Int[Tensor, "n pos"]:
        """A word, later the beginning of the same word as a token of its own."""
        pairs = prefix_pairs(self.vocabulary)

        def draw() -> list[int]:
            whole, prefix = pairs[self.randint(0, len(pairs) - 1)]
            between = self.pick(self.fillers, self.randint(3, self.n_pos // 3))
            between = [token for token in between if token not in (whole, prefix)]
            return self.padded([whole, *between, prefix])

        return self.sequences(n, draw)

    def names(self, n: int) -> Int[Tensor, "n pos"]:
        """A name three times among fillers; with a tokenizer, sentences in which one is due."""
        ids = list(self.vocabulary.names.values())

        def draw() -> list[int]:
            first, second = self.pick(ids, 2)
            gaps = [self.pick(self.fillers, self.randint(3, 8)) for _ in range(2)]
            core = [first, *gaps[0], first, *gaps[1], first]
            if self.vocabulary.tokenizer is not None:
                template = TEMPLATES[self.randint(0, len(TEMPLATES) - 1)]
                a, b = (self.vocabulary.strings[name] for name in (first, second))
                core = self.vocabulary.encode(template.format(A=a, B=b)) or core
            return self.padded(core[: self.n_pos - len(self.start)], without=ids)

        return self.sequences(n, draw)

    def successions(self, n: int) -> Int[Tensor, "n pos"]:
        """Members of an order in a row: Monday, Tuesday, Wednesday."""
        orders = list(self.vocabulary.orders.values())

        def draw() -> list[int]:
            order = orders[self.randint(0, len(orders) - 1)]
            start = self.randint(0, len(order) - 3)
            core = []
            for member in order[start : start + 4]:
                core += [member, *self.pick(self.fillers, self.randint(0, 1))]
            return self.padded(core, without=[token for order in orders for token in order])

        return self.sequences(n, draw)

    def acronyms(self, n: int) -> Int[Tensor, "n pos"]:
        """Three words, then their first letters."""
        initials = first_letters(self.vocabulary)
        by_letter: dict[int, list[int]] = {}
        for word, letter in initials.items():
            by_letter.setdefault(letter, []).append(word)

        def draw() -> list[int]:
            letters = self.pick(list(by_letter), 3)
            words = [self.pick(by_letter[letter], 1)[0] for letter in letters]
            other = [token for token in self.fillers if initials.get(token) not in letters]
            core = [*words, *self.pick(other or words, self.randint(1, 5)), *letters]
            alike = [word for letter in letters for word in by_letter[letter]]
            return self.padded(core, without=[*alike, *by_letter])

        return self.sequences(n, draw)

    def delimited(self, n: int) -> Int[Tensor, "n pos"]:
        """Fillers with one delimiter in the first half."""
        marks = self.vocabulary.delimiters

        def draw() -> list[int]:
            row = self.padded([], without=marks)
            row[self.randint(2, self.n_pos // 2)] = self.pick(marks, 1)[0]
            return row

        return self.sequences(n, draw)

    def topical(self, n: int) -> Int[Tensor, "n pos"]:
        """Common fillers, and one word at the beginning that few sequences have."""
        common, rare = self.fillers[::2], self.fillers[1::2]

        def draw() -> list[int]:
            row = [*self.start, *self.pick(common, self.n_pos - len(self.start))]
            row[self.randint(len(self.start) + 1, 6)] = self.pick(rare, 1)[0]
            return row

        return self.sequences(n, draw)

    def sums(self, n: int) -> Int[Tensor, "n pos"]:
        """Fillers, then `a+b=` with numbers of up to two digits."""

        def draw() -> list[int]:
            a, b = self.randint(0, 99), self.randint(0, 99)
            digits = number_tokens(self.vocabulary)
            sign, equals = self.vocabulary.known("+=").values()
            core = [*digits(a), sign, *digits(b), equals]
            return self.padded(core, without=[sign, equals])

        return self.sequences(n, draw)


def prefix_pairs(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Ordinary words of one token, each with a shorter token that begins it."""
    starts = {
        vocabulary.strings[token]: token
        for token in range(len(vocabulary))
        if token not in vocabulary.special
        and vocabulary.begins_word(token)
        and vocabulary.strings[token].strip().isalpha()
    }
    strings = ((token, vocabulary.strings[token]) for token in vocabulary.words)
    return [
        (token, starts[string[:cut]])
        for token, string in strings
        for cut in range(1, len(string))
        if string[:cut] in starts
    ]


def first_letters(vocabulary: Vocabulary) -> dict[int, int]:
    """For words, the token that is their first letter, as a capital."""
    letters = vocabulary.known(map(chr, range(ord("A"), ord("Z") + 1)))
    initials = {token: vocabulary.strings[token].strip()[:1].upper() for token in vocabulary.words}
    return {token: letters[letter] for token, letter in initials.items() if letter in letters}


def number_tokens(vocabulary: Vocabulary) -> Callable[[int], list[int]]:
    """How numbers are written: one token where there is one, else digit by digit."""
    known = vocabulary.known(str(number) for number in range(100))

    def tokens(number: int) -> list[int]:
        text = str(number)
        return [known[text]] if text in known else [known[digit] for digit in text]

    return tokens
