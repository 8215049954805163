"""Attention heads, Lorsa heads and SAE features alike: what they detect, and what they are for.

A unit is a part into which a method takes a layer's output apart. The language knows which rule
holds at which token, so units can be chosen for a rule on some sequences and judged on others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.causal import head_effects
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.testbed.detection import best_threshold, f1_score
from lorsa_lens.testbed.labels import LabelledTokens
from lorsa_lens.testbed.sae import TopKSAE

MIN_ENERGY = 0.5
"""A unit belongs to a rule if more than this share of its energy falls on the rule's queries."""


class Units(NamedTuple):
    """The units of one method on some sequences."""

    strength: Float[Tensor, "batch pos unit"]
    """The norm of what each unit writes at each token."""

    cost: Callable[[list[int]], Float[Tensor, "batch predicted"]]
    """Nats that the loss of each next token rises by when some units are switched off."""


@torch.no_grad()
def attention_units(model: nn.Module, layer: int, tokens: Int[Tensor, "batch pos"]) -> Units:
    """The attention heads of a layer. They are never 0, so off means at their mean."""
    exact = Lorsa.from_attention(model, layer)
    size = exact.cfg.group_size
    record = _record(model, exact, tokens)
    dims = exact.outputs(record.x, **record.context).acts_pre
    acts = rearrange(dims, "b s (head d) -> b s head d", d=size)
    written = einsum(
        acts,
        rearrange(exact.W_O, "(head d) m -> head d m", d=size),
        "b s head d, head d m -> b s head m",
    )

    def cost(heads: list[int]) -> Tensor:
        own = [size * head + dim for head in heads for dim in range(size)]
        return head_effects(model, exact, tokens, {layer: own}, to="mean").cost

    return Units(written.norm(dim=-1), cost)


@torch.no_grad()
def lorsa_units(model: nn.Module, lorsa: Lorsa, tokens: Int[Tensor, "batch pos"]) -> Units:
    """The heads of a Lorsa; what it misses of the layer is kept when heads are off."""
    record = _record(model, lorsa, tokens)
    acts = to_dense(lorsa.encode(record.x, **record.context), lorsa.cfg.n_ov_heads)
    layer = lorsa.cfg.layer or 0

    def cost(heads: list[int]) -> Tensor:
        return head_effects(model, lorsa, tokens, {layer: heads}).cost

    return Units(acts.abs() * writing_norms(lorsa.W_O), cost)


@torch.no_grad()
def sae_units(
    model: nn.Module, sae: TopKSAE, layer: int, tokens: Int[Tensor, "batch pos"]
) -> Units:
    """The features of an SAE on a layer's output; what it misses is kept when features are off."""
    outputs = record_attention(model, tokens, [layer])[layer].out
    acts = sae.encode(outputs)

    @torch.no_grad()
    def cost(features: list[int]) -> Tensor:
        taken = acts[..., features] @ sae.W_dec[features]

        def remove(output: Tensor, hook: Any) -> Tensor:
            del hook
            return output - taken

        hooks = [(f"blocks.{layer}.hook_attn_out", remove)]
        changed = cast(Any, model).run_with_hooks(tokens, fwd_hooks=hooks)
        return _loss(changed, tokens) - _loss(cast(Any, model)(tokens), tokens)

    return Units(acts * sae.W_dec.norm(dim=1), cost)


class RuleUnits(NamedTuple):
    """The units that a rule was given, and how they do on sequences that did not choose them."""

    rule: str
    units: list[int]
    """Strongest first."""

    f1: float
    """F1 of "together they write more than a threshold" as a detector of the rule's queries."""

    costs: dict[str, float]
    """By rule, the nats that its answers cost when these units are switched off."""

    @property
    def cost(self) -> float:
        """What switching them off costs the rule itself."""
        return self.costs[self.rule]

    @property
    def cost_elsewhere(self) -> float:
        """What it costs the other rules, on average."""
        others = [cost for rule, cost in self.costs.items() if rule != self.rule]
        return sum(others) / len(others)


def rule_units(units: Units, labels: LabelledTokens, rules: Sequence[str]) -> list[RuleUnits]:
    """For each rule the units that belong to it, by the first half of the sequences.

    Where none has more than `MIN_ENERGY` of its energy there, it is the one that has most. F1 and
    costs are those of the second half, the threshold that of the first.

    Args:
        units: of a method, on the sequences of `labels`.
        labels: ground truth.
        rules: the names of the rules, `language.rules`.

    Raises:
        ValueError: if units and labels are not of the same sequences.
    """
    if units.strength.shape[:2] != labels.rule.shape:
        raise ValueError(
            f"the units are of [batch, pos] = {list(units.strength.shape[:2])}, the labels of "
            f"{list(labels.rule.shape)}: give those of the same sequences"
        )
    half = len(labels.rule) // 2
    found = []
    for index, rule in enumerate(rules):
        at = labels.rule == index
        chosen = _chosen(units.strength[:half], at[:half])
        together = units.strength[..., chosen].sum(-1)
        threshold = best_threshold(together[:half].flatten(), at[:half].flatten())
        f1 = f1_score(together[half:] > threshold, at[half:])
        judged = LabelledTokens(*(tensor[half:] for tensor in labels))
        costs = rule_costs(units.cost(chosen)[half:], judged, rules)
        found.append(RuleUnits(rule, chosen, f1, costs))
    return found


def rule_costs(
    cost: Float[Tensor, "batch predicted"], labels: LabelledTokens, rules: Sequence[str]
) -> dict[str, float]:
    """By rule, the mean cost of its answers; not a number for a rule that asks for none here.

    Args:
        cost: from `Units.cost`.
        labels: of the same sequences.
        rules: the names of the rules.
    """
    asked = torch.where(labels.answer >= 0, labels.rule, -1)[:, :-1]
    return {rule: cost[asked == index].mean().item() for index, rule in enumerate(rules)}


def _chosen(strength: Float[Tensor, "batch pos unit"], at: Bool[Tensor, "batch pos"]) -> list[int]:
    energy = strength.double().square()
    there = energy[at].sum(0)
    share = there / energy.sum((0, 1)).clamp(min=1e-30)
    order = there.argsort(descending=True, stable=True).tolist()
    return [unit for unit in order if share[unit] > MIN_ENERGY] or [int(share.argmax())]


def _record(model: nn.Module, lorsa: Lorsa, tokens: Tensor) -> AttentionRecord:
    layer = lorsa.cfg.layer or 0
    return record_attention(model, tokens, [layer])[layer].seen_by(lorsa)


def _loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch predicted"]:
    chances = logits[:, :-1].log_softmax(-1)
    return -chances.gather(-1, tokens[:, 1:, None])[..., 0]
