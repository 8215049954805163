"""What is asked about a head, and how answers are read.

Explanation, detection and fuzzing follow arXiv 2410.13928; what is added is the z pattern: each
example says from which tokens the head fetched.
"""

import json
import re
from collections.abc import Sequence

import torch

from lorsa_lens.analysis.contexts.store import KeptContext
from lorsa_lens.analysis.interpretation.endpoint import Message
from lorsa_lens.analysis.strings import Vocabulary

BEFORE, AFTER = 24, 4
"""Tokens shown before and after the one at which a head is active."""

N_SOURCES = 3
"""Source tokens named for each example."""

EXPLAIN = (
    "An attention head of a language model reads from earlier tokens and writes at a later one. "
    "In each example, <<token>> is where it writes, and the tokens it reads from are listed with "
    "their shares. Say in one short sentence what the head does: at which tokens it writes, from "
    "which tokens it reads, and what they have in common. Answer with the sentence only."
)

DETECT = (
    "An attention head of a language model is described as follows:\n{explanation}\n\n"
    "Below are {n} numbered texts. For each, say whether the head is active at its last token. "
    "Answer with a JSON list of {n} numbers, 1 for active and 0 for not active, nothing else."
)

FUZZ = (
    "An attention head of a language model is described as follows:\n{explanation}\n\n"
    "Below are {n} numbered texts. In each, the token where the head is said to write is marked "
    "<<so>> and the token it is said to read from [[so]]. For each, say whether the marks are "
    "right. Answer with a JSON list of {n} numbers, 1 for right and 0 for wrong, nothing else."
)


def explanation_messages(examples: Sequence[KeptContext], vocabulary: Vocabulary) -> list[Message]:
    """The question for an explanation."""
    lines = []
    for number, example in enumerate(examples, start=1):
        sources = ", ".join(
            f"{vocabulary.strings[int(example.tokens[at])]!r} ({share:.0%})"
            for at, share in top_sources(example)
        )
        lines.append(f"{number}. {marked_text(example, vocabulary)}\n   reads from: {sources}")
    return [
        {"role": "system", "content": EXPLAIN},
        {"role": "user", "content": "\n".join(lines)},
    ]


def scoring_messages(question: str, explanation: str, texts: Sequence[str]) -> list[Message]:
    """The question for a detection or a fuzzing score.

    Args:
        question: `DETECT` or `FUZZ`.
        explanation: the head's.
        texts: what is to be judged.
    """
    system = question.format(explanation=explanation, n=len(texts))
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return [{"role": "system", "content": system}, {"role": "user", "content": numbered}]


def read_judgements(answer: str, n: int) -> list[bool] | None:
    """The list in an answer; None where there is none of the right length."""
    found = re.search(r"\[[^\[\]]*\]", answer)
    if found is None:
        return None
    try:
        judgements = json.loads(found.group())
    except ValueError:
        return None
    right = len(judgements) == n and all(one in (0, 1) for one in judgements)
    return [bool(one) for one in judgements] if right else None


def top_sources(example: KeptContext) -> list[tuple[int, float]]:
    """Positions with the largest shares of the z pattern, and these shares."""
    shares = example.z_pattern.abs() / example.z_pattern.abs().sum().clamp(min=1e-12)
    top = shares.topk(min(N_SOURCES, len(shares)))
    return [
        (at, share)
        for at, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if share >= 0.05
    ]


def marked_text(
    example: KeptContext, vocabulary: Vocabulary, *, query: int | None = None, source: int = -1
) -> str:
    """The text around a query, which is marked; a source, if given, is marked as well.

    Args:
        example: the context.
        vocabulary: strings of all tokens.
        query: the position to mark. None: the one where the head is active.
        source: the position of the source to mark, -1 for none.
    """
    at = example.query if query is None else query
    first = max(0, min(at - BEFORE, source if source >= 0 else at))
    pieces = []
    for place in range(first, min(len(example.tokens), at + AFTER + 1)):
        piece = vocabulary.strings[int(example.tokens[place])]
        piece = f"[[{piece}]]" if place == source else piece
        pieces.append(f"<<{piece}>>" if place == at else piece)
    return _one_line("".join(pieces))


def text_up_to(example: KeptContext, vocabulary: Vocabulary, query: int) -> str:
    """The text that ends with a position."""
    first = max(0, query - BEFORE)
    tokens = example.tokens[first : query + 1]
    return _one_line("".join(vocabulary.read(torch.as_tensor(tokens))))


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").strip()
