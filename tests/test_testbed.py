"""The testbed: ground truth, the committed models, the scores and the training script."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorsa_lens.testbed import (
    CyclicLanguage,
    LabelledTokens,
    NetworkConfig,
    RuleLanguage,
    load_language,
    load_model,
    load_weights,
    rule_accuracy,
    rule_cross_entropy,
    run_network,
    source_mass,
)
from lorsa_lens.testbed.models import MODEL_NAMES, WEIGHTS_DIR
from lorsa_lens.testbed.network import initial_weights, weight_shapes
from lorsa_lens.testbed.train import (
    RECIPES,
    Recipe,
    evaluate,
    main,
    network_config,
    save_model,
    train,
    weighted_loss,
)

RULES = RuleLanguage()
CYCLIC = CyclicLanguage()

# The rules once more, as a reader of the strings would state them: independent of the package.
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
NAMES = ["Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry"]
WORDS = [
    "apple",
    "bread",
    "cloud",
    "drum",
    "eagle",
    "forest",
    "garden",
    "honey",
    "island",
    "jacket",
]
CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Greece": "Athens",
}
TOPICS = ["music", "sport", "history", "science", "cooking", "travel", "film", "weather"]
TRIGGER_LIST = (
    "plus_one: minus_one: tomorrow: next_place: last_person: first_person: initial: capital: "
    "topic: copy:"
)
TRIGGERS = TRIGGER_LIST.split()


def _rule_of_strings(strings: list[str], query: int) -> tuple[str, int, str] | None:
    """Rule, source and answer at ``query``, read off the strings up to it."""
    before, here = strings[:query], strings[query]

    def positions(family: list[str]) -> list[int]:
        return [place for place, string in enumerate(before) if string in family]

    def step(family: list[str], amount: int) -> tuple[int, str] | None:
        found = positions(family)
        if not found:
            return None
        index = family.index(before[found[-1]])
        return found[-1], family[(index + amount) % len(family)]

    hit: tuple[int, str] | None = None
    name = ""
    if here == "plus_one:":
        name, hit = "nextnum", step(NUMBERS, 1)
    elif here == "minus_one:":
        name, hit = "prevnum", step(NUMBERS, -1)
    elif here == "tomorrow:":
        name, hit = "nextday", step(DAYS, 1)
    elif here == "next_place:":
        name, hit = "nextord", step(ORDINALS, 1)
    elif here == "last_person:":
        name, hit = "lastname", step(NAMES, 0)
    elif here == "first_person:" and positions(NAMES):
        name, hit = "firstname", (positions(NAMES)[0], before[positions(NAMES)[0]])
    elif here == "initial:" and positions(WORDS):
        last = positions(WORDS)[-1]
        name, hit = "acronym", (last, before[last][0].upper())
    elif here == "capital:" and positions(list(CAPITALS)):
        last = positions(list(CAPITALS))[-1]
        name, hit = "capital", (last, CAPITALS[before[last]])
    elif here == "topic:" and query > 1 and before[1] in TOPICS:
        name, hit = "topic", (1, before[1])
    elif here == "copy:" and query > 0 and before[-1] not in [*TRIGGERS, "<bos>"]:
        name, hit = "prevcopy", (query - 1, before[-1])
    elif here in WORDS and here in before:
        name, hit = "dup", (max(positions([here])), "again")
    return None if hit is None else (name, *hit)


def _labels_of_strings(strings: list[str], labels: LabelledTokens, row: int) -> None:
    """Every label of one sequence equals the reading of its strings."""
    for query in range(len(strings)):
        rule, source, answer = (int(tensor[row, query]) for tensor in labels[1:])
        got = None if rule < 0 else (RULES.rules[rule], source, RULES.vocab[answer])
        assert got == _rule_of_strings(strings, query), (query, strings)
        if rule < 0:
            assert source == answer == -1


def test_rule_labels_equal_a_reading_of_the_strings() -> None:
    labels = RULES.sample(64, seed=3)
    assert labels.tokens.shape == (64, 48)
    for row in range(64):
        strings = RULES.str_tokens(labels.tokens[row])
        assert strings[0] == "<bos>"
        assert strings[1] in TOPICS
        _labels_of_strings(strings, labels, row)
    for index in range(11):
        assert int((labels.rule == index).sum()) >= 30, RULES.rules[index]


def test_labels_of_arbitrary_tokens_equal_a_reading_of_the_strings() -> None:
    """Also off the distribution: triggers without sources, triggers in a row, no topic, two BOS."""
    tokens = torch.randint(
        0, len(RULES.vocab), (64, 30), generator=torch.Generator().manual_seed(5)
    )
    triggers = torch.tensor(RULES.families["trigger"])
    tokens[:, ::3] = triggers[torch.arange(10) % len(triggers)]
    labels = RULES.label(tokens)
    for row in range(64):
        _labels_of_strings(RULES.str_tokens(tokens[row]), labels, row)
    without_rule = torch.isin(tokens, triggers) & (labels.rule < 0)
    assert without_rule.any()


def test_hand_written_sequence() -> None:
    sequence = (
        "<bos> music three Alice apple plus_one: four Bob first_person: Alice apple again "
        "initial: A capital: copy: minus_one: three copy: three last_person: Alice topic: music"
    )
    text = sequence.split()
    tokens = torch.tensor([[RULES.token_id(string) for string in text]])
    labels = RULES.label(tokens)
    found = {
        query: (RULES.rules[rule], int(labels.source[0, query]), RULES.vocab[answer])
        for query in range(len(text))
        if (rule := int(labels.rule[0, query])) >= 0 and (answer := labels.answer[0, query]) >= 0
    }
    assert found == {
        5: ("nextnum", 2, "four"),
        8: ("firstname", 3, "Alice"),
        10: ("dup", 4, "again"),
        12: ("acronym", 10, "A"),
        16: ("prevnum", 6, "three"),  # not 14 and 15: no country yet, and copy: follows a trigger
        18: ("prevcopy", 17, "three"),
        20: ("lastname", 9, "Alice"),
        22: ("topic", 1, "music"),
    }


@pytest.mark.parametrize("language", [RULES, CYCLIC], ids=["rules", "cyclic"])
def test_samples_obey_their_labels(language: RuleLanguage | CyclicLanguage) -> None:
    labels = language.sample(128, seed=1)
    again = language.sample(128, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(labels, again, strict=True))
    assert not torch.equal(labels.tokens, language.sample(128, seed=2).tokens)
    relabelled = language.label(labels.tokens)
    assert all(torch.equal(one, other) for one, other in zip(labels, relabelled, strict=True))
    assert all(tensor.dtype == torch.int64 for tensor in labels)
    # A rule is obeyed: the next token is its answer.
    holds = labels.answer[:, :-1] >= 0
    assert torch.equal(labels.answer[:, :-1][holds], labels.tokens[:, 1:][holds])
    position = torch.arange(language.n_ctx).expand_as(labels.source)
    assert (labels.source <= position).all()
    assert torch.equal(labels.rule >= 0, labels.source >= 0)


def test_triggers_in_samples_always_have_a_source() -> None:
    labels = RULES.sample(256, seed=4)
    triggers = torch.tensor(RULES.families["trigger"])
    assert (labels.rule[torch.isin(labels.tokens, triggers)] >= 0).all()


def test_again_is_said_after_repeats_only() -> None:
    """``again`` follows dup, or a copy of itself, so it carries the label it seems to carry."""
    labels = RULES.sample(256, seed=4)
    again = labels.tokens[:, 1:] == RULES.token_id("again")
    before = labels.rule[:, :-1][again]
    allowed = torch.tensor([RULES.rules.index("dup"), RULES.rules.index("prevcopy")])
    assert torch.isin(before, allowed).all()


def test_vocabulary() -> None:
    assert len(RULES.vocab) == len(set(RULES.vocab)) == 97
    assert RULES.rules == (
        "nextnum",
        "prevnum",
        "nextday",
        "nextord",
        "lastname",
        "firstname",
        "acronym",
        "capital",
        "topic",
        "prevcopy",
        "dup",
    )
    ids = [token for family in RULES.families.values() for token in family]
    assert sorted(ids) == list(range(1, 96))  # every token but <bos> and again, once
    assert [RULES.vocab[token] for token in RULES.families["day"]] == DAYS
    assert [RULES.vocab[token] for token in RULES.families["trigger"]] == TRIGGERS
    assert len(CYCLIC.vocab) == len(set(CYCLIC.vocab)) == 33
    assert RULES.str_tokens(torch.tensor([], dtype=torch.int64)) == []


def test_induction_labels_equal_a_reading_of_the_tokens() -> None:
    sampled = CYCLIC.sample(32, seed=0).tokens
    arbitrary = torch.randint(0, 33, (32, 40), generator=torch.Generator().manual_seed(1))
    for tokens in (sampled, arbitrary):
        labels = CYCLIC.label(tokens)
        for row, sequence in enumerate(tokens.tolist()):
            for query, token in enumerate(sequence):
                earlier = [place for place in range(query) if sequence[place] == token]
                expected = (0, earlier[-1] + 1, sequence[earlier[-1] + 1]) if earlier else (-1,) * 3
                assert tuple(int(tensor[row, query]) for tensor in labels[1:]) == expected


def test_cyclic_sequences_repeat_with_their_period() -> None:
    labels = CYCLIC.sample(512, seed=0)
    periods = set()
    for sequence in labels.tokens.tolist():
        assert sequence[0] == 0
        words = sequence[1:]
        period = words[1:].index(words[0]) + 1
        periods.add(period)
        assert len(set(words[:period])) == period
        assert words == [words[place % period] for place in range(39)]
    assert periods == set(range(8, 18))


def test_previous_token_labels() -> None:
    labels = CYCLIC.previous_token(CYCLIC.sample(2, seed=0).tokens)
    assert labels.rule[0, :3].tolist() == [-1, 1, 1]
    assert labels.source[1].tolist() == list(range(-1, 39))
    assert (labels.answer == -1).all()
    accuracy = rule_accuracy(torch.zeros(2, 40, 33), labels, 2)
    assert accuracy.isnan().all()  # it names a source, not an answer


# -- scores ------------------------------------------------------------------------------------


def _small_labels() -> LabelledTokens:
    return LabelledTokens(
        tokens=torch.tensor([[0, 3, 1, 2], [0, 2, 1, 3]]),
        rule=torch.tensor([[-1, -1, 0, 2], [-1, 0, -1, -1]]),
        source=torch.tensor([[-1, -1, 1, 1], [-1, 1, -1, -1]]),
        answer=torch.tensor([[-1, -1, 2, 3], [-1, 1, -1, -1]]),
    )


def test_source_mass_by_hand() -> None:
    pattern = torch.zeros(2, 2, 4, 4)
    pattern[0, :, 2, 1] = torch.tensor([0.25, 1.0])
    pattern[1, :, 1, 1] = torch.tensor([0.75, 0.0])
    pattern[0, :, 3, 1] = torch.tensor([0.5, 0.125])
    pattern[0, :, 3, 0] = 0.5  # off the source: must not count
    mass = source_mass(pattern, _small_labels(), 3)
    assert mass[0].tolist() == [0.5, 0.5]
    assert mass[1].isnan().all()
    assert mass[2].tolist() == [0.5, 0.125]


def test_accuracy_and_cross_entropy_by_hand() -> None:
    logits = torch.zeros(2, 4, 4)
    logits[0, 2, 2] = math.log(3.0)  # right: 3 of 6 parts
    logits[1, 1, 0] = math.log(5.0)  # wrong: the answer has 1 of 8 parts
    logits[0, 3, 3] = math.log(9.0)  # right: 9 of 12 parts
    accuracy = rule_accuracy(logits, _small_labels(), 3)
    loss = rule_cross_entropy(logits, _small_labels(), 3)
    assert accuracy[[0, 2]].tolist() == [0.5, 1.0]
    expected = [(math.log(2) + math.log(8)) / 2, math.log(12 / 9)]
    torch.testing.assert_close(loss[[0, 2]], torch.tensor(expected))
    assert accuracy[1].isnan()
    assert loss[1].isnan()


def test_weighted_loss_by_hand() -> None:
    labels = LabelledTokens(
        tokens=torch.tensor([[0, 1, 2]]),
        rule=torch.tensor([[-1, 0, 0]]),
        source=torch.tensor([[-1, 0, 0]]),
        answer=torch.tensor([[-1, 2, 1]]),
    )
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = math.log(2.0)  # log(5/2) at weight 0.2: no rule, next token 1
    logits[0, 1, 2] = math.log(4.0)  # log(7/4) at weight 1
    logits[0, 2, 1] = math.log(3.0)  # log(2) at weight 1: the answer after the end
    expected = (0.2 * math.log(2.5) + math.log(1.75) + math.log(2.0)) / 2.2
    assert weighted_loss(logits, labels, 0.2).item() == pytest.approx(expected, abs=1e-6)
    # Without a rule at the end, the last position has no target.
    ended = labels._replace(answer=torch.tensor([[-1, 2, -1]]))
    expected = (0.2 * math.log(2.5) + math.log(1.75)) / 1.2
    assert weighted_loss(logits, ended, 0.2).item() == pytest.approx(expected, abs=1e-6)


# -- the committed models ----------------------------------------------------------------------


def _hosts() -> list[str]:
    """The hosts of the installed TransformerLens."""
    hosts = ["hooked_transformer", "bridge"]
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        hosts.remove("hooked_transformer")
    try:
        from transformer_lens.model_bridge import TransformerBridge

        TransformerBridge.boot_native  # noqa: B018
    except (ImportError, AttributeError):
        hosts.remove("bridge")
    return hosts


HOSTS = _hosts()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_committed_weights_match_their_description(name: str) -> None:
    weights, config = load_weights(name)
    assert {key: tuple(weight.shape) for key, weight in weights.items()} == weight_shapes(config)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    description = json.loads((WEIGHTS_DIR / f"{name}.json").read_text(encoding="utf-8"))
    assert config == network_config(RECIPES[name], load_language(name))
    # Committed by the recipe as it stands.
    assert description["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))


def test_committed_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS_DIR.iterdir()) < 1_000_000


def test_rules_model_follows_the_rules() -> None:
    model, labels = load_model("rules"), RULES.sample(512, seed=11)
    with torch.no_grad():
        logits, cache = model.run_with_cache(labels.tokens)
    accuracy = rule_accuracy(logits, labels, 11)
    for rule, value in zip(RULES.rules, accuracy.tolist(), strict=True):
        assert value >= (0.8 if rule in ("prevcopy", "dup") else 0.95), (rule, value)
    assert rule_cross_entropy(logits, labels, 11).max() < 0.1
    # dup is a decision, not a habit: a new word is not followed by "again".
    new_word = torch.isin(labels.tokens, torch.tensor(RULES.families["word"])) & (labels.rule < 0)
    said = logits.argmax(dim=-1) == RULES.token_id("again")
    assert said[new_word].float().mean() < 0.1

    # Superposition: each head reads the true source of several rules, several rules use two heads.
    # dup alone stays below one half: its head looks at the earlier word and at its sink.
    mass = source_mass(cache["blocks.0.attn.hook_pattern"], labels, 11)
    attends = mass >= 0.5
    assert attends.any(dim=1).tolist() == [True] * 10 + [False]
    assert mass[10].max() > 0.35
    assert (attends.sum(dim=0) >= 4).all()
    assert (attends.sum(dim=1) >= 2).sum() >= 4


def test_induction_model_does_induction() -> None:
    model, labels = load_model("induction"), CYCLIC.sample(256, seed=11)
    unique = CyclicLanguage(n_ctx=19, min_period=9).sample(256, seed=11)
    with torch.no_grad():
        accuracy = rule_accuracy(model(labels.tokens), labels, 2)
        _, cache = model.run_with_cache(unique.tokens)
    assert accuracy[0] >= 0.99
    assert accuracy[1].isnan()
    mass = [source_mass(cache[f"blocks.{at}.attn.hook_pattern"], unique, 2)[0] for at in (0, 1)]
    assert mass[1].max() > 0.8
    assert mass[0].max() < 0.2


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_host_computes_the_trained_function(name: str, host: str) -> None:
    weights, config = load_weights(name)
    tokens = load_language(name).sample(16, seed=0).tokens
    expected = run_network(weights, tokens, config)
    model = load_model(name, host=host)
    assert not model.training
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    # float32 is exact to 4e-5 here (against float64), on the hosts and in run_network alike.
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-5)
    for layer, pattern in enumerate(expected.patterns):
        got = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(got, pattern, atol=1e-5, rtol=1e-5)
    assert model.cfg.n_layers == config.n_layers


@pytest.mark.skipif(len(HOSTS) < 2, reason="needs a TransformerLens with both hosts")
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_hosts_agree(name: str) -> None:
    tokens = load_language(name).sample(16, seed=0).tokens
    with torch.no_grad():
        logits = [load_model(name, host=host)(tokens) for host in HOSTS]
    assert type(load_model(name)).__name__ == "HookedTransformer"
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_missing_host_is_refused() -> None:
    for host in {"hooked_transformer", "bridge"} - set(HOSTS):
        with pytest.raises(ImportError, match="TransformerLens"):
            load_model("rules", host=host)


def test_load_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for host in HOSTS:
        load_model("rules", host=host)
    assert torch.equal(torch.rand(3), expected)


def _run_python(code: str) -> str:
    """Standard output of a fresh interpreter, without the type checks of the test session."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return result.stdout.strip()


def test_import_is_light_and_names_are_checked_before_any_work() -> None:
    code = """
import sys
from lorsa_lens.testbed import load_language, load_model, load_weights
calls = (
    lambda: load_model("grokking"),
    lambda: load_model("rules", host="jax"),
    lambda: load_language("ioi"),
    lambda: load_weights("ioi"),
)
for call in calls:
    try:
        call()
    except ValueError as error:
        print(error)
print("transformer_lens" in sys.modules)
"""
    assert _run_python(code).splitlines() == [
        "name must be one of rules, induction, recall; got 'grokking'",
        "host must be one of auto, hooked_transformer, bridge; got 'jax'",
        "name must be one of rules, induction, recall; got 'ioi'",
        "name must be one of rules, induction, recall; got 'ioi'",
        "False",
    ]


# -- training ----------------------------------------------------------------------------------


def test_a_future_token_does_not_change_the_network() -> None:
    config = NetworkConfig(n_layers=2, n_heads=2, d_model=8, d_head=4, n_ctx=10, d_vocab=97)
    weights, tokens = initial_weights(config, seed=0), RULES.sample(4, seed=0).tokens[:, :10]
    edited = tokens.clone()
    edited[:, 6] = 3
    plain, changed = (run_network(weights, each, config).logits for each in (tokens, edited))
    torch.testing.assert_close(plain[:, :6], changed[:, :6])
    assert not torch.allclose(plain[:, 6:], changed[:, 6:])


def test_training_is_deterministic_and_learns() -> None:
    recipe = Recipe(n_layers=1, n_steps=12, batch_size=16, n_warmup=2, d_model=32)
    first, second = (train(CYCLIC, recipe) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(CYCLIC, replace(recipe, seed=1))
    assert not torch.equal(first["embed.W_E"], other["embed.W_E"])

    config, labels = network_config(recipe, CYCLIC), CYCLIC.sample(64, seed=9)
    untrained = evaluate(initial_weights(config, seed=0), CYCLIC, config, labels)
    trained = evaluate(first, CYCLIC, config, labels)
    assert trained.cross_entropy[0] < untrained.cross_entropy[0] - 0.2
    assert trained.mass.shape == (1, 2, 3)


def test_command_line_trains_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for folder in ("one", "two"):
        main(["--steps", "3", "--sequences", "8", "--output", str(tmp_path / folder)])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert all(rule in tables[0] for rule in (*RULES.rules, "induction"))
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written == [
        "induction.json",
        "induction.safetensors",
        "recall.json",
        "recall.safetensors",
        "rules.json",
        "rules.safetensors",
    ]
    for file in written:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    weights, config = load_weights("rules", folder=tmp_path / "one")
    tokens = RULES.sample(2, seed=0).tokens
    with torch.no_grad():
        logits = load_model("rules", folder=tmp_path / "one")(tokens)
    torch.testing.assert_close(
        logits, run_network(weights, tokens, config).logits, atol=1e-5, rtol=1e-5
    )


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = RECIPES["rules"], network_config(RECIPES["rules"], RULES)
    save_model(tmp_path, "rules", initial_weights(config, seed=0), config, recipe)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path, "rules", initial_weights(config, seed=1), config, recipe)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- refusals ----------------------------------------------------------------------------------


def _pattern(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RuleLanguage(n_ctx=3), "n_ctx must be at least 4, got 3"),
        (lambda: RuleLanguage(trigger_rate=1.5), r"trigger_rate must lie in \[0, 1\], got 1.5"),
        (lambda: RULES.sample(0, seed=0), "n_sequences must be at least 1, got 0"),
        (lambda: RULES.label(torch.tensor([[0, 97]])), r"ids in 0..96.*from 0 to 97"),
        (lambda: RULES.label(torch.zeros((2, 0), dtype=torch.int64)), "must not be empty"),
        (lambda: RULES.token_id("sheep"), "'sheep' is not a token"),
        (lambda: CYCLIC.str_tokens(torch.tensor([-1])), "from -1 to -1"),
        (lambda: CyclicLanguage(min_period=9, max_period=8), "got 9 and 8"),
        (lambda: CyclicLanguage(n_ctx=18), "at least max_period . 2 = 19.*got 18"),
        (lambda: train(RULES, Recipe(1, 0, 8)), "recipe.n_steps must be at least 1, got 0"),
        (lambda: source_mass(_pattern(2, 1, 3, 3), _small_labels(), 3), r"\[2, 3\].*\[2, 4\]"),
        (lambda: source_mass(_pattern(2, 1, 4, 5), _small_labels(), 3), "square"),
        (lambda: source_mass(_pattern(2, 1, 4, 4), _small_labels(), 2), "n_rules is 2.*rule 2"),
        (lambda: rule_accuracy(_pattern(1, 4, 4), _small_labels(), 3), "same tokens"),
        (
            lambda: run_network({}, torch.zeros((1, 5), dtype=torch.int64), _tiny_config()),
            "5 positions.*n_ctx = 4",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _tiny_config() -> NetworkConfig:
    return NetworkConfig(n_layers=1, n_heads=1, d_model=4, d_head=2, n_ctx=4, d_vocab=5)
