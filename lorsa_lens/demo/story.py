"""Train a Lorsa on each attention layer of a subject, measure it, and name its heads."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.analysis.sources import activity_f1, source_scores
from lorsa_lens.demo.subjects import Subject
from lorsa_lens.evaluation import Fidelity, evaluate
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.training import TrainingConfig, train_on

BATCH_SIZE = 32
"""Sequences of one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The heads of one layer that fetch from one kind of source."""

    relation: str
    layer: int
    attention_head: int
    """The attention head of the model that attends to this source most."""
    attention_mass: float
    """How much of that head's pattern lies on the source, on average."""
    heads: list[int]
    """Lorsa heads named after the relation, strongest first."""
    share: float
    """How much of these heads' z pattern lies on the source, by energy."""
    f1: float
    """F1 of their activity as a detector of the queries that have such a source."""
    null_share: float
    """The share of heads named in the same way before any training: what copying the model's
    query-key circuits gives by itself."""
    null_f1: float
    """Their F1."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """A subject, its trained Lorsas, and what was found."""

    subject: Subject
    lorsas: list[Lorsa]
    fidelity: list[Fidelity]
    findings: list[Finding]
    records: dict[int, AttentionRecord]
    """What the layers received for the test tokens."""


def tell(subject: Subject, *, n_steps: int = 700, seed: int = 0, progress: bool = True) -> Story:
    """Train, splice, measure and name.

    Args:
        subject: the model and its text.
        n_steps: optimizer steps for each Lorsa.
        seed: for initialisation and the order of training.
        progress: show progress bars.
    """
    model = subject.model
    records = record_attention(model, subject.train_tokens, subject.layers, progress=progress)
    tests = record_attention(model, subject.test_tokens, subject.layers)
    sizes: dict[str, Any] = {**subject.sizes}
    n_pos = subject.train_tokens.shape[1]
    config = TrainingConfig(
        context_size=n_pos,
        train_batch_size_tokens=BATCH_SIZE * n_pos,
        training_tokens=n_steps * BATCH_SIZE * n_pos,
        seed=seed,
    )
    lorsas = {
        layer: Lorsa.from_attention(model, layer, seed=seed, act_fn=config.act_fn, **sizes)
        for layer in subject.layers
    }
    nulls = {layer: _named(subject, lorsas[layer], tests[layer]) for layer in subject.layers}
    train_on(lorsas, records, config, progress=progress)
    fidelity = evaluate(
        model, list(lorsas.values()), subject.test_tokens, predicted=subject.predicted
    )
    findings = [
        finding
        for layer, lorsa in lorsas.items()
        for finding in _findings(subject, lorsa, layer, tests[layer], nulls[layer])
    ]
    return Story(
        subject=subject,
        lorsas=list(lorsas.values()),
        fidelity=fidelity,
        findings=findings,
        records=tests,
    )


class _Named(NamedTuple):
    """The heads named after a relation, and their scores."""

    heads: list[int]
    share: float
    f1: float


def _named(subject: Subject, lorsa: Lorsa, record: AttentionRecord) -> dict[str, _Named]:
    """By relation, the heads named after it."""
    scores = source_scores(lorsa, record, subject.sources)
    named = {}
    for relation, sources in subject.sources.items():
        heads = scores[relation].heads()
        share, f1 = float("nan"), float("nan")
        if heads:
            share = scores[relation].mean_share(heads)
            f1 = activity_f1(lorsa, record, heads, sources >= 0)
        named[relation] = _Named(heads, share, f1)
    return named


def _findings(
    subject: Subject,
    lorsa: Lorsa,
    layer: int,
    record: AttentionRecord,
    nulls: dict[str, _Named],
) -> list[Finding]:
    masses = _attention_masses(subject.model, subject.test_tokens, layer, subject.sources)
    named = _named(subject, lorsa, record)
    return [
        Finding(
            relation=relation,
            layer=layer,
            attention_head=int(masses[relation].argmax()),
            attention_mass=float(masses[relation].max()),
            heads=named[relation].heads,
            share=named[relation].share,
            f1=named[relation].f1,
            null_share=nulls[relation].share,
            null_f1=nulls[relation].f1,
        )
        for relation in subject.sources
    ]


@torch.no_grad()
def _attention_masses(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    sources: dict[str, Tensor],
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Mean share of each attention head's pattern on each kind of source."""
    name = f"blocks.{layer}.attn.hook_pattern"
    sums: dict[str, Tensor] = {}
    for start in range(0, tokens.shape[0], batch_size):
        rows = slice(start, start + batch_size)
        _, cache = model.run_with_cache(tokens[rows], names_filter=name)
        pattern = cast(Tensor, cache[name])
        for relation, positions in sources.items():
            batch, query = torch.nonzero(positions[rows] >= 0, as_tuple=True)
            mass = pattern[batch, :, query, positions[rows][batch, query]].sum(0)
            sums[relation] = sums.get(relation, torch.zeros_like(mass)) + mass
    return {name: total / max(1, int((sources[name] >= 0).sum())) for name, total in sums.items()}
