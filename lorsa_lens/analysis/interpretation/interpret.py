"""Heads explained by a language model, and the explanations scored by what they predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from tqdm.auto import tqdm

from lorsa_lens.analysis.contexts.store import HeadContexts, KeptContext
from lorsa_lens.analysis.interpretation.endpoint import CHARACTERS_PER_TOKEN, ChatEndpoint
from lorsa_lens.analysis.interpretation.wording import (
    DETECT,
    FUZZ,
    explanation_messages,
    marked_text,
    read_judgements,
    scoring_messages,
    text_up_to,
    top_sources,
)
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import table

if TYPE_CHECKING:
    from pandas import DataFrame

Heads = Iterable[tuple[int, int]]
"""Heads as pairs of layer and head."""


@runtime_checkable
class HeadReader(Protocol):
    """Where contexts of heads come from: a `ContextStore`."""

    def head(self, layer: int, head: int) -> HeadContexts:
        """One head."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an interpretation would take, before anything is sent."""

    n_requests: int
    """Requests that are not cached."""
    prompt_tokens: int
    """Estimated tokens of the questions."""
    answer_tokens: int
    """Most tokens that the answers can have."""
    price: float
    """In the currency of the prices given."""


def estimate_cost(
    store: HeadReader,
    heads: Heads,
    vocabulary: Vocabulary,
    endpoint: ChatEndpoint,
    *,
    n_examples: int = 10,
    n_scored: int = 5,
    prompt_price: float = 0.0,
    answer_price: float = 0.0,
) -> Cost:
    """Estimate requests, tokens and price; nothing is sent.

    Args:
        store: contexts of the heads.
        heads: pairs of layer and head.
        vocabulary: strings of all tokens.
        endpoint: the chat model.
        n_examples: as for `interpret_heads`.
        n_scored: as for `interpret_heads`.
        prompt_price: per million tokens of questions.
        answer_price: per million tokens of answers.
    """
    n_requests = characters = 0
    for layer, head in heads:
        found = store.head(layer, head)
        explain = explanation_messages(found.top[:n_examples], vocabulary)
        asked = [explain]
        for question, texts, _ in _trials(found, [], vocabulary, n_scored, seed=0):
            asked.append(scoring_messages(question, "x" * 4 * endpoint.max_tokens, texts))
        if endpoint.is_cached(explain):
            asked = asked[1:]
        n_requests += len(asked)
        characters += sum(len(part["content"]) for messages in asked for part in messages)
    prompt_tokens = round(characters / CHARACTERS_PER_TOKEN)
    answer_tokens = n_requests * endpoint.max_tokens
    price = (prompt_tokens * prompt_price + answer_tokens * answer_price) / 1e6
    return Cost(
        n_requests=n_requests,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        price=price,
    )


def interpret_heads(
    store: HeadReader,
    heads: Heads,
    vocabulary: Vocabulary,
    endpoint: ChatEndpoint,
    *,
    n_examples: int = 10,
    n_scored: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> "DataFrame":
    """Explain heads and score the explanations.

    The explanation is made from the top contexts, with the source tokens of each. It is scored on
    contexts from the head's sample that were not shown: `detection` is the share of right answers
    to "is the head active at the last token?", asked of as many active as inactive positions;
    `fuzzing` the share of right answers to "are query and source marked rightly?", asked of as
    many right as wrong marks. Chance is one half.

    Args:
        store: contexts of the heads, from `collect_contexts`.
        heads: pairs of layer and head.
        vocabulary: strings of all tokens.
        endpoint: the chat model.
        n_examples: top contexts shown for the explanation.
        n_scored: active examples per score, at most.
        seed: for inactive positions, wrong marks and the order.
        progress: show a progress bar.

    Returns:
        A row per head: `explanation`, `detection`, `fuzzing`, `n_judged`. A score is not a number
        where the model gave no usable answer.

    Raises:
        EndpointError: if the endpoint does not answer; what was answered is in its cache.
        ValueError: if a head is never active.
    """
    rows: list[dict[str, Any]] = []
    for layer, head in tqdm(list(heads), desc="interpreting heads", disable=not progress):
        found = store.head(layer, head)
        if not found.top:
            raise ValueError(f"head {head_name(layer, head)} is never active: nothing to explain")
        shown = found.top[:n_examples]
        explanation = endpoint.complete(explanation_messages(shown, vocabulary)).strip()
        scores = []
        for question, texts, truth in _trials(found, shown, vocabulary, n_scored, seed):
            answer = endpoint.complete(scoring_messages(question, explanation, texts))
            scores.append(_accuracy(read_judgements(answer, len(texts)), truth))
        rows.append(
            {
                "layer": layer,
                "head": head,
                "name": head_name(layer, head),
                "explanation": explanation,
                "detection": scores[0],
                "fuzzing": scores[1],
                "n_judged": len(truth),
            }
        )
    return table(rows)


def _trials(
    found: HeadContexts,
    shown: Sequence[KeptContext],
    vocabulary: Vocabulary,
    n_scored: int,
    seed: int,
) -> list[tuple[str, list[str], list[bool]]]:
    """The two questions with their texts and right answers."""
    rng = np.random.default_rng([seed, found.layer, found.head])
    seen = {example.context for example in shown}
    fresh = [example for example in found.sample if example.context not in seen]
    pool = fresh or found.sample
    step = max(1, len(pool) // n_scored)
    chosen = pool[::step][:n_scored]
    detection = [(text_up_to(one, vocabulary, one.query), True) for one in chosen]
    fuzzing = []
    for one in chosen:
        idle = _other(rng, len(one.tokens), one.query)
        detection.append((text_up_to(one, vocabulary, idle), False))
        sources = top_sources(one)
        source = sources[0][0] if sources else one.query
        fuzzing.append((marked_text(one, vocabulary, source=source), True))
        wrong, elsewhere = _other(rng, len(one.tokens), one.query), int(rng.integers(1 << 30))
        marked = marked_text(one, vocabulary, query=wrong, source=elsewhere % (wrong + 1))
        fuzzing.append((marked, False))
    trials = []
    for question, pairs in ((DETECT, detection), (FUZZ, fuzzing)):
        order = rng.permutation(len(pairs))
        trials.append((question, [pairs[i][0] for i in order], [pairs[i][1] for i in order]))
    return trials


def _other(rng: np.random.Generator, n: int, taken: int) -> int:
    """A position that is not the taken one, where there is another."""
    place = int(rng.integers(max(1, n - 1)))
    return place + (place >= taken) if n > 1 else taken


def _accuracy(judged: list[bool] | None, truth: list[bool]) -> float:
    if judged is None or not truth:
        return float("nan")
    return sum(a == b for a, b in zip(judged, truth, strict=True)) / len(truth)
