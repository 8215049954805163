"""Scores against the ground truth of a testbed language, one value per rule."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.testbed.labels import LabelledTokens


def source_mass(
    pattern: Float[Tensor, "batch head query key"], labels: LabelledTokens, n_rules: int
) -> Float[Tensor, "rule head"]:
    """Mean share of each head's pattern on the true source, at the queries of each rule.

    Also for z patterns, once they are normalised to shares. A rule counts as attended by the model
    when ``source_mass(...).amax(dim=1) >= 0.5``: ground truth of the language need not be the
    mechanism of the model.

    Args:
        pattern: Attention patterns of one layer, one row per query.
        labels: Ground truth of the same sequences.
        n_rules: Number of rules of the language, ``len(language.rules)``.

    Returns:
        One row per rule; NaN for a rule without occurrence.

    Raises:
        ValueError: if ``pattern`` and ``labels`` differ in batch or length, or a label names a rule
            outside ``range(n_rules)``.
    """
    batch, _, n_queries, n_keys = pattern.shape
    _check_labels(labels, (batch, n_queries), n_rules, name="pattern")
    if n_keys != n_queries:
        raise ValueError(f"pattern must be square, got {n_queries} queries and {n_keys} keys")
    at, query = torch.nonzero(labels.rule >= 0, as_tuple=True)
    mass = pattern[at, :, query, labels.source[at, query]]
    return _mean_per_rule(mass, labels.rule[at, query], n_rules)


def rule_accuracy(
    logits: Float[Tensor, "batch pos vocab"], labels: LabelledTokens, n_rules: int
) -> Float[Tensor, "rule"]:
    """Share of each rule's queries at which the highest logit is the answer.

    Returns:
        One value per rule; NaN for a rule that demands no answer in these sequences.

    Raises:
        ValueError: as `source_mass`.
    """
    _check_labels(labels, (logits.shape[0], logits.shape[1]), n_rules, name="logits")
    asked = labels.answer >= 0
    correct = (logits[asked].argmax(dim=-1) == labels.answer[asked]).to(logits.dtype)
    means = _mean_per_rule(rearrange(correct, "n -> n 1"), labels.rule[asked], n_rules)
    return rearrange(means, "rule 1 -> rule")


def rule_cross_entropy(
    logits: Float[Tensor, "batch pos vocab"], labels: LabelledTokens, n_rules: int
) -> Float[Tensor, "rule"]:
    """Mean cross-entropy of the answer in nats, over each rule's queries.

    Returns:
        One value per rule; NaN for a rule that demands no answer in these sequences.

    Raises:
        ValueError: as `source_mass`.
    """
    _check_labels(labels, (logits.shape[0], logits.shape[1]), n_rules, name="logits")
    asked = labels.answer >= 0
    loss = torch.nn.functional.cross_entropy(
        logits[asked], labels.answer[asked].long(), reduction="none"
    )
    means = _mean_per_rule(rearrange(loss, "n -> n 1"), labels.rule[asked], n_rules)
    return rearrange(means, "rule 1 -> rule")


def _mean_per_rule(
    values: Float[Tensor, "n column"], rule: Int[Tensor, "n"], n_rules: int
) -> Float[Tensor, "rule column"]:
    """Mean of the rows of ``values`` that belong to each rule; 0 / 0 = NaN where there is none."""
    member: Bool[Tensor, "rule n"] = rearrange(rule, "n -> 1 n") == rearrange(
        torch.arange(n_rules, device=rule.device), "rule -> rule 1"
    )
    weights = member.to(values.dtype)
    return (weights @ values) / weights.sum(dim=1, keepdim=True)


def _check_labels(
    labels: LabelledTokens, shape: tuple[int, int], n_rules: int, *, name: str
) -> None:
    if tuple(labels.rule.shape) != shape:
        raise ValueError(
            f"{name} covers [batch, pos] = {list(shape)}, the labels {list(labels.rule.shape)}; "
            "both must come from the same tokens"
        )
    if labels.rule.numel() and int(labels.rule.max()) >= n_rules:
        raise ValueError(
            f"n_rules is {n_rules} but the labels name rule {int(labels.rule.max())}; "
            "pass len(language.rules)"
        )
