"""Groups of Lorsa heads named after the rules of `RuleLanguage`, and how well they tell them.

A head of rank one handles one value ("3 after plus_one:"), so a rule is a group of heads. Rules
that fetch the same kind of token (next and previous number, last and first name) may share heads,
as they share attention heads in the model; which rule such a group serves shows in the token it
fetches from and in what it writes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.analysis.tables import table
from lorsa_lens.functional.code import to_dense
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.ends import logit_directions
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.testbed.detection import best_threshold, f1_score
from lorsa_lens.testbed.grammar import RULES, VOCAB
from lorsa_lens.testbed.labels import LabelledTokens
from lorsa_lens.testbed.rules import RuleLanguage
from lorsa_lens.testbed.scores import source_mass

if TYPE_CHECKING:
    from pandas import DataFrame

GATE = 0.9
"""A query counts for source mass if some attention head of the model puts at least this share of
its pattern on the source. Elsewhere the model itself spreads its attention."""

MIN_ATTENDED = 0.5
"""A rule is gated if some attention head puts this share of its pattern on the sources on average
(`source_mass`). Others the model solves without attending to the source that the language names."""

BATCH_SIZE = 64


MIN_ENERGIES = (0.5, 0.2, 0.05)
"""Least shares of a head's energy at queries of its rules, of which `rule_groups` tries each."""


def rule_groups(
    model: nn.Module, lorsa: Lorsa, language: RuleLanguage, labels: LabelledTokens
) -> dict[str, list[int]]:
    """By rule, the group of heads that tells it best.

    Candidates are the heads that put at least half of their z pattern on the source of the rule,
    or of a rule that fetches the same kind of token, at the queries of these rules
    (`SourceScores.heads`), with one of `MIN_ENERGIES` of all their energy there. The largest share
    means heads for little else; heads that also serve as sinks have less. The group with the
    largest F1 on this text (see `score_groups`) is taken; of equals, that of the largest share.

    Args:
        model: the model of the testbed, with nothing in place.
        lorsa: of its only layer.
        language: its language.
        labels: text to name heads on; score them on other text.
    """
    text = _Text.read(model, language, labels)
    scores = source_scores(lorsa, text.record, text.sources_of_kin())
    best: dict[str, tuple[float, list[int]]] = {name: (-1.0, []) for name in language.rules}
    for min_energy in MIN_ENERGIES:
        groups = {name: scores[name].heads(min_energy=min_energy) for name in language.rules}
        strengths = _strengths(model, lorsa, text, groups)
        for index, name in enumerate(language.rules):
            told = text.told(index, strengths[name])
            f1 = told.f1(told.best_thresholds())
            if f1 > best[name][0]:
                best[name] = f1, groups[name]
    return {name: heads for name, (_, heads) in best.items()}


def score_groups(
    model: nn.Module,
    lorsa: Lorsa,
    language: RuleLanguage,
    groups: Mapping[str, Sequence[int]],
    naming: LabelledTokens,
    test: LabelledTokens,
) -> "DataFrame":
    """How much of what each group fetches comes from its rule's source, and how well it tells it.

    *Source mass* is the share of the z pattern on the true source, averaged over heads and queries
    of the rule by energy. *F1* is that of "the group writes more than a threshold" as a detector
    of the rule's queries. What it writes is what it fetches from the token that the rule would
    read, in terms of the answer that the rule would give: its direct contribution to the answer's
    logit, less the mean over all answers of the rule. Heads differ by answer, so each answer has
    its own threshold: the best one on other text.
    Positions at which another rule holds that has the same source and the same answer (first and
    last name, where there is but one) count neither way.

    Args:
        model: the model of the testbed, with nothing in place.
        lorsa: of its only layer.
        language: its language.
        groups: heads by rule, from `rule_groups`; or any, such as those that make up an attention
            head in the exact lift.
        naming: text on which thresholds are chosen; some queries of every answer make good ones.
        test: text on which groups are scored.

    Returns:
        A row for each rule: `n_heads`; `attended`, the largest mean share of the source in the
        patterns of the model's attention heads; `gated`, whether that is at least `MIN_ATTENDED`;
        `sharp`, the share of queries at which some attention head puts at least `GATE` of its
        pattern on the source; `source_mass` at those queries, `source_mass_all` at all; `f1`. Not
        a number for a group without heads or queries.
    """
    texts = [_Text.read(model, language, labels) for labels in (naming, test)]
    strengths = [_strengths(model, lorsa, text, groups) for text in texts]
    pattern = _own_patterns(model, texts[1].record)
    attended = source_mass(pattern, test, len(language.rules)).amax(1)
    sharp = sharp_queries(pattern, test)
    masses = {
        name: source_scores(lorsa, texts[1].record, texts[1].sources_at(where))
        for name, where in (("source_mass", sharp), ("source_mass_all", test.rule >= 0))
    }
    rows = []
    for index, rule in enumerate(language.rules):
        heads = list(groups[rule])
        known, told = (
            text.told(index, part[rule]) for text, part in zip(texts, strengths, strict=True)
        )
        rows.append(
            {
                "rule": rule,
                "n_heads": len(heads),
                "attended": float(attended[index]),
                "gated": bool(attended[index] >= MIN_ATTENDED),
                "sharp": float(sharp[test.rule == index].double().mean()),
                **{name: scores[rule].mean_share(heads) for name, scores in masses.items()},
                "f1": told.f1(known.best_thresholds()) if heads else float("nan"),
            }
        )
    return table(rows)


def sharp_queries(
    pattern: Float[Tensor, "batch head query key"], labels: LabelledTokens
) -> Bool[Tensor, "batch pos"]:
    """Queries of rules at which some attention head has `GATE` of its pattern on the source."""
    sharp = torch.zeros_like(labels.rule, dtype=torch.bool)
    batch, query = torch.nonzero(labels.rule >= 0, as_tuple=True)
    on_source = pattern[batch, :, query, labels.source[batch, query]].amax(1)
    sharp[batch, query] = on_source >= GATE
    return sharp


@torch.no_grad()
def _own_patterns(
    model: nn.Module, record: AttentionRecord
) -> Float[Tensor, "batch head query key"]:
    """Patterns of the model's own attention heads."""
    exact = Lorsa.from_attention(model, 0)
    part = record.seen_by(exact)
    return exact.pattern(part.x, range(exact.cfg.n_qk_heads), **part.context)


def _kin(index: int) -> list[int]:
    """The rule and those with triggers that fetch the same kind of token."""
    family = RULES[index].family
    if family is None or RULES[index].where == "same":
        return [index]
    return [k for k, rule in enumerate(RULES) if rule.family == family and rule.where != "same"]


class _Told(NamedTuple):
    """What a group writes for a rule's answers, at the positions that tell for or against it."""

    strength: Float[Tensor, " n"]
    asked: Bool[Tensor, " n"]
    """Whether the rule holds."""
    answer: Int[Tensor, " n"]
    """What it would answer, -1 where it has no source."""

    def best_thresholds(self) -> Float[Tensor, " d_vocab"]:
        """`best_threshold` of each answer; infinite for one that was never asked for."""
        thresholds = torch.full((len(VOCAB),), float("inf"))
        for token in sorted(set(self.answer[self.asked].tolist())):
            here = self.answer == token
            thresholds[token] = best_threshold(self.strength[here], self.asked[here])
        return thresholds

    def f1(self, thresholds: Float[Tensor, " d_vocab"]) -> float:
        """F1 of "it writes more than the threshold of its answer"."""
        above = self.strength > thresholds[self.answer.clamp(min=0)]
        return f1_score(above & (self.answer >= 0), self.asked)


class _Text(NamedTuple):
    """Labelled text, what the layer received for it, and what every rule would read there."""

    language: RuleLanguage
    labels: LabelledTokens
    record: AttentionRecord
    sources: Int[Tensor, "batch pos rule"]
    answers: Int[Tensor, "batch pos rule"]

    @classmethod
    def read(cls, model: nn.Module, language: RuleLanguage, labels: LabelledTokens) -> "_Text":
        record = record_attention(model, labels.tokens, [0])[0]
        return cls(language, labels, record, *language.candidates(labels.tokens))

    def sources_at(self, where: Bool[Tensor, "batch pos"]) -> dict[str, Tensor]:
        """Sources of each rule at some of its queries."""
        rule = self.labels.rule
        return {
            name: self.labels.source.masked_fill((rule != index) | ~where, -1)
            for index, name in enumerate(self.language.rules)
        }

    def sources_of_kin(self) -> dict[str, Tensor]:
        """Sources at queries of each rule and of those that fetch the same kind of token."""
        rule = self.labels.rule
        return {
            name: self.labels.source.masked_fill(~torch.isin(rule, torch.tensor(_kin(index))), -1)
            for index, name in enumerate(self.language.rules)
        }

    def told(self, index: int, strength: Float[Tensor, "batch pos"]) -> _Told:
        """What a group's strength tells of a rule, without positions where it cannot."""
        clear = ~self.ambiguous(index)
        asked, answer = self.labels.rule == index, self.answers[..., index]
        return _Told(strength[clear], asked[clear], answer[clear])

    def ambiguous(self, index: int) -> Bool[Tensor, "batch pos"]:
        """Positions at which another rule holds with the source and the answer of this one."""
        rule, source, answer = self.labels.rule, self.labels.source, self.labels.answer
        same = (source == self.sources[..., index]) & (answer == self.answers[..., index])
        return same & (rule >= 0) & (rule != index)


@torch.no_grad()
def _strengths(
    model: nn.Module, lorsa: Lorsa, text: _Text, groups: Mapping[str, Sequence[int]]
) -> dict[str, Float[Tensor, "batch pos"]]:
    """What each group fetches from its rule's source at every position, for its answer."""
    names = text.language.rules
    added = logit_directions(host_of(model), lorsa.W_O.detach())
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    seen = text.record.seen_by(lorsa)
    for start in range(0, len(text.labels.tokens), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        part = seen.batch(rows)
        stays = to_dense(lorsa.encode(part.x, **part.context), lorsa.cfg.n_ov_heads) != 0
        for index, name in enumerate(names):
            heads, source = list(groups[name]), text.sources[rows, :, index]
            z_pattern = lorsa.z_pattern(part.x, heads, **part.context)
            at = source.clamp(min=0)[:, None, :, None].expand(-1, len(heads), -1, 1)
            fetched = rearrange(z_pattern.gather(3, at), "b head q 1 -> b q head")
            fetched = fetched * stays[..., heads] * (source >= 0)[..., None]
            answers = text.answers[..., index]
            possible = torch.nonzero(answers[answers >= 0].bincount())[:, 0]
            by_answer = added[heads] - added[heads][:, possible].mean(1, keepdim=True)
            found[name].append((fetched * by_answer.T[answers[rows]]).sum(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}
