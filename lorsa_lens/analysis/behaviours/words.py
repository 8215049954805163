"""Sources that depend on what tokens mean: names, orders, letters, delimiters, topics, sums."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lorsa_lens.analysis.behaviours.positions import (
    Mask,
    Tokens,
    distances,
    duplicate,
    induction,
    next_tokens,
)
from lorsa_lens.analysis.strings import Vocabulary

FAR = 16
"""A topic anchor lies at least this many tokens back."""

N_TOPICS = 3
"""Topic tokens per sequence."""


def table(pairs: Mapping[int, int], d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """A map from tokens to tokens as a tensor, -1 where there is none."""
    mapped = torch.full((d_vocab,), -1)
    mapped[list(pairs)] = torch.tensor(list(pairs.values()), dtype=torch.long)
    return mapped


def leads_to_next(tokens: Tokens, answers: Int[Tensor, " d_vocab"]) -> Mask:
    """Tokens up to the query whose answer is the token that comes next."""
    answer = answers.to(tokens.device)[tokens]
    following = next_tokens(tokens)
    mask = (following[:, :, None] == answer[:, None, :]) & (answer[:, None, :] >= 0)
    return mask & (distances(tokens) >= 0)


def before_query(tokens: Tokens, chosen: Bool[Tensor, " d_vocab"]) -> Mask:
    """All earlier tokens of a kind, the first position left out."""
    mask = chosen.to(tokens.device)[tokens][:, None, :] & (distances(tokens) > 0)
    mask[:, :, 0] = False
    return mask


def topics(tokens: Tokens, excluded: Bool[Tensor, " d_vocab"]) -> Mask:
    """Far tokens that are most particular to their sequence.

    Those are the ones with the largest tf-idf over the sequences given. Tokens that the query
    itself repeats or continues are left out.

    Args:
        tokens: sequences of one text, several of them.
        excluded: tokens that are no topic, such as delimiters.
    """
    counts = torch.zeros(tokens.shape[0], len(excluded), device=tokens.device)
    counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
    inverse = (tokens.shape[0] / (counts > 0).sum(0).clamp(min=1)).log()
    weight = counts * inverse * ~excluded.to(tokens.device)
    top = weight.topk(N_TOPICS, dim=1)
    chosen = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)
    mask = chosen.gather(1, tokens)[:, None, :] & (distances(tokens) >= FAR)
    mask[:, :, 0] = False
    return mask & ~duplicate(tokens) & ~induction(tokens)


class Sum(NamedTuple):
    """Where `a+b=` stands in a text."""

    row: int
    equals: int
    """Position of `=`."""
    operands: tuple[slice, slice]
    """Positions of `a` and of `b`."""
    values: tuple[int, int]
    """The two numbers."""


def missing_for_sums(vocabulary: Vocabulary) -> list[str]:
    """What a vocabulary lacks to write sums: of the ten digits, `+` and `=`."""
    needed = [*map(str, range(10)), "+", "="]
    known = vocabulary.known(needed)
    return [word for word in needed if word not in known]


def find_sums(tokens: Tokens, vocabulary: Vocabulary) -> list[Sum]:
    """All `a+b=` in some sequences.

    Args:
        tokens: sequences.
        vocabulary: their strings; numbers may be one token or several.
    """
    strings = [string.strip() for string in vocabulary.strings]
    found = []
    for row, sequence in enumerate(tokens.tolist()):
        for equals in (at for at, token in enumerate(sequence) if strings[token] == "="):
            before = [strings[token] for token in sequence[:equals]]
            spans = _operands(before)
            if spans is not None:
                first, second = (int("".join(before[span])) for span in spans)
                found.append(Sum(row, equals, spans, (first, second)))
    return found


def operand(tokens: Tokens, vocabulary: Vocabulary, which: int) -> Mask:
    """The tokens of an operand of `a+b=`, at the query `=`.

    Args:
        tokens: sequences.
        vocabulary: their strings.
        which: 0 for the operand before `+`, 1 for that after it.
    """
    mask = torch.zeros_like(distances(tokens), dtype=torch.bool)
    for one in find_sums(tokens, vocabulary):
        mask[one.row, one.equals, one.operands[which]] = True
    return mask


def _operands(before: list[str]) -> tuple[slice, slice] | None:
    """Positions of the two numbers in tokens that end in `a+b`."""

    def number_before(stop: int) -> int:
        start = stop
        while start > 0 and before[start - 1].isdecimal():
            start -= 1
        return start

    second = number_before(len(before))
    plus = second - 1
    if second == len(before) or plus < 1 or before[plus] != "+":
        return None
    first = number_before(plus)
    return None if first == plus else (slice(first, plus), slice(second, len(before)))


def subtoken_induction(tokens: Tokens, vocabulary: Vocabulary) -> Mask:
    """Tokens with the letters that continue the query's word as an earlier word went on.

    The word so far must be the beginning of an earlier word that was cut into tokens at another
    place ("Mar|ion ... M" looks at "Mar"), so that comparing tokens would not find it
    (arXiv 2504.20938, section on subtoken induction).
    """
    mask = torch.zeros_like(distances(tokens), dtype=torch.bool)
    for row, sequence in enumerate(tokens.tolist()):
        words = _words(sequence, vocabulary)
        for number, word in enumerate(words):
            for query, length in word:
                written = _text(word, sequence, vocabulary)[:length]
                for earlier in words[:number]:
                    _mark(mask[row, query], written, earlier, sequence, vocabulary)
    return mask & ~induction(tokens)


_Word = list[tuple[int, int]]
"""A word's positions, each with the number of letters of the word up to its end."""


def _words(sequence: list[int], vocabulary: Vocabulary) -> list[_Word]:
    words: list[_Word] = []
    for at, token in enumerate(sequence):
        letters = vocabulary.strings[token].strip()
        if token in vocabulary.special or not letters.isalpha():
            words.append([])
        elif vocabulary.begins_word(token) or not words or not words[-1]:
            words.append([(at, len(letters))])
        else:
            words[-1].append((at, words[-1][-1][1] + len(letters)))
    return [word for word in words if word]


def _text(word: _Word, sequence: list[int], vocabulary: Vocabulary) -> str:
    return "".join(vocabulary.strings[sequence[at]].strip() for at, _ in word)


def _mark(
    row: Bool[Tensor, " key"],
    written: str,
    earlier: _Word,
    sequence: list[int],
    vocabulary: Vocabulary,
) -> None:
    """Mark the token of an earlier word with the letter after what is written."""
    text = _text(earlier, sequence, vocabulary)
    if len(text) <= len(written) or not text.startswith(written):
        return
    cut_alike = any(length == len(written) for _, length in earlier)
    if not cut_alike:
        row[next(at for at, length in earlier if length > len(written))] = True
