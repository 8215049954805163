"""Rules that share attention heads, by attention heads, SAE features and Lorsa heads."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.analysis.correspondence import head_shares
from lorsa_lens.analysis.sources import head_name, source_scores
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed.labels import LabelledTokens, Language
from lorsa_lens.testbed.sae import TopKSAE
from lorsa_lens.testbed.scores import source_mass
from lorsa_lens.testbed.units import (
    RuleUnits,
    attention_units,
    lorsa_units,
    rule_costs,
    rule_units,
    sae_units,
)
from lorsa_lens.views import Figure, Table, z_pattern_view
from lorsa_lens.views.sections import Cell

LAYER = 0

ATTENTION, SAE, LORSA = "attention heads", "SAE features", "Lorsa heads"
"""The methods."""

MIXED = 0.1
"""Units break another rule too if they cost it more than this part of what they cost their own."""


class Sources(NamedTuple):
    """How much of what a rule's units look at is the true source; an SAE's features have none."""

    attention: float
    """Of the pattern of the attention head that looks at it most."""

    lorsa: float
    """Of the z pattern of the rule's Lorsa heads."""


@dataclass(frozen=True)
class Comparison:
    """What three ways to divide one layer say of the rules of a language."""

    methods: dict[str, list[RuleUnits]]
    """By method, the units of every rule."""

    sources: dict[str, Sources]
    """By rule."""

    head_costs: list[dict[str, float]]
    """By attention head and rule, nats that setting the head to its mean costs."""

    shares: Float[Tensor, "lorsa_head attention_head"]
    """Share of each attention head in what each Lorsa head carries."""

    def sharing(self) -> Table:
        """What each attention head is for, and how much of it a rule's Lorsa heads carry."""
        names = [f"{LAYER}.{head}" for head in range(len(self.head_costs))]
        rows = [
            [
                row.rule,
                *(f"{costs[row.rule]:.2f}" for costs in self.head_costs),
                *(f"{share:.2f}" for share in self.shares[row.units].mean(0).tolist()),
            ]
            for row in self.methods[LORSA]
        ]
        return Table(["rule", *(f"{n} off" for n in names), *(f"from {n}" for n in names)], rows)

    def means(self) -> Table:
        """Each method's means over the rules."""
        rows: list[list[Cell]] = [
            [
                name,
                _mean([row.f1 for row in found]),
                _mean([row.cost for row in found]),
                _mean([row.cost_elsewhere for row in found]),
            ]
            for name, found in self.methods.items()
        ]
        return Table(["method", "F1", "off: costs the rule", "off: costs the others"], rows)

    def rules(self) -> Table:
        """Each rule by each method, and the share of the true source."""
        header = ["rule", "F1 attention", "F1 SAE", "F1 Lorsa", "source attention", "source Lorsa"]
        rows = []
        for found in zip(*(self.methods[name] for name in (ATTENTION, SAE, LORSA)), strict=True):
            rule = found[0].rule
            numbers = [*(row.f1 for row in found), *self.sources[rule]]
            rows.append([rule, *(f"{number:.2f}" for number in numbers)])
        return Table(header, rows)

    def mixing(self) -> Table:
        """Units of a rule that break another one too, and the rule that suffers most."""
        rows: list[list[Cell]] = []
        for name in (SAE, LORSA):
            for row in self.methods[name]:
                others = {rule: cost for rule, cost in row.costs.items() if rule != row.rule}
                worst = max(others, key=lambda rule: others[rule])
                if others[worst] > MIXED * row.cost:
                    rows.append([name, row.rule, row.cost, worst, others[worst]])
        return Table(["method", "units of", "cost there", "break too", "cost"], rows)


def compare(
    model: nn.Module, lorsa: Lorsa, sae: TopKSAE, language: Language, test: LabelledTokens
) -> Comparison:
    """Choose units for every rule by each method, and judge them.

    Args:
        model: the model of one layer, `load_model("rules")`.
        lorsa: of its layer.
        sae: on what its layer returns.
        language: its language.
        test: sequences that neither was trained on; units are chosen on the first half.
    """
    attention = attention_units(model, LAYER, test.tokens)
    units = {
        ATTENTION: attention,
        SAE: sae_units(model, sae, LAYER, test.tokens),
        LORSA: lorsa_units(model, lorsa, test.tokens),
    }
    methods = {name: rule_units(own, test, language.rules) for name, own in units.items()}
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    return Comparison(
        methods=methods,
        sources=_sources(model, lorsa, language, test, methods[LORSA]),
        head_costs=[
            rule_costs(attention.cost([head]), test, language.rules)
            for head in range(attention.strength.shape[-1])
        ],
        shares=head_shares(model, lorsa, record).nan_to_num(0.0),
    )


def _sources(
    model: Any, lorsa: Lorsa, language: Language, test: LabelledTokens, heads: list[RuleUnits]
) -> dict[str, Sources]:
    name = f"blocks.{LAYER}.attn.hook_pattern"
    _, cache = model.run_with_cache(test.tokens, names_filter=name)
    mass = source_mass(cache[name], test, len(language.rules)).amax(1).tolist()
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    positions = {
        rule: test.source.masked_fill(test.rule != index, -1)
        for index, rule in enumerate(language.rules)
    }
    scores = source_scores(lorsa, record, positions)
    return {
        row.rule: Sources(best, scores[row.rule].mean_share(row.units))
        for row, best in zip(heads, mass, strict=True)
    }


@torch.no_grad()
def at_work(
    model: nn.Module,
    lorsa: Lorsa,
    language: Language,
    test: LabelledTokens,
    rules: list[RuleUnits],
) -> Figure:
    """The strongest Lorsa head of some rules, on the sequence that has most of these rules."""
    index = [language.rules.index(row.rule) for row in rules]
    present = torch.stack([(test.rule == number).any(1) for number in index]).sum(0)
    tokens = test.tokens[int(present.argmax())]
    part = record_attention(model, tokens[None], [LAYER])[LAYER].seen_by(lorsa)
    heads = [row.units[0] for row in rules]
    names = [f"{head_name(LAYER, row.units[0])} {row.rule}" for row in rules]
    z_pattern = lorsa.z_pattern(part.x, heads, **part.context)[0]
    return z_pattern_view(z_pattern, language.str_tokens(tokens), head_names=names)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
