"""Tokens and rules of `RuleLanguage`, as data."""

from collections.abc import Callable
from typing import Literal, NamedTuple

BOS = "<bos>"
AGAIN = "again"

_FAMILY_TOKENS: dict[str, str] = {
    "number": "zero one two three four five six seven eight nine",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "ordinal": "first second third fourth fifth sixth seventh eighth",
    "name": "Alice Bob Carol David Emma Frank Grace Henry",
    "word": "apple bread cloud drum eagle forest garden honey island jacket",
    "letter": "A B C D E F G H I J",
    "country": "France Japan Egypt Peru Kenya Norway Cuba Greece",
    "capital": "Paris Tokyo Cairo Lima Nairobi Oslo Havana Athens",
    "filler": "the a of and to in with for",
    "topic": "music sport history science cooking travel film weather",
}
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(tokens.split()) for family, tokens in _FAMILY_TOKENS.items()
}


class Rule(NamedTuple):
    """One rule: which query, which source token, which answer.

    Attributes:
        name: Name of the rule.
        query: The trigger token, or the family whose repeated tokens are queries (``dup``).
        where: How the source is found: the last or the first token of ``family`` before the query,
            position 1 (``fixed``), the position before the query (``previous``), or the most recent
            earlier occurrence of the query token itself (``same``).
        family: Family of the source token; None for any content token.
        answer: The answer's string from the source's family (a tuple of strings) and its index.
    """

    name: str
    query: str
    where: Literal["last", "first", "fixed", "previous", "same"]
    family: str | None
    answer: Callable[[tuple[str, ...], int], str]


def _next(family: tuple[str, ...], index: int) -> str:
    return family[(index + 1) % len(family)]


def _before(family: tuple[str, ...], index: int) -> str:
    return family[(index - 1) % len(family)]


def _copy(family: tuple[str, ...], index: int) -> str:
    return family[index]


RULES: tuple[Rule, ...] = (
    Rule("nextnum", "plus_one:", "last", "number", _next),
    Rule("prevnum", "minus_one:", "last", "number", _before),
    Rule("nextday", "tomorrow:", "last", "day", _next),
    Rule("nextord", "next_place:", "last", "ordinal", _next),
    Rule("lastname", "last_person:", "last", "name", _copy),
    Rule("firstname", "first_person:", "first", "name", _copy),
    Rule("acronym", "initial:", "last", "word", lambda _, index: FAMILIES["letter"][index]),
    Rule("capital", "capital:", "last", "country", lambda _, index: FAMILIES["capital"][index]),
    Rule("topic", "topic:", "fixed", "topic", _copy),
    Rule("prevcopy", "copy:", "previous", None, _copy),
    Rule("dup", "word", "same", "word", lambda *_: AGAIN),
)

# What follows a trigger is its rule's answer; dup has no trigger, any word can be its query.
TRIGGERS: tuple[str, ...] = tuple(rule.query for rule in RULES if rule.where != "same")
DUP = next(index for index, rule in enumerate(RULES) if rule.where == "same")

# Relative rates at which triggers and content families are drawn, 1 where not given. topic: and
# copy: can always be used and would crowd out the rest; words serve two rules.
TRIGGER_RATES: dict[str, float] = {"topic:": 0.5, "copy:": 1.0}
CONTENT_RATES: dict[str, float] = {
    "number": 1.0,
    "day": 1.0,
    "ordinal": 1.0,
    "name": 1.0,
    "word": 2.5,
    "country": 1.0,
    "filler": 1.0,
}

VOCAB: tuple[str, ...] = (
    BOS,
    *(token for family in FAMILIES.values() for token in family),
    *TRIGGERS,
    AGAIN,
)
TOKEN_IDS: dict[str, int] = {token: index for index, token in enumerate(VOCAB)}
