"""Behaviours: sources against loops, nulls on paper, heads made by hand, and trained ones."""

import functools
from math import comb

import pandas as pd
import planted
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens import Lorsa
from lorsa_lens.analysis.behaviours import (
    Behaviour,
    Effect,
    carrying_heads,
    describe_heads,
    find_heads,
    known_behaviours,
    named_heads,
)
from lorsa_lens.analysis.behaviours import positions as by_position
from lorsa_lens.analysis.behaviours import words as by_word
from lorsa_lens.analysis.behaviours.null import (
    holm,
    random_sources,
    shuffled_sources,
    sign_test,
)
from lorsa_lens.analysis.behaviours.prompts import Prompter
from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import save_table
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import CyclicLanguage, load_model
from lorsa_lens.testbed.network import NetworkConfig, initial_weights
from lorsa_lens.training import TrainingConfig, train_on

# ------------------------------------------------------------------------------- sources


def marked(mask, row=0):
    """Keys of every query that has any."""
    return {q: keys for q, line in enumerate(mask[row].tolist())
            if (keys := [k for k, on in enumerate(line) if on])}  # fmt: skip


def brute_force(name, tokens, q):
    """The sources of position q of a list of tokens."""
    earlier = [k for k in range(q) if tokens[k] == tokens[q]]
    if name == "previous":
        return [q - 1] if q else []
    if name == "current":
        return [q] if q else []
    if name == "first":
        return [0] if q >= 2 else []
    if name == "duplicate":
        return earlier
    after = [k + 1 for k in earlier if k + 1 < q]
    if name == "induction":
        return after
    assert name == "gapped_induction"
    if q == 0:
        return []
    matches = [k for k in range(q - 1) if tokens[k] == tokens[q - 1]]
    return [k + 2 for k in matches if k + 2 < q and k + 2 not in after]


NAMES = ["previous", "current", "first", "duplicate", "induction", "gapped_induction"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)
    )
)
def test_sources_equal_loops(sequences):
    tokens = torch.tensor(sequences)
    for name in NAMES:
        mask = getattr(by_position, name)(tokens)
        for row, sequence in enumerate(sequences):
            expected = {q: keys for q in range(len(sequence))
                        if (keys := brute_force(name, sequence, q))}  # fmt: skip
            assert marked(mask, row) == expected, name


VOCABULARY = Vocabulary(
    ("<s>", " Mar", "ion", " Marion", " M", " Monday", " Tuesday", " Wednesday", "1", "2", "3",
     "+", "=", ".", " big", " Mary", " John", " B", "arion"),
    special=frozenset([0]), bos=0,
)  # fmt: skip


def ids(text):
    return torch.tensor([[VOCABULARY.strings.index(piece) for piece in text.split("|")]])


def test_subtoken_induction_continues_words_cut_elsewhere():
    def found(text):
        return marked(by_word.subtoken_induction(ids(text), VOCABULARY))

    assert found("<s>| Marion| big| M") == {3: [1]}
    assert found("<s>| Mar|ion| big| M") == {4: [1]}  # the next letter is in " Mar"
    assert found("<s>| M|arion| big| Mar") == {4: [2]}  # here it is in "arion"
    assert found("<s>| Mar|ion| big| Mar") == {}  # plain induction
    assert found("<s>| Marion| big| Marion") == {}  # nothing is left to continue
    assert found("<s>| M| big| Marion") == {}
    assert found("<s>| Marion|.| Mar") == {3: [1]}


def test_sources_by_meaning():
    known = known_behaviours(VOCABULARY)
    # " M| big" is no name; the next token is the name seen before.
    assert marked(known["name mover"].sources(ids("<s>| Mary| big| John| big| Mary"))) == {4: [1]}
    suppression = known["copy suppression"].sources(ids("<s>| Mary| big| John| big"))
    assert marked(suppression) == {2: [1], 3: [1], 4: [1, 3]}
    successor = known["successor"].sources(ids("<s>| Monday| big| Tuesday|.| Tuesday| Wednesday"))
    assert marked(successor) == {2: [1], 4: [1], 5: [3, 5]}
    assert marked(known["delimiter"].sources(ids("<s>| big|.| big"))) == {3: [2]}
    letters = known_behaviours(planted.VOCABULARY)["first letter"]
    tokens = torch.tensor([planted.ids("Apple", "Basin", "Cloud", "A", "B")])
    assert marked(letters.sources(tokens)) == {2: [0], 3: [1]}


def test_operands_of_sums():
    def found(text, which):
        return marked(by_word.operand(ids(text), VOCABULARY, which))

    assert found("<s>|1|2|+|3|=|1", 0) == {5: [1, 2]}
    assert found("<s>|1|2|+|3|=|1", 1) == {5: [4]}
    for text in ("<s>|1|2|=", "<s>|+|3|=", "<s>|1|+|=", "=|1|+|2"):
        assert found(text, 0) == found(text, 1) == {}


def test_topics_are_far_and_particular():
    tokens = torch.randint(1, 3, (6, 30))
    tokens[0, 4] = 5
    tokens[0, 25] = 5
    excluded = torch.zeros(8, dtype=torch.bool)
    found = marked(by_word.topics(tokens, excluded))
    # Not where the query repeats the topic, or the token before it (that would be induction).
    others = [q for q in range(20, 30) if tokens[0, q] not in (5, tokens[0, 3])]
    assert list(found) == others
    assert len(others) >= 2
    assert all(keys == [4] for keys in found.values())
    excluded[5] = True
    assert 4 not in {k for keys in marked(by_word.topics(tokens, excluded)).values() for k in keys}


@pytest.mark.parametrize("name", list(known_behaviours(planted.VOCABULARY)))
def test_prompts_have_sources_and_the_same_seed_draws_the_same(name):
    behaviour = known_behaviours(planted.VOCABULARY)[name]
    drawn = [behaviour.prompts(Prompter(planted.VOCABULARY, 40, seed), 8) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (8, 40)
    assert (drawn[0][:, 0] == 0).all()
    with_source = behaviour.sources(drawn[0]).any(-1).any(-1)
    assert with_source.sum() >= 6


# ------------------------------------------------------------------------------- nulls


def test_shuffled_sources_keep_distances():
    torch.manual_seed(0)
    tokens = torch.randint(0, 6, (10, 20))
    true = by_position.duplicate(tokens)
    null = shuffled_sources(true, seed=3)
    assert torch.equal(null.any(-1), true.any(-1))
    assert not null.triu(1).any()
    distances = by_position.distances(tokens)
    # Pairs are of like positions, so distances are the same but for those that leave the sequence.
    for mask in (true, null):
        assert (distances[mask] >= 0).all()
    assert abs(distances[true].double().mean() - distances[null].double().mean()) < 0.5
    assert (true & null).sum() < 0.7 * true.sum()


def test_random_sources_are_as_many_and_not_later():
    true = by_position.previous(torch.zeros(50, 12, dtype=torch.long))
    null = random_sources(true, seed=1)
    assert torch.equal(null.sum(-1), true.sum(-1))
    assert not null.triu(1).any()
    shares = null[:, 11].double().mean(0)  # uniform over the 12 keys of the last query
    assert (shares - 1 / 12).abs().max() < 5 * (1 / 12 / 50) ** 0.5


def test_the_sign_test_on_paper():
    above, below = torch.tensor([5, 0, 7, 0, 60]), torch.tensor([0, 5, 1, 0, 4])
    expected = [1 / 32, 1.0, 9 / 256, 1.0, sum(comb(64, k) for k in range(60, 65)) / 2**64]
    assert sign_test(above, below).tolist() == pytest.approx(expected)


def test_holm_on_paper():
    p_values = torch.tensor([0.01, 0.04, 0.03, 0.005], dtype=torch.float64)
    assert holm(p_values).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(torch.tensor([0.9, 0.8])).tolist() == pytest.approx([1.0, 1.0])


def test_effects_ask_for_the_extreme_of_a_family():
    effect = Effect({1: 2, 3: 4}, [[2, 4, 5]])
    logits = torch.tensor([[9.0, 9.0, 3.0, 9.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0, 5.0, 3.0]])
    hits = effect.hits(logits)
    tokens, values = torch.tensor([[1, 3, 0]]), torch.tensor([[[1.0, 1.0]] * 3])
    assert hits.of(tokens, values)[0].tolist() == [[True, False], [False, True], [False, False]]
    assert hits.of(tokens, -values)[0].tolist() == [[False, True], [True, False], [False, False]]
    demoting = Effect({1: 2, 3: 4}, [[2, 4, 5]], promotes=False).hits(logits)
    assert torch.equal(demoting.of(tokens, values), hits.of(tokens, -values))


# ------------------------------------------------------------------------------- planted heads


@functools.cache
def planted_table():
    torch.manual_seed(0)
    return describe_heads(
        planted.model(), planted.lorsa(), vocabulary=planted.VOCABULARY, n_prompts=24, n_pos=40
    )


needs_hooked = pytest.mark.skipif(
    zoo.lacks("learned"), reason="planted heads stand in a HookedTransformer"
)


@needs_hooked
def test_planted_heads_score_on_their_own_behaviour_only():
    frame = planted_table()
    heads = frame[frame["kind"] == "ov"].pivot(index="head", columns="behaviour", values="score")
    names = list(planted.forms())
    assert sorted(names) == sorted(heads.columns)
    assert len(heads) == len(names) + 8
    for head, name in enumerate(names):
        for behaviour in names:
            score = heads.loc[head, behaviour]
            assert score > 0.8 if behaviour == name else score < 0.2, (name, behaviour)
    assert heads.loc[len(names) :].to_numpy().max() < 0.2


@needs_hooked
def test_planted_heads_are_told_from_chance():
    frame = planted_table()
    named = named_heads(frame, min_attended=0.0, min_energy=0.0, min_queries=1)
    found = {(row.behaviour, row.head) for row in named.itertuples() if row.kind == "ov"}
    names = list(planted.forms())
    # Too few queries for heads of one name, day or letter only, and for one sum in each prompt.
    hard = {"name mover", "copy suppression", "successor", "first letter"}
    hard |= {"first operand", "second operand"}
    assert {(name, head) for head, name in enumerate(names) if name not in hard} <= found
    assert found <= {(name, head) for head, name in enumerate(names)}


# ------------------------------------------------------------------------------- tables


def test_scores_of_single_sources_are_those_of_source_scores():
    """Two implementations written apart."""
    model = zoo.KINDS[0].build(torch.float64)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    tokens = zoo.tokens(6, 12)
    sources = torch.full_like(tokens, -1)
    sources[:, 5:] = torch.randint(0, 5, (6, 7))
    behaviour = Behaviour.of_sources("mine", sources)
    frame = describe_heads(model, lorsa, tokens, behaviours=[behaviour], batch_size=4)
    heads = frame[frame["kind"] == "ov"]
    record = record_attention(model, tokens, [1])[1]
    expected = source_scores(lorsa, record, {"mine": sources})["mine"]
    assert heads["score"].tolist() == pytest.approx(expected.share.tolist(), abs=1e-5)
    assert heads["energy"].tolist() == pytest.approx(expected.energy.tolist(), abs=1e-5)
    assert heads["strength"].tolist() == pytest.approx(expected.strength.tolist(), abs=1e-4)
    assert heads["n_queries"].tolist() == expected.n_queries.tolist()
    assert heads["query_share"].iloc[0] == pytest.approx(7 / 12)


def test_attention_heads_are_scored_as_the_model_attends():
    kind = zoo.by_name("bridge-gpt2" if zoo.lacks("learned") else "learned")
    model, tokens = kind.build(torch.float64), zoo.tokens(4, 12)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    frame = describe_heads(model, lorsa, tokens, behaviours=[
        Behaviour("previous", by_position.previous, fixed_place=True)
    ])  # fmt: skip
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    pattern = cache["blocks.1.attn.hook_pattern"][:, :, 4:]
    mass = torch.stack([pattern[:, :, q - 4, q - 1] for q in range(4, 12)]).mean((0, 1))
    own = frame[frame["kind"] == "attention"]
    assert own["score"].tolist() == pytest.approx(mass.tolist())
    assert own["name"].tolist() == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert frame["attended"].tolist() == pytest.approx([mass.max().item()] * len(frame))
    assert frame[frame["kind"] == "qk"]["score"].tolist() == pytest.approx(mass.tolist())


def test_tables_are_saved_as_csv_and_json(tmp_path):
    import pandas

    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    frame = describe_heads(model, lorsa, zoo.tokens(4, 12), behaviours=["previous token"])
    csv, json = save_table(frame, tmp_path / "deep" / "table")
    assert (csv.name, json.name) == ("table.csv", "table.json")
    for again in (pandas.read_csv(csv), pandas.read_json(json)):
        assert list(again.columns) == list(frame.columns)
        assert again["score"].tolist() == pytest.approx(frame["score"].tolist(), abs=1e-6)


def test_tables_without_pandas_name_the_extra(monkeypatch):
    import sys

    from lorsa_lens.analysis.tables import table

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'lorsa-lens\[analysis\]'"):
        table({"a": [1]})


def test_what_cannot_be_scored_is_refused():
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    tokens = zoo.tokens(4, 12)
    with pytest.raises(ValueError, match=r"behaviour 'flying' is not known.*choose from previous"):
        find_heads(model, lorsa, "flying", tokens)
    with pytest.raises(ValueError, match="give one for each layer"):
        describe_heads(model, [lorsa, lorsa], tokens)
    with pytest.raises(ValueError, match="'mine' has no prompts: give tokens"):
        find_heads(model, lorsa, Behaviour("mine", by_position.previous))
    never = Behaviour("never", lambda tokens: torch.zeros(4, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="no behaviour has a source"):
        find_heads(model, lorsa, never, tokens)
    other = Behaviour.of_sources("mine", torch.zeros(3, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \[3, 12\], not \[4, 12\]"):
        find_heads(model, lorsa, other, tokens)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        describe_heads(model, lorsa, tokens)


# ------------------------------------------------------------------------------- trained heads

CYCLIC = Vocabulary(CyclicLanguage().vocab, special=frozenset([0]), bos=0)


@functools.cache
def induction_lorsa():
    """A Lorsa on the second layer of the testbed's induction model."""
    model = load_model("induction")
    lorsa = Lorsa.from_attention(model, 1, n_qk_heads=3, n_ov_heads=120, k=4)
    seen = CyclicLanguage().sample(256, seed=1).tokens
    config = TrainingConfig(
        train_batch_size_tokens=16 * 40, context_size=40, training_tokens=100 * 16 * 40
    )
    train_on({1: lorsa}, record_attention(model, seen, [1]), config, progress=False)
    return model, lorsa


def test_the_induction_model_has_induction_heads():
    model, lorsa = induction_lorsa()
    found = find_heads(model, lorsa, "induction", vocabulary=CYCLIC, n_pos=40)
    assert len(found) >= 10
    assert (found["p_value"] < 0.01).all()
    assert (found["score"] >= 0.5).all()
    assert found["strength"].is_monotonic_decreasing
    circuits = find_heads(model, lorsa, "induction", kind="qk", vocabulary=CYCLIC, n_pos=40)
    assert len(circuits) == 3
    for other in ("previous token", "duplicate token"):
        assert len(find_heads(model, lorsa, other, vocabulary=CYCLIC, n_pos=40)) == 0


def random_model(seed):
    """The induction model's network before training."""
    model = load_model("induction")
    config = NetworkConfig(
        n_layers=2, n_heads=3, d_model=64, d_head=16, n_ctx=40, d_vocab=len(CYCLIC)
    )
    weights = initial_weights(config, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model


@needs_hooked
def test_random_models_have_none():
    for seed in range(3):
        model = random_model(seed)
        lorsa = Lorsa.from_attention(model, 1, n_qk_heads=3, n_ov_heads=120, k=4)
        found = find_heads(model, lorsa, "induction", vocabulary=CYCLIC, n_pos=40)
        assert len(found) == 0


def test_the_heads_that_carry_most_come_first():
    def row(behaviour, kind, head, score, strength, p_value=0.001, attended=0.5):
        names = ("behaviour", "kind", "head", "score", "strength", "p_value", "attended")
        values = (behaviour, kind, head, score, strength, p_value, attended)
        return dict(zip(names, values, strict=True))

    frame = pd.DataFrame(
        [
            row("a", "ov", 0, 0.9, 1.0),
            row("a", "ov", 1, 0.3, 9.0),  # does other things too, but carries three times as much
            row("a", "ov", 2, 0.9, 50.0, p_value=0.5),  # chance
            row("a", "ov", 3, 0.9, 50.0, attended=0.0),  # no attention head looks there
            row("a", "ov", 4, 0.5, 1.0),
            row("a", "qk", 5, 0.9, 50.0),
            row("b", "ov", 0, 0.5, 1.0),
        ]
    )
    found = carrying_heads(frame, 2)
    assert [*zip(found["behaviour"], found["head"], strict=True)] == [("a", 1), ("a", 0), ("b", 0)]
    assert carrying_heads(frame, 1, kind="qk")["head"].tolist() == [5]
    with pytest.raises(ValueError, match="n = 0 must be positive"):
        carrying_heads(frame, 0)
