"""Train a Lorsa on each attention layer of a subject, measure it, and name its heads."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.analysis.sources import activity_f1, source_scores
from lorsa_lens.demo.subjects import Subject
from lorsa_lens.evaluation import Fidelity, evaluate
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.training.loop import train


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
    lorsas = []
    for layer in subject.layers:
        sizes: dict[str, Any] = {**subject.sizes}
        lorsa = Lorsa.from_attention(model, layer, seed=seed, **sizes)
        train(lorsa, records[layer], n_steps=n_steps, seed=seed, progress=progress)
        lorsas.append(lorsa)
    fidelity = evaluate(model, lorsas, subject.test_tokens, predicted=subject.predicted)
    tests = record_attention(model, subject.test_tokens, subject.layers)
    findings = [
        finding
        for lorsa, layer in zip(lorsas, subject.layers, strict=True)
        for finding in _findings(subject, lorsa, layer, tests[layer])
    ]
    return Story(
        subject=subject, lorsas=lorsas, fidelity=fidelity, findings=findings, records=tests
    )


def _findings(subject: Subject, lorsa: Lorsa, layer: int, record: AttentionRecord) -> list[Finding]:
    scores = source_scores(lorsa, record, subject.sources)
    masses = _attention_masses(subject.model, subject.test_tokens, layer, subject.sources)
    findings = []
    for relation, sources in subject.sources.items():
        heads = scores[relation].heads()
        mass = masses[relation]
        findings.append(
            Finding(
                relation=relation,
                layer=layer,
                attention_head=int(mass.argmax()),
                attention_mass=float(mass.max()),
                heads=heads,
                share=scores[relation].mean_share(heads) if heads else float("nan"),
                f1=activity_f1(lorsa, record, heads, sources >= 0) if heads else float("nan"),
            )
        )
    return findings


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
