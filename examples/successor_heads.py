"""Successor heads out of attention superposition: three heads, eleven rules.

One layer of three attention heads has learned, among other rules, to count: the next number, the
next day, the next ordinal. Each attention head serves several of these rules. We train a Lorsa on
the layer and print, for each successor rule, the single-purpose heads that carry it and which value
each of them fetches.

    python examples/successor_heads.py
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.analysis.sources import head_name, source_scores
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.functional.code import to_dense
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.testbed import (
    LabelledTokens,
    RuleLanguage,
    load_model,
    rule_accuracy,
    source_mass,
)
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.views import Figure, Heading, Table, Text, z_pattern_view

LAYER = 0
LANGUAGE = RuleLanguage()
SUCCESSORS = ("nextnum", "nextday", "nextord")
MIN_SHARE = 0.8
"""A successor head has at least this much of its z pattern on the source."""


class Successors(NamedTuple):
    """The heads that carry a successor rule."""

    rule: str
    attended: list[int]
    """Attention heads with more than half of their pattern on the source."""

    heads: list[int]
    """Lorsa heads, strongest first."""

    share: float
    """How much of their z pattern lies on the source; not a number if there are none."""

    accuracy: float
    """Share of right answers with the Lorsa in place."""

    accuracy_without: float
    """The same with these heads off."""

    others_without: float
    """The same of all other rules, on average."""


def trained_lorsa(model: Any, n_steps: int) -> Lorsa:
    """A Lorsa of 256 heads, of which 4 stay per token."""
    n_pos = LANGUAGE.n_ctx
    config = TrainingConfig(
        n_qk_heads=8,
        n_ov_heads=256,
        k=4,
        context_size=n_pos,
        train_batch_size_tokens=32 * n_pos,
        training_tokens=n_steps * 32 * n_pos,
    )
    return train(model, LANGUAGE.sample(2048, seed=1).tokens, [LAYER], config)[LAYER]


def sources_of(test: LabelledTokens) -> dict[str, Int[Tensor, "batch pos"]]:
    """By successor rule, the position of each query's source."""
    return {
        rule: test.source.masked_fill(test.rule != LANGUAGE.rules.index(rule), -1)
        for rule in SUCCESSORS
    }


@torch.no_grad()
def accuracies(
    model: Any, lorsa: Lorsa, test: LabelledTokens, heads: list[int]
) -> Float[Tensor, " rule"]:
    """Share of right answers for each rule, with the Lorsa in place and some of its heads off."""
    hook = (f"blocks.{LAYER}.attn.lorsa.hook_acts_post", zero_heads(heads))
    with splice(model, lorsa):
        logits = model.run_with_hooks(test.tokens, fwd_hooks=[hook])
    return rule_accuracy(logits, test, len(LANGUAGE.rules))


def found_by(model: Any, lorsa: Lorsa, test: LabelledTokens) -> list[Successors]:
    """The attention heads and the Lorsa heads of each rule, and what these are good for."""
    name = f"blocks.{LAYER}.attn.hook_pattern"
    _, cache = model.run_with_cache(test.tokens, names_filter=name)
    mass = source_mass(cache[name], test, len(LANGUAGE.rules))
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    spliced = accuracies(model, lorsa, test, [])
    found = []
    for rule, scores in source_scores(lorsa, record, sources_of(test)).items():
        index = LANGUAGE.rules.index(rule)
        heads = scores.heads(min_share=MIN_SHARE)
        without = accuracies(model, lorsa, test, heads)
        others = torch.cat((without[:index], without[index + 1 :]))
        found.append(
            Successors(
                rule=rule,
                attended=(mass[index] > 0.5).nonzero()[:, 0].tolist(),
                heads=heads,
                share=scores.mean_share(heads),
                accuracy=spliced[index].item(),
                accuracy_without=without[index].item(),
                others_without=others.mean().item(),
            )
        )
    return found


@torch.no_grad()
def value_rows(
    lorsa: Lorsa, record: AttentionRecord, test: LabelledTokens, found: Successors
) -> list[list[str]]:
    """For the strongest heads of a rule, the value at which each is most active."""
    acts = to_dense(lorsa.encode(record.x), lorsa.cfg.n_ov_heads).abs()
    sources = sources_of(test)[found.rule]
    batch, query = torch.nonzero(sources >= 0, as_tuple=True)
    values = test.tokens[batch, sources[batch, query]]
    return [
        [found.rule, head_name(LAYER, head), *_favourite(values, acts[batch, query, head])]
        for head in found.heads[:6]
    ]


def _favourite(values: Int[Tensor, " query"], acts: Float[Tensor, " query"]) -> tuple[str, str]:
    strength = torch.zeros(len(LANGUAGE.vocab)).index_add_(0, values, acts)
    top = int(strength.argmax())
    return LANGUAGE.vocab[top], f"{(strength[top] / strength.sum()).item():.0%}"


@torch.no_grad()
def figure(
    lorsa: Lorsa, record: AttentionRecord, test: LabelledTokens, found: list[Successors]
) -> Figure:
    """The strongest heads of each rule on the sequence that has most of these rules."""
    queries = torch.stack([sources >= 0 for sources in sources_of(test).values()])
    row = int(queries.any(-1).sum(0).argmax())
    heads = [head for successors in found for head in successors.heads[:2]]
    names = [f"{head_name(LAYER, h)} {s.rule}" for s in found for h in s.heads[:2]]
    z_pattern = lorsa.z_pattern(record.x[row : row + 1], heads)[0]
    return z_pattern_view(z_pattern, LANGUAGE.str_tokens(test.tokens[row]), head_names=names)


def main(argv: Sequence[str] | None = None) -> list[Successors]:
    """Run the example."""
    parser = example_options(__doc__, "successor_heads")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps (default 700)")
    options = parser.parse_args(argv)

    model = load_model("rules")
    lorsa = trained_lorsa(model, options.steps)
    test = LANGUAGE.sample(256, seed=2)
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    found = found_by(model, lorsa, test)
    summary = [
        [
            successors.rule,
            " ".join(f"{LAYER}.{head}" for head in successors.attended) or "none",
            len(successors.heads),
            successors.share,
            successors.accuracy,
            successors.accuracy_without,
            successors.others_without,
        ]
        for successors in found
    ]
    header = ["rule", "attention heads", "Lorsa heads", "on the source", "accuracy"]
    values = [row for successors in found for row in value_rows(lorsa, record, test, successors)]
    show(
        options.out,
        "Successor heads",
        Text(
            "For each rule the attention heads that look at the source, the Lorsa heads that fetch "
            "from it and how much of their z pattern lies on it; and the share of right answers "
            "with the Lorsa in place, with these heads off, and then of the other rules."
        ),
        Table([*header, "heads off", "other rules"], summary),
        Heading("What the strongest of them fetch"),
        Table(["rule", "head", "value", "of its activity"], values),
        Text("Each head serves one value of one rule: a successor head is a group of them."),
        figure(lorsa, record, test, found),
    )
    return found


if __name__ == "__main__":
    main()
