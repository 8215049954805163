"""Finds the rule, the source and the answer at every position of a batch of sequences."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.testbed.grammar import (
    AGAIN,
    CONTENT_RATES,
    DUP,
    FAMILIES,
    RULES,
    TOKEN_IDS,
    TRIGGER_RATES,
    TRIGGERS,
    VOCAB,
)


class Tables(NamedTuple):
    """The rules as lookup tables over token ids."""

    family: Int[Tensor, "vocab"]
    """Index of each token's family in FAMILIES; -1 for ``<bos>``, triggers and ``again``."""
    rule_of_trigger: Int[Tensor, "vocab"]
    """Rule a trigger asks for, -1 for other tokens."""
    trigger_of_rule: Int[Tensor, "rule"]
    """Trigger token of each rule; -1 for dup, which has none."""
    answer: Int[Tensor, "rule vocab"]
    """Answer of each rule for each source token, -1 where the rule cannot read it."""
    trigger_rates: Float[Tensor, "rule"]
    """Relative rate of each rule's trigger, 0 for dup."""
    content_rates: Float[Tensor, "vocab"]
    """Relative rate of each content token."""

    @classmethod
    @cache
    def build(cls) -> "Tables":
        """The tables of RULES, made once."""
        n_vocab = len(VOCAB)
        family = torch.full((n_vocab,), -1)
        content_rates = torch.zeros(n_vocab)
        for index, (name, strings) in enumerate(FAMILIES.items()):
            ids = [TOKEN_IDS[string] for string in strings]
            family[ids] = index
            content_rates[ids] = CONTENT_RATES.get(name, 0.0) / len(strings)
        rule_of_trigger = torch.full((n_vocab,), -1)
        trigger_of_rule = torch.full((len(RULES),), -1)
        trigger_rates = torch.zeros(len(RULES))
        answer = torch.full((len(RULES), n_vocab), -1)
        for index, rule in enumerate(RULES):
            if rule.query in TRIGGERS:
                trigger = TOKEN_IDS[rule.query]
                rule_of_trigger[trigger] = index
                trigger_of_rule[index] = trigger
                trigger_rates[index] = TRIGGER_RATES.get(rule.query, 1.0)
            sources = [FAMILIES[rule.family]] if rule.family else [*FAMILIES.values(), (AGAIN,)]
            for strings in sources:
                for place, string in enumerate(strings):
                    target = rule.answer(strings, place)
                    answer[index, TOKEN_IDS[string]] = TOKEN_IDS[target]
        return cls(family, rule_of_trigger, trigger_of_rule, answer, trigger_rates, content_rates)


class Reader:
    """Reads a batch of sequences from left to right and finds the rule at each position."""

    def __init__(self, tables: Tables, batch: int, n_pos: int) -> None:
        n_vocab = tables.family.numel()
        self.tables = tables
        self.rows = torch.arange(batch)
        self.history = torch.full((batch, n_pos), -1)
        self.first = torch.full((batch, len(FAMILIES)), -1)
        self.last = torch.full((batch, len(FAMILIES)), -1)
        self.seen_at = torch.full((batch, n_vocab), -1)
        self.count = torch.zeros((batch, n_vocab), dtype=torch.int64)

    def candidates(self, position: int) -> Int[Tensor, "batch rule"]:
        """Source each rule would read if its trigger stood at ``position``; -1 where it has none.

        dup has no trigger, so its column is -1.
        """
        nowhere = torch.full_like(self.rows, -1)
        names = list(FAMILIES)
        columns = []
        for index, rule in enumerate(RULES):
            source = nowhere
            if rule.where == "last" and rule.family is not None:
                source = self.last[:, names.index(rule.family)]
            elif rule.where == "first" and rule.family is not None:
                source = self.first[:, names.index(rule.family)]
            elif rule.where in ("fixed", "previous"):
                at = 1 if rule.where == "fixed" else position - 1
                if 0 <= at < position:
                    readable = self.tables.answer[index, self.history[:, at]] >= 0
                    source = torch.where(readable, at, nowhere)
            columns.append(source)
        return torch.stack(columns, dim=1)

    def read(
        self, position: int, token: Int[Tensor, "batch"]
    ) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        """Rule, source and answer at ``position``, where ``token`` stands; then remember it."""
        tables, rows = self.tables, self.rows
        self.history[:, position] = token
        rule = tables.rule_of_trigger[token]
        source = self.candidates(position)[rows, rule.clamp(min=0)]
        repeated = (tables.answer[DUP, token] >= 0) & (self.seen_at[rows, token] >= 0)
        rule = torch.where(repeated, DUP, rule)
        source = torch.where(repeated, self.seen_at[rows, token], source)

        holds = (rule >= 0) & (source >= 0)
        rule, source = torch.where(holds, rule, -1), torch.where(holds, source, -1)
        source_token = self.history[rows, source.clamp(min=0)]
        answer = torch.where(holds, tables.answer[rule.clamp(min=0), source_token], -1)

        family = tables.family[token]
        member = rows[family >= 0]
        family = family[member]
        self.last[member, family] = position
        unseen = self.first[member, family] < 0
        self.first[member[unseen], family[unseen]] = position
        self.seen_at[rows, token] = position
        self.count[rows, token] += 1
        return rule, source, answer

    def read_all(
        self, position: int, token: Int[Tensor, "batch"]
    ) -> tuple[Int[Tensor, "batch rule"], Int[Tensor, "batch rule"]]:
        """Source and answer of each rule as if it held at ``position``; then as `read`."""
        source = self.candidates(position)
        rule, actual, _ = self.read(position, token)
        source[:, DUP] = torch.where(rule == DUP, actual, -1)
        source_token = self.history.gather(1, source.clamp(min=0))
        by_rule = torch.arange(len(RULES))
        answer = self.tables.answer[by_rule, source_token]
        return source, torch.where(source >= 0, answer, -1)
