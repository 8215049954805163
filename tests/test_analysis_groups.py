"""Head groups named after the testbed's rules: the score against loops, and trained Lorsas."""

import functools

import pytest
import torch

from lorsa_lens import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import groups as module
from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.testbed.detection import best_threshold, f1_score
from lorsa_lens.testbed.groups import rule_groups, score_groups
from lorsa_lens.training import TrainingConfig, train_on

LANGUAGE = load_language("rules")
GATED = [
    "nextnum", "prevnum", "nextday", "nextord", "lastname", "firstname", "acronym", "capital",
    "topic", "prevcopy",
]  # fmt: skip


def tokens_of(text):
    return torch.tensor([[LANGUAGE.token_id(word) for word in text.split()]])


# ---------------------------------------------------------------------------------- candidates


def test_candidates_are_what_the_labels_say_where_a_rule_holds():
    labels = LANGUAGE.sample(24, seed=3)
    sources, answers = LANGUAGE.candidates(labels.tokens)
    holds = labels.rule >= 0
    by_rule = labels.rule.clamp(min=0)[..., None]
    assert torch.equal(sources.gather(2, by_rule)[..., 0][holds], labels.source[holds])
    assert torch.equal(answers.gather(2, by_rule)[..., 0][holds], labels.answer[holds])
    assert set(labels.rule[holds].tolist()) == set(range(11))


def test_candidates_of_every_rule_on_paper():
    tokens = tokens_of("<bos> music Alice three again Bob last_person: Bob")
    sources, answers = (part[0] for part in LANGUAGE.candidates(tokens))
    rules = {name: index for index, name in enumerate(LANGUAGE.rules)}

    def column(part, name):
        return part[:, rules[name]].tolist()

    assert column(sources, "lastname") == [-1, -1, -1, 2, 2, 2, 5, 5]
    assert column(sources, "firstname") == [-1, -1, -1, 2, 2, 2, 2, 2]
    assert column(sources, "nextnum") == [-1, -1, -1, -1, 3, 3, 3, 3]
    assert column(sources, "dup") == [-1] * 8
    four, two = LANGUAGE.token_id("four"), LANGUAGE.token_id("two")
    assert column(answers, "nextnum") == [-1] * 4 + [four] * 4
    assert column(answers, "prevnum") == [-1] * 4 + [two] * 4


def test_rules_that_coincide_count_neither_way():
    """Where there is one name only, the last is the first."""
    tokens = tokens_of("<bos> music Alice last_person: Alice Bob last_person: Bob")
    labels = LANGUAGE.label(tokens)
    text = module._Text.read(load_model("rules"), LANGUAGE, labels)
    first = LANGUAGE.rules.index("firstname")
    assert torch.nonzero(text.ambiguous(first)[0])[:, 0].tolist() == [3]
    assert not text.ambiguous(LANGUAGE.rules.index("lastname")).any()


# ---------------------------------------------------------------------------------- detection


def test_the_best_threshold_is_no_worse_than_any_other():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 30):
        for _ in range(20):
            strength = torch.randint(-2, 5, (n,), generator=generator) / 2
            positive = torch.rand(n, generator=generator) < 0.4
            threshold = best_threshold(strength, positive)
            best = max(f1_score(strength > t / 4, positive) for t in range(12))
            assert f1_score(strength > threshold, positive) == pytest.approx(best)
            assert threshold >= 0


def test_a_threshold_lies_half_way_between_values():
    strength = torch.tensor([4.0, 1.0, 3.0, 0.5])
    assert best_threshold(strength, torch.tensor([True, False, True, False])) == 2.0
    assert best_threshold(strength, torch.tensor([True, True, True, True])) == 0.25
    assert best_threshold(strength, torch.zeros(4, dtype=torch.bool)) == float("inf")


def test_what_a_layer_writes_for_an_answer_equals_the_model():
    """The exact lift's heads against the model's own patterns, values and weights."""
    model = load_model("rules")
    labels = LANGUAGE.sample(4, seed=9)
    text = module._Text.read(model, LANGUAGE, labels)
    exact = Lorsa.from_attention(model, 0)
    size = exact.cfg.group_size
    groups = {name: list(range(size, 2 * size)) for name in LANGUAGE.rules}
    found = module._strengths(model, exact, text, groups)
    names = ("hook_pattern", "hook_v")
    _, cache = model.run_with_cache(labels.tokens)
    pattern, value = (cache[f"blocks.0.attn.{name}"].detach() for name in names)
    attn = model.blocks[0].attn
    written = (value[:, :, 1] - attn.b_V[1]) @ attn.W_O[1]
    written = (written - written.mean(-1, keepdim=True)) * model.ln_final.w
    logits = (written @ model.unembed.W_U).detach()
    for index, name in enumerate(LANGUAGE.rules):
        possible = text.answers[..., index].unique()
        possible = possible[possible >= 0]
        for batch, query in ((0, 20), (1, 30), (3, 47)):
            source = int(text.sources[batch, query, index])
            expected = 0.0
            if source >= 0:
                answer = int(text.answers[batch, query, index])
                at = logits[batch, source]
                expected = float(
                    pattern[batch, 1, query, source] * (at[answer] - at[possible].mean())
                )
            assert found[name][batch, query].item() == pytest.approx(expected, abs=1e-4), name


def test_sharp_queries_are_those_of_the_patterns():
    model, labels = load_model("rules"), LANGUAGE.sample(8, seed=4)
    _, cache = model.run_with_cache(labels.tokens)
    pattern = cache["blocks.0.attn.hook_pattern"].detach()
    found = module.sharp_queries(pattern, labels)
    own = module._own_patterns(model, record_attention(model, labels.tokens, [0])[0])
    torch.testing.assert_close(own, pattern, rtol=0, atol=1e-5)
    assert 0.2 < found[labels.rule >= 0].double().mean() < 0.9
    for batch in range(8):
        for query in range(48):
            source = int(labels.source[batch, query])
            attends = source >= 0 and float(pattern[batch, :, query, source].max()) >= 0.9
            assert bool(found[batch, query]) == attends


def test_each_answer_has_its_own_threshold():
    """Answer 7 is told above 2, answer 8 above .5; 9 was never asked for, -1 is no answer."""
    strength = torch.tensor([3.0, 1.0, 0.7, 0.3, 9.0, 9.0])
    asked = torch.tensor([True, False, True, False, False, False])
    told = module._Told(strength, asked, torch.tensor([7, 7, 8, 8, 9, -1]))
    thresholds = told.best_thresholds()
    assert thresholds[[7, 8]].tolist() == [2.0, 0.5]
    assert thresholds.isinf().sum() == len(LANGUAGE.vocab) - 2
    assert told.f1(thresholds) == 1.0
    assert told.f1(torch.zeros(len(LANGUAGE.vocab))) == pytest.approx(2 * 2 / (5 + 2))


# ---------------------------------------------------------------------------------- trained


@functools.cache
def scored(seed, *, n_steps=1600, n_train=8192, n_naming=1024, n_test=512, **sizes):
    """Scores of the groups of a Lorsa trained with a seed."""
    model = load_model("rules")
    lorsa = Lorsa.from_attention(model, 0, seed=seed, act_fn="topk_relu", k=2, **sizes)
    config = TrainingConfig(
        context_size=48, train_batch_size_tokens=32 * 48, training_tokens=n_steps * 32 * 48,
        seed=seed, adam_beta2=0.95,
    )  # fmt: skip
    seen = LANGUAGE.sample(n_train, seed=seed).tokens
    train_on({0: lorsa}, record_attention(model, seen, [0]), config, progress=False)
    naming = LANGUAGE.sample(n_naming, seed=50_000 + seed)
    test = LANGUAGE.sample(n_test, seed=60_000 + seed)
    groups = rule_groups(model, lorsa, LANGUAGE, naming)
    return score_groups(model, lorsa, LANGUAGE, groups, naming, test).set_index("rule")


def test_groups_of_a_lorsa_trained_for_seconds():
    sizes = {"n_qk_heads": 8, "n_ov_heads": 256}
    frame = scored(0, n_steps=150, n_train=1024, n_naming=96, n_test=96, **sizes)
    assert frame.index[frame["gated"]].tolist() == GATED
    told = frame.loc[GATED].drop("prevcopy")  # copies any token: too few queries of each here
    assert (told["source_mass"] >= 0.85).all()
    assert (told["f1"] >= 0.8).sum() >= 7
    assert frame.loc["dup", "attended"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_gated_rule_has_its_group(seed, record_property):
    frame = scored(seed, n_qk_heads=16, n_ov_heads=1024)
    record_property("groups", frame.to_string())
    assert frame.index[frame["gated"]].tolist() == GATED
    assert (frame.loc[GATED, ["f1", "source_mass"]] >= 0.9).all(axis=None)
