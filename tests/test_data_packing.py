"""Contexts against hand counts; every token once, in order; resumed at every place."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens.data import TokenBatch, open_documents, pack

BOS, EOS = 1, 2
CORPUS = [[5, 6, 7], [], [8, 9, 10, 11, 12], [13]]


def contexts(corpus=CORPUS, context_size=4, **options):
    return pack(open_documents(corpus), context_size, **options)


def listed(packed):
    return [tuple(part.tolist() for part in context) for context in packed]


def tokens(packed):
    return [context.tokens.tolist() for context in packed]


# --------------------------------------------------------------------------------- by hand


def test_documents_follow_one_another():
    assert listed(contexts()) == [
        ([5, 6, 7, 8], [True] * 4, [0, 0, 0, 2]),
        ([9, 10, 11, 12], [True] * 4, [2, 2, 2, 2]),
    ]  # 13 fills no context


def test_with_bos_and_separators():
    packed = contexts(context_size=5, bos_token_id=BOS, separator_token_id=EOS)
    assert listed(packed) == [
        ([1, 5, 6, 7, 2], [False, True, True, True, False], [0, 0, 0, 0, 2]),
        ([1, 8, 9, 10, 11], [False, True, True, True, True], [2] * 5),
    ]  # 1 12 2 13 fills no context


def test_one_document_per_context():
    packed = contexts(bos_token_id=BOS, respect_documents=True)
    assert packed.padded
    assert listed(packed) == [
        ([1, 5, 6, 7], [False, True, True, True], [0, 0, 0, 0]),
        ([1, 8, 9, 10], [False, True, True, True], [2, 2, 2, 2]),
        ([1, 11, 12, 1], [False, True, True, False], [2, 2, 2, -1]),
        ([1, 13, 1, 1], [False, True, False, False], [3, 3, -1, -1]),
    ]


def test_no_second_bos_or_separator():
    corpus = [[BOS, 5, 6], [BOS, 7, 8, 9, 10, BOS, 11]]
    packed = contexts(corpus, bos_token_id=BOS, separator_token_id=BOS)
    # the second document's own BOS closes the first context
    assert tokens(packed) == [[1, 5, 6, 1], [1, 7, 8, 9], [1, 10, 1, 11]]
    packed = contexts(corpus, 5, bos_token_id=BOS, separator_token_id=BOS)
    assert tokens(packed) == [[1, 5, 6, 1, 7], [1, 8, 9, 10, 1]]
    packed = contexts(corpus, bos_token_id=BOS, respect_documents=True)
    assert tokens(packed) == [[1, 5, 6, 1], [1, 7, 8, 9], [1, 10, 1, 11]]


def test_special_tokens_are_there_and_do_not_count():
    corpus = [[BOS, 5, EOS, 6, 3, 7]]
    packed = contexts(corpus, 3, special_token_ids=[EOS, 3])
    assert listed(packed) == [
        ([1, 5, 2], [True, True, False], [0, 0, 0]),
        ([6, 3, 7], [True, False, True], [0, 0, 0]),
    ]
    packed = contexts(corpus, 3, bos_token_id=BOS, special_token_ids=[EOS])
    assert [context.counted.tolist() for context in packed] == [
        [False, True, False],
        [False, True, True],  # 1 6 3: 3 was not said to be special; 7 fills no context
    ]


def test_a_very_long_document_goes_on(tmp_path):
    np.save(tmp_path / "long.npy", np.arange(4, 1004, dtype=np.uint16))
    packed = pack(open_documents(tmp_path / "long.npy"), 100)
    assert tokens(packed) == [list(range(4 + 100 * i, 104 + 100 * i)) for i in range(10)]
    packed = pack(open_documents(tmp_path / "long.npy"), 100, bos_token_id=BOS)
    assert tokens(packed)[1] == [1, *range(103, 202)]


def test_epochs_follow_one_another_without_a_break():
    assert tokens(contexts(n_epochs=2)) == [
        [5, 6, 7, 8],
        [9, 10, 11, 12],
        [13, 5, 6, 7],
        [8, 9, 10, 11],  # 12 13 fill no context
    ]
    endless = contexts(n_epochs=None)
    flat = [t for _ in range(9) for t in next(endless).tokens.tolist()]
    assert flat == (4 * [5, 6, 7, 8, 9, 10, 11, 12, 13])


def test_few_tokens_and_several_epochs_make_a_context():
    assert tokens(contexts([[5, 6, 7]], 8, n_epochs=3)) == [[5, 6, 7, 5, 6, 7, 5, 6]]


def test_shuffled_documents_change_their_order_each_epoch():
    rows = torch.arange(4, 36)[:, None]
    packed = pack(open_documents(rows, shuffle_seed=0), 32, n_epochs=2)
    first, second = packed
    assert sorted(first.tokens) == sorted(second.tokens) == list(range(4, 36))
    assert first.tokens.tolist() != second.tokens.tolist()
    assert (first.document == first.tokens - 4).all()  # the number in the source


def test_batches():
    packed = contexts([list(range(4, 17))], 2)
    batch = packed.next_batch(4)
    assert isinstance(batch, TokenBatch)
    assert batch.tokens.tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert batch.tokens.dtype == batch.document.dtype == torch.int64
    assert batch.counted.dtype == torch.bool
    assert packed.next_batch(4).tokens.tolist() == [[12, 13], [14, 15]]
    assert packed.next_batch(4) is None


# ------------------------------------------------------------------------------ every token once

corpora = st.lists(st.lists(st.integers(4, 40), max_size=12), min_size=1, max_size=8)
options = st.fixed_dictionaries(
    {
        "context_size": st.integers(2, 9),
        "bos_token_id": st.sampled_from([None, BOS]),
        "n_epochs": st.integers(1, 2),
    },
    optional={"separator_token_id": st.just(EOS), "respect_documents": st.just(True)},
).filter(lambda o: len(o) < 5)


def contexts_or_none(corpus, option):
    """All contexts, and none where there are too few tokens."""
    try:
        return listed(contexts(corpus, **option))
    except ValueError as error:
        if "too few tokens" not in str(error):
            raise
        return []


@settings(max_examples=300, deadline=None)
@given(corpora, options)
def test_every_token_appears_exactly_once_in_order(corpus, option):
    packed = contexts_or_none(corpus, option)
    pairs = [
        (number, token)
        for row, _, document in packed
        for token, number in zip(row, document, strict=True)
        if token >= 4
    ]
    every = [(i, t) for i, ids in enumerate(corpus) for t in ids] * option["n_epochs"]
    n_lost = len(every) - len(pairs)
    assert pairs == every[: len(pairs)]
    assert 0 <= n_lost < option["context_size"]
    if option.get("respect_documents"):
        assert n_lost == 0
    for row, counted, document in packed:
        assert counted == [t >= 4 for t in row]
        assert option["bos_token_id"] in (None, row[0])
        assert row.count(BOS) - document.count(-1) <= 1
        if option.get("respect_documents"):
            assert len(set(document) - {-1}) == 1
        elif "separator_token_id" in option:  # a new document starts with one, but at the beginning
            starts = [i for i in range(1, len(row)) if document[i] != document[i - 1]]
            assert all(row[i] == EOS for i in starts)
        assert option.get("respect_documents") or -1 not in document


@settings(max_examples=100, deadline=None)
@given(corpora, options, st.sampled_from([None, 1, 3]))
def test_resumed_at_every_place_it_goes_on_with_the_next_context(corpus, option, buffer_size):
    if not contexts_or_none(corpus, option):
        return

    def make():
        packed = contexts(corpus, **option)
        return packed if buffer_size is None else packed.shuffled(buffer_size, seed=3)

    whole, states, packed = [], [], make()
    states.append(packed.state_dict())
    for context in packed:
        whole.append(tuple(part.tolist() for part in context))
        states.append(packed.state_dict())
    again = make()
    for n, state in reversed(list(enumerate(states))):
        other = make()
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.state_dict() == state
        assert listed(other) == whole[n:]
        again.load_state_dict(state)  # one that has been elsewhere
        assert listed(again) == whole[n:]


def test_reading_tokenizes_nothing_that_was_read_before_the_place(tmp_path):
    calls = []

    def tokenizer(text):
        calls.append(text)
        return [int(text)] * 3

    (tmp_path / "a.txt").write_text(",".join(map(str, range(4, 24))))
    packed = pack(open_documents(tmp_path / "a.txt", tokenizer=tokenizer, separator=","), 6)
    for _ in range(5):
        next(packed)
    state = packed.state_dict()
    assert {k: v for k, v in state.items() if k != "settings"} == {
        "epoch": 0, "document": 10, "offset": 0, "n_contexts": 5,
    }  # fmt: skip
    calls.clear()
    packed.load_state_dict(state)
    assert next(packed).tokens.tolist() == [14, 14, 14, 15, 15, 15]
    assert calls == ["14", "15"]


# ------------------------------------------------------------------------------- shuffled contexts


def test_shuffled_within_stretches():
    rows = [[i] for i in range(4, 14)]
    plain = tokens(contexts(rows, 1))
    packed = contexts(rows, 1).shuffled(4, seed=0)
    got = tokens(packed)
    for first in (0, 4, 8):
        assert sorted(got[first : first + 4]) == plain[first : first + 4]
    assert got != plain
    assert [t for (t,) in got[4:8]] != [t + 4 for (t,) in got[:4]]  # each in an order of its own
    assert tokens(contexts(rows, 1).shuffled(4, seed=0)) == got
    assert tokens(contexts(rows, 1).shuffled(4, seed=1)) != got
    assert tokens(contexts(rows, 1).shuffled(1, seed=0)) == plain
    assert packed.description.endswith("shuffled within 4, seed 0")


# ------------------------------------------------------------------------------------- refusals


def test_too_few_tokens_say_what_was_given():
    message = (
        r"^too few tokens for one context of 4: a list of 3 documents has 3 documents, 1 of them "
        r"empty, with 3 tokens together$"
    )
    with pytest.raises(ValueError, match=message):
        next(contexts([[5], [], [6, 7]]))
    with pytest.raises(ValueError, match="has 2 documents, 2 of them empty, with 0 tokens"):
        next(contexts([[], []], n_epochs=None))
    with pytest.raises(ValueError, match="has 0 documents"):
        next(contexts([], respect_documents=True, n_epochs=None))
    with pytest.raises(ValueError, match="too few tokens"):
        list(contexts([[]], bos_token_id=BOS).shuffled(2, 0))


def test_ids_outside_the_vocabulary_name_document_and_id():
    packed = contexts([[5, 6, 7, 8], [5, 70, 6, 7], [5] * 8], d_vocab=64)
    assert next(packed).tokens.tolist() == [5, 6, 7, 8]
    message = (
        r"document 1 has the id 70, but the vocabulary has the ids from 0 to 63: it was made with "
        r"another tokenizer, or for another model \(a list of 3 documents\)"
    )
    for _ in range(2):  # and again, if one tries again
        with pytest.raises(ValueError, match=message):
            next(packed)
    with pytest.raises(ValueError, match=r"document 0 has the id -1, but .* the ids from 0:"):
        next(contexts([[4, -1, 4, 4]]))
    packed = contexts([[5, 6, 63, 7]], d_vocab=100)
    packed.limit_vocabulary(63)
    packed.limit_vocabulary(200)  # the lowest limit holds
    with pytest.raises(ValueError, match="the id 63, but the vocabulary has the ids from 0 to 62"):
        next(packed)
    with pytest.raises(ValueError, match="bos_token_id = 64, but the vocabulary has the ids 0 to"):
        contexts(bos_token_id=64, d_vocab=64)


def test_numbers_out_of_range():
    cases = [
        (dict(context_size=0), "context_size = 0 must be at least 1"),
        (dict(context_size=1, bos_token_id=1), "must be at least 2 to hold more than the BOS"),
        (dict(n_epochs=0), "n_epochs = 0 must be positive, or None"),
        (dict(respect_documents=True, separator_token_id=2), "means nothing with respect_docum"),
    ]
    for option, message in cases:
        with pytest.raises(ValueError, match=message):
            contexts(**option)
    with pytest.raises(ValueError, match="buffer_size = 0 must be positive"):
        contexts().shuffled(0, 0)
    with pytest.raises(ValueError, match="seed = -1 must not be negative"):
        contexts().shuffled(1, -1)


def test_a_state_of_other_contexts_is_refused():
    state = contexts(bos_token_id=BOS).state_dict()
    with pytest.raises(ValueError, match=r"made with bos_token_id = 1, .* bos_token_id = None"):
        contexts().load_state_dict(state)
    with pytest.raises(ValueError, match=r"made with context_size = 4, .* with context_size = 8"):
        contexts(context_size=8, bos_token_id=BOS).load_state_dict(state)
    shuffled = contexts().shuffled(2, seed=1)
    with pytest.raises(ValueError, match=r"shuffled with seed = 1, and these are .* seed = 2"):
        contexts().shuffled(2, seed=2).load_state_dict(shuffled.state_dict())
    with pytest.raises(ValueError, match="shuffled with buffer_size = None"):
        shuffled.load_state_dict(contexts().state_dict())
