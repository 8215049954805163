"""The behaviours that heads are known for, as far as a vocabulary has what they need."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from lorsa_lens.analysis.behaviours import positions, words
from lorsa_lens.analysis.behaviours.effects import Effect, copying, succession
from lorsa_lens.analysis.behaviours.positions import Mask, Tokens
from lorsa_lens.analysis.behaviours.prompts import (
    Prompter,
    first_letters,
    prefix_pairs,
)
from lorsa_lens.analysis.strings import Vocabulary

Draw = Callable[[Prompter, int], Int[Tensor, "n pos"]]


@dataclass(frozen=True)
class Behaviour:
    """What a head of a kind fetches, and what it does with it."""

    name: str

    sources: Callable[[Tokens], Mask]
    """For every query of some sequences, the keys that such a head fetches from."""

    prompts: Draw | None = None
    """Draws sequences made for this behaviour. None: it is looked for in running text only."""

    effect: Effect | None = None
    """What such a head does to the logits. None: nothing is asked of it."""

    fixed_place: bool = False
    """Whether the place of a query alone says where its sources are: then the null draws keys at
    random, since exchanging distances would change nothing."""

    selective: bool = False
    """Whether such a head works at queries with a source only: then its score is multiplied by
    the share of its energy there. Else a head that looks at a fixed distance might pass."""

    source: str = ""
    """Where this kind of head was described."""

    @classmethod
    def of_sources(cls, name: str, source_positions: Int[Tensor, "batch pos"]) -> "Behaviour":
        """A behaviour given by the position of every token's source, -1 where it has none.

        Args:
            name: of the behaviour.
            source_positions: for the very sequences that it will be scored on.
        """

        def sources(tokens: Tokens) -> Mask:
            if tokens.shape != source_positions.shape:
                raise ValueError(
                    f"the sources of {name!r} are those of tokens of shape "
                    f"{list(source_positions.shape)}, not {list(tokens.shape)}"
                )
            at = positions.distances(tokens)
            keys = at[:, :1, :].neg()
            return keys == source_positions[:, :, None].to(keys)

        return cls(name, sources)


def known_behaviours(vocabulary: Vocabulary) -> dict[str, Behaviour]:
    """All behaviours that a vocabulary has the tokens for, by name."""
    found = [
        *_by_position(),
        *_by_names(vocabulary),
        *_by_order(vocabulary),
        *_by_words(vocabulary),
        *_by_sums(vocabulary),
    ]
    return {behaviour.name: behaviour for behaviour in found}


def _by_position() -> list[Behaviour]:
    plain, repeats = Prompter.plain, Prompter.repeats
    return [
        Behaviour(
            "previous token",
            positions.previous,
            plain,
            fixed_place=True,
            source="arXiv 2211.00593, section 3.2",
        ),
        Behaviour(
            "token two before",
            lambda tokens: positions.previous(tokens, 2),
            plain,
            fixed_place=True,
            source="arXiv 2211.00593, section 3.2, with another offset",
        ),
        Behaviour(
            "current token",
            positions.current,
            plain,
            fixed_place=True,
            source="TransformerLens, head_detector",
        ),
        Behaviour(
            "first token",
            positions.first,
            plain,
            fixed_place=True,
            source="arXiv 2309.17453 (attention sinks)",
        ),
        Behaviour(
            "duplicate token",
            positions.duplicate,
            Prompter.shuffled_repeats,
            source="arXiv 2211.00593, section 3.2",
        ),
        Behaviour("induction", positions.induction, repeats, source="arXiv 2209.11895"),
        Behaviour(
            "induction with gap",
            positions.gapped_induction,
            Prompter.gapped_repeats,
            source="arXiv 2209.11895, for the token after next",
        ),
    ]


def _by_names(vocabulary: Vocabulary) -> list[Behaviour]:
    names = list(vocabulary.names.values())
    if len(names) < 2:
        return []
    itself = words.table({name: name for name in names}, len(vocabulary))
    is_name = vocabulary.marked(names)
    return [
        Behaviour(
            "name mover",
            lambda tokens: words.leads_to_next(tokens, itself),
            Prompter.names,
            copying(names),
            source="arXiv 2211.00593, section 3.1",
        ),
        Behaviour(
            "copy suppression",
            lambda tokens: words.before_query(tokens, is_name),
            Prompter.names,
            copying(names, promotes=False),
            source="arXiv 2310.04625, for names",
        ),
    ]


def _by_order(vocabulary: Vocabulary) -> list[Behaviour]:
    orders = list(vocabulary.orders.values())
    if not orders:
        return []
    effect = succession(orders)
    following = words.table(effect.answers, len(vocabulary))
    return [
        Behaviour(
            "successor",
            lambda tokens: words.leads_to_next(tokens, following),
            Prompter.successions,
            effect,
            source="arXiv 2312.09230",
        )
    ]


def _by_words(vocabulary: Vocabulary) -> list[Behaviour]:
    found = []
    if vocabulary.marks_words and prefix_pairs(vocabulary):
        found.append(
            Behaviour(
                "subtoken induction",
                lambda tokens: words.subtoken_induction(tokens, vocabulary),
                Prompter.subtokens,
                source="arXiv 2504.20938",
            )
        )
    initials = first_letters(vocabulary)
    if len(set(initials.values())) >= 3:
        answers = words.table(initials, len(vocabulary))
        letters = sorted(set(initials.values()))
        found.append(
            Behaviour(
                "first letter",
                lambda tokens: words.leads_to_next(tokens, answers),
                Prompter.acronyms,
                Effect(initials, [letters]),
                source="arXiv 2405.04156 (acronyms)",
            )
        )
    if vocabulary.delimiters:
        marks = vocabulary.marked(vocabulary.delimiters)
        found.append(
            Behaviour(
                "delimiter",
                lambda tokens: words.before_query(tokens, marks),
                Prompter.delimited,
                source="arXiv 1906.04341, section 3.2",
            )
        )
    no_topic = vocabulary.marked([*vocabulary.special, *vocabulary.delimiters])
    found.append(
        Behaviour(
            "topic anchor",
            lambda tokens: words.topics(tokens, no_topic),
            Prompter.topical,
            source="arXiv 2504.20938 (thematic anchors)",
        )
    )
    return found


def _by_sums(vocabulary: Vocabulary) -> list[Behaviour]:
    if words.missing_for_sums(vocabulary):
        return []

    def operand(which: int) -> Callable[[Tokens], Mask]:
        return lambda tokens: words.operand(tokens, vocabulary, which)

    return [
        Behaviour(name, operand(which), Prompter.sums, selective=True, source="arXiv 2410.21272")
        for which, name in enumerate(("first operand", "second operand"))
    ]
