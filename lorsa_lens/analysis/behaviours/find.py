"""Heads by name: every behaviour scored on every head, as one table."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours.catalogue import Behaviour, known_behaviours
from lorsa_lens.analysis.behaviours.null import (
    holm,
    random_sources,
    shuffled_sources,
)
from lorsa_lens.analysis.behaviours.prompts import Prompter
from lorsa_lens.analysis.behaviours.rows import Kind, Subject, rows_of
from lorsa_lens.analysis.behaviours.scores import SourceMask
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import table
from lorsa_lens.hosts import host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention

if TYPE_CHECKING:
    from pandas import DataFrame

FIRST_QUERY = 4
"""Earlier queries are left out: they have so few keys that any head is on the source by chance."""

MIN_SCORE = 0.5
"""A head has a behaviour if its score is at least this..."""

MIN_ENERGY = 0.5
"""... if at least this share of its energy falls on queries that have a source..."""

MIN_LIFT = 1.0
"""... or, where these are rare, so many times as much as they are of all queries..."""

MAX_P = 0.01
"""... if chance would find any such head at most this often..."""

MIN_ATTENDED = 0.1
"""... if some attention head of the model puts at least this share of its pattern there..."""

MIN_QUERIES = 10
"""... and if the head stays at no fewer such queries than this."""


def find_heads(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    behaviour: str | Behaviour,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    kind: Kind = "ov",
    min_score: float = MIN_SCORE,
    min_energy: float = MIN_ENERGY,
    min_lift: float = MIN_LIFT,
    max_p: float = MAX_P,
    min_attended: float = MIN_ATTENDED,
    min_queries: int = MIN_QUERIES,
    **options: Any,
) -> "DataFrame":
    """The heads that have a behaviour, strongest first.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: whose heads.
        behaviour: a name in `known_behaviours(vocabulary)`, or one of your own.
        tokens: running text. None: prompts made for the behaviour.
        kind: rank-1 heads (`ov`), query-key circuits (`qk`), or the model's own attention heads
            (`attention`).
        min_score: see the constants of this module.
        min_energy: as above; for rank-1 heads only.
        min_lift: as above; for rank-1 heads only.
        max_p: as above.
        min_attended: as above.
        min_queries: as above.
        **options: as `describe_heads`.

    Returns:
        Rows of `describe_heads`.
    """
    frame = describe_heads(model, lorsas, tokens, behaviours=[behaviour], **options)
    named = named_heads(
        frame,
        min_score=min_score,
        min_energy=min_energy,
        min_lift=min_lift,
        max_p=max_p,
        min_attended=min_attended,
        min_queries=min_queries,
    )
    return named[named["kind"] == kind].reset_index(drop=True)


def named_heads(
    frame: "DataFrame",
    *,
    min_score: float = MIN_SCORE,
    min_energy: float = MIN_ENERGY,
    min_lift: float = MIN_LIFT,
    max_p: float = MAX_P,
    min_attended: float = MIN_ATTENDED,
    min_queries: int = MIN_QUERIES,
) -> "DataFrame":
    """Those rows of `describe_heads` in which a head has the behaviour, strongest first."""
    enough = (min_lift * frame["query_share"]).clip(upper=min_energy)
    kept = (
        (frame["score"] >= min_score)
        & ~(frame["energy"] < enough)
        & (frame["p_value"] <= max_p)
        & (frame["attended"] >= min_attended)
        & (frame["n_queries"] >= min_queries)
    )
    return frame[kept].sort_values("strength", ascending=False, kind="stable")


def carrying_heads(
    frame: "DataFrame",
    n: int,
    *,
    kind: Kind = "ov",
    max_p: float = MAX_P,
    min_attended: float = MIN_ATTENDED,
) -> "DataFrame":
    """The `n` heads that carry most of each behaviour, the one that carries most first.

    A head carries its score times its strength. So these are the heads whose loss the behaviour
    would feel, busy with other things or not; `named_heads` are those that do little else.

    Args:
        frame: of `describe_heads`.
        n: how many of each behaviour, at most.
        kind: as in `find_heads`.
        max_p: only heads for which chance is no explanation.
        min_attended: as in `find_heads`.

    Raises:
        ValueError: if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n = {n} must be positive")
    kept = (
        (frame["kind"] == kind) & (frame["p_value"] <= max_p) & (frame["attended"] >= min_attended)
    )
    carried = (frame["score"] * frame["strength"])[kept].sort_values(ascending=False, kind="stable")
    return frame.loc[carried.index].groupby("behaviour", sort=False).head(n)


def describe_heads(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    behaviours: Iterable[str | Behaviour] | None = None,
    vocabulary: Vocabulary | None = None,
    n_prompts: int = 64,
    n_pos: int = 48,
    seed: int = 0,
    batch_size: int = 16,
) -> "DataFrame":
    """Score every head of some Lorsas, and every head of the layers they stand for.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: one, or several for different layers.
        tokens: running text, without padding: all behaviours are scored in one pass over it. Its
            masks take `batch * pos ** 2` bytes each. None: prompts made for each behaviour.
        behaviours: names in `known_behaviours(vocabulary)` or behaviours of your own. None: all
            known; those that the text has no source for are left out.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_prompts: prompts for each behaviour.
        n_pos: their length, at most that of the model's context.
        seed: for prompts and nulls.
        batch_size: sequences at a time.

    Returns:
        One row for each behaviour and head. `kind` is `ov` (rank-1 heads), `qk` (query-key
        circuits) or `attention` (the model's own heads), `head` its index in the `layer`.
        `share`: how much of the z pattern (of the pattern) lies on the sources, averaged over
        queries that have one, by energy (alike). `null`: the same for the null's sources.
        `effect`: how much of it lies there and does to the logits what the behaviour says.
        `score`: `effect` where the behaviour has one, else `share`; for a `selective` behaviour
        times `energy`. `energy`: share of the head's energy at such queries; `query_share`: how
        many of all queries they are. `strength`: its energy per such query. `p_value`: of a sign
        test of share against null over sequences, corrected over all heads of this kind (Holm).
        `attended`: the largest `share` among the model's own heads of the layer.

    Raises:
        ValueError: for an unknown behaviour, one without prompts where there are no tokens, or a
            model without a tokenizer where `vocabulary` is None.
    """
    chosen_lorsas = dict(by_layer(model, lorsas))
    chosen = _chosen(model, behaviours, vocabulary)
    rows: list[dict[str, Any]] = []
    for texts, group in _texts(model, chosen, vocabulary, tokens, n_prompts, n_pos, seed):
        masks = _masks(texts, group, seed)
        if not masks:
            continue
        records = record_attention(model, texts, chosen_lorsas, batch_size=batch_size)
        subjects = [
            Subject(host_of(model), layer, lorsa, records[layer])
            for layer, lorsa in chosen_lorsas.items()
        ]
        scored = {behaviour.name: behaviour for behaviour in group if behaviour.name in masks}
        for subject in subjects:
            rows += rows_of(subject, texts, masks, scored, batch_size)
    frame = table(rows)
    if not len(frame):
        raise ValueError("no behaviour has a source in these tokens: give more of them")
    groups = frame.groupby(["behaviour", "kind"], sort=False)["p_value"]
    corrected = groups.transform(lambda p: holm(torch.tensor(p.to_numpy())).numpy())
    return frame.assign(p_value=corrected)


def prompt_length(model: nn.Module, n_pos: int) -> int:
    """The length of prompts: what was asked for, at most the model's context."""
    return min(n_pos, int(getattr(host_of(model).model.cfg, "n_ctx", n_pos)))


def by_layer(model: nn.Module, lorsas: Lorsa | Iterable[Lorsa]) -> Iterable[tuple[int, Lorsa]]:
    """Lorsas with their layers.

    Raises:
        ValueError: unless each has a layer of its own, which the model has.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    layers = [lorsa.cfg.layer for lorsa in chosen]
    if not chosen or len(set(layers)) < len(layers):
        raise ValueError(f"lorsas are of layers {layers}: give one for each layer, at least one")
    for layer, lorsa in zip(layers, chosen, strict=True):
        if layer is None:
            raise ValueError("a Lorsa's cfg.layer is None: say which layer it belongs to")
        host_of(model).check_layer(layer)
        yield layer, lorsa


def _chosen(
    model: nn.Module,
    behaviours: Iterable[str | Behaviour] | None,
    vocabulary: Vocabulary | None,
) -> list[Behaviour]:
    wanted = None if behaviours is None else list(behaviours)
    if wanted is not None and all(isinstance(one, Behaviour) for one in wanted):
        return [one for one in wanted if isinstance(one, Behaviour)]
    known = known_behaviours(vocabulary or Vocabulary.of(model))
    if wanted is None:
        return list(known.values())
    for one in wanted:
        if isinstance(one, str) and one not in known:
            raise ValueError(
                f"behaviour {one!r} is not known, or the vocabulary has no tokens for it: choose "
                f"from {', '.join(known)}"
            )
    return [known[one] if isinstance(one, str) else one for one in wanted]


def _texts(
    model: nn.Module,
    behaviours: list[Behaviour],
    vocabulary: Vocabulary | None,
    tokens: Tensor | None,
    n_prompts: int,
    n_pos: int,
    seed: int,
) -> Iterable[tuple[Tensor, list[Behaviour]]]:
    """Sequences, and the behaviours to score on them."""
    if tokens is not None:
        yield tokens, behaviours
        return
    strings = vocabulary or Vocabulary.of(model)
    n_pos = prompt_length(model, n_pos)
    groups: dict[Any, list[Behaviour]] = {}
    for behaviour in behaviours:
        if behaviour.prompts is None:
            raise ValueError(f"behaviour {behaviour.name!r} has no prompts: give tokens")
        groups.setdefault(behaviour.prompts, []).append(behaviour)
    for draw, group in groups.items():
        yield draw(Prompter(strings, n_pos, seed), n_prompts), group


def _masks(texts: Tensor, group: list[Behaviour], seed: int) -> dict[str, SourceMask]:
    """Sources and those of the null, of those behaviours that have any."""
    masks = {}
    for behaviour in group:
        true = behaviour.sources(texts)
        true[:, :FIRST_QUERY] = False
        if bool(true.any()):
            null = random_sources if behaviour.fixed_place else shuffled_sources
            masks[behaviour.name] = SourceMask(true, null(true, seed=seed))
    return masks
