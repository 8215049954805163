"""The stream gives what `record_attention` records, and its place is that of the consumer."""

import functools
import gc
import json
import subprocess
import sys
import threading
import time

import jaxtyping
import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice
from lorsa_lens.data import ActivationStream, open_documents, pack, prefetched
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import record_attention

ROWS = zoo.tokens(batch=7, pos=12)
NAMES = ["learned", "shortformer", "llama-processed", "gemma2", "bidirectional", "bert",
         "bridge-gpt2", "bridge-gpt2-processed", "bridge-llama", "bridge-mistral", "bridge-opt",
         "bridge-gptneox", "bridge-gptj", "bridge-gemma2", "bridge-native-rotary"]  # fmt: skip
kinds = pytest.mark.parametrize(
    "kind", [param for param in zoo.kind_params if param.values[0].name in NAMES]
)
both_hosts = pytest.mark.parametrize("name", ["learned", "bridge-gpt2"])


@functools.cache
def host_model(kind):
    return kind.build(torch.float32)


def any_model():
    return host_model(zoo.KINDS[0])


def contexts(rows=ROWS, **options):
    return pack(open_documents(rows), rows.shape[1], **options)


def stream(model, layers=(0, 1), rows=ROWS, *, batch_size=3, **options):
    return ActivationStream(model, contexts(rows), layers, batch_size=batch_size, **options)


def assert_equal_records(a, b):
    assert list(a) == list(b)
    for layer in a:
        for name, value in a[layer]._asdict().items():
            other = getattr(b[layer], name)
            if value is None or other is None:
                assert value is other, name
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other), name
            else:
                assert all(torch.equal(*pair) for pair in zip(value, other, strict=True)), name


def assert_equal_batches(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for name in ("tokens", "counted", "document"):
            assert torch.equal(getattr(left, name), getattr(right, name))
        assert left.state == right.state
        assert_equal_records(left.records, right.records)


# ------------------------------------------------------------------------------ what is streamed


@kinds
def test_records_are_those_of_record_attention(kind):
    model = host_model(kind)
    for layers in ([0], [1, 0]):
        batches = list(stream(model, layers))
        assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
        for batch, rows in zip(batches, ROWS.split(3), strict=True):
            assert torch.equal(batch.tokens, rows)
            assert_equal_records(batch.records, record_attention(model, rows, layers))
            assert not batch.records[0].x.requires_grad


@kinds
def test_the_model_stops_after_the_last_layer_and_is_as_it_was(kind):
    model = host_model(kind)
    n_calls = []
    handle = host_of(model).block(1).mlp.register_forward_hook(lambda *_: n_calls.append(1))

    def state():
        own = {id(m): {n for n in m.__dict__ if n[0] != "_"} for m in model.modules()}
        hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
        with torch.no_grad():
            return own, hooks, model(ROWS)

    try:
        before = state()
        n_calls.clear()
        list(stream(model, [0]))
        assert len(n_calls) == (3 if kind.name == "bert" else 0)  # HookedEncoder cannot stop
        after = state()
    finally:
        handle.remove()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@both_hosts
def test_the_model_keeps_its_precision(name):
    model = zoo.by_name(name).build(torch.bfloat16)
    (batch,) = stream(model, [1], batch_size=7)
    assert batch.records[1].x.dtype == batch.records[1].out.dtype == torch.bfloat16


def test_records_go_where_they_are_wanted():
    (batch,) = stream(any_model(), [0], batch_size=7, device="meta")
    record = batch.records[0]
    assert batch.tokens.device.type == batch.counted.device.type == "meta"
    for tensor in (record.x, record.out, record.positions, *record.input_norm):
        assert tensor.device.type == "meta"


def test_other_layers_may_be_spliced():
    model = any_model()
    source = stream(model, [1], batch_size=7)
    with splice(model, Lorsa.from_attention(model, 0, n_ov_heads=64, k=2)):
        (batch,) = source
        assert_equal_records(batch.records, record_attention(model, ROWS, [1]))
        with pytest.raises(ValueError, match="layer 0 is spliced"):
            stream(model, [0])
    source.load_state_dict(contexts().state_dict())
    spliced = splice(model, Lorsa.from_attention(model, 1))
    with spliced, pytest.raises(ValueError, match="layer 1 is spliced"):
        next(iter(source))


@both_hosts
def test_no_counted_position_sees_padding(name):
    """A document alone in its context is what it is with anything after it."""
    model = host_model(zoo.by_name(name))
    documents = [ROWS[0, :5].tolist(), ROWS[1, :9].tolist()]
    packed = pack(open_documents(documents), 12, bos_token_id=zoo.BOS, respect_documents=True)
    (batch,) = ActivationStream(model, packed, [1], batch_size=2)
    assert batch.counted.sum(1).tolist() == [5, 9]
    for row, ids in enumerate(documents):
        alone = record_attention(model, torch.tensor([[zoo.BOS, *ids]]), [1])[1]
        for field in ("x", "out"):
            padded = getattr(batch.records[1], field)[row, : len(ids) + 1]
            torch.testing.assert_close(padded, getattr(alone, field)[0], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- place in data


@both_hosts
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resumed_after_every_batch_it_goes_on_with_the_next(name, prefetch):
    model = host_model(zoo.by_name(name))
    source = stream(model, [1], batch_size=2, prefetch=prefetch)
    states, batches = [source.state_dict()], []
    for batch in source:
        assert source.state_dict() == batch.state
        states.append(source.state_dict())
        batches.append(batch)
    assert len(batches) == 4
    assert [s["n_contexts"] for s in states] == [0, 2, 4, 6, 7]
    for n, state in enumerate(states):
        other = stream(model, [1], batch_size=2, prefetch=4 - prefetch)
        other.load_state_dict(json.loads(json.dumps(state)))
        assert_equal_batches(other, batches[n:])
    assert list(source) == []  # at the end, it stays there
    source.load_state_dict(states[2])
    assert_equal_batches(source, batches[2:])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_iteration_broken_off_goes_on_after_the_last_batch_given(prefetch):
    model = any_model()
    whole = list(stream(model, batch_size=1))
    source = stream(model, batch_size=1, prefetch=prefetch)
    got = []
    for n_more in (1, 3, 10):
        for n, batch in enumerate(source, 1):
            got.append(batch)
            if n == n_more:
                break
    assert_equal_batches(got, whole)


def test_a_shuffling_buffer_is_part_of_the_place():
    model = any_model()

    def make(prefetch):
        shuffled = contexts().shuffled(4, seed=1)
        return ActivationStream(model, shuffled, [0], batch_size=3, prefetch=prefetch)

    whole = list(make(0))
    tokens = torch.cat([batch.tokens for batch in whole])
    assert sorted(tokens.tolist()) == sorted(ROWS.tolist())
    assert tokens.tolist() != ROWS.tolist()
    assert_equal_batches(make(2), whole)
    for n, batch in enumerate(whole, 1):
        other = make(2)
        other.load_state_dict(batch.state)
        assert_equal_batches(other, whole[n:])


def test_one_iteration_at_a_time():
    source = stream(any_model(), batch_size=2)
    iterator = iter(source)
    next(iterator)
    with pytest.raises(RuntimeError, match="the stream is being iterated over"):
        iter(source)
    with pytest.raises(RuntimeError, match="the stream is being iterated over"):
        source.load_state_dict(source.state_dict())
    iterator.close()
    assert len(list(source)) == 3


# ------------------------------------------------------------------------------------- prefetch


@both_hosts
def test_prefetching_changes_nothing(name):
    model = host_model(zoo.by_name(name))
    expected = list(stream(model))
    for prefetch in (1, 2, 9):
        batches = list(stream(model, prefetch=prefetch))
        assert_equal_batches(batches, expected)
        assert not batches[0].records[0].x.requires_grad


def n_threads():
    return sum(thread.name.startswith("Thread-") for thread in threading.enumerate())


def test_an_exception_of_the_producer_comes_after_what_was_made_before():
    rows = ROWS.clone()
    rows[4, 3] = 99
    source = stream(any_model(), rows=rows, batch_size=2, prefetch=3)
    before, got = n_threads(), []
    with pytest.raises(ValueError, match=r"document 4 has the id 99, but .* ids from 0 to 63"):
        got.extend(source)
    assert [batch.tokens.tolist() for batch in got] == [ROWS[:2].tolist(), ROWS[2:4].tolist()]
    assert source.state_dict()["n_contexts"] == 4
    assert n_threads() == before


def test_no_more_is_made_than_asked_for_and_the_thread_ends():
    made, before = [], n_threads()

    def numbers():
        for i in range(100):
            made.append(i)
            yield i

    items = prefetched(numbers, 3)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]  # one given, three ready, one in hand
    assert n_threads() == before + 1
    del items  # nobody closes it
    gc.collect()
    assert n_threads() == before
    assert list(prefetched(lambda: range(5), 2)) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda: [1 // 0], 2))
    with pytest.raises(ValueError, match="depth = 0 must be positive"):
        prefetched(numbers, 0)


def test_the_iterable_is_closed_when_the_consumer_is():
    closed = threading.Event()

    def numbers():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = prefetched(numbers, 1)
    next(items)
    items.close()
    assert closed.is_set()


def test_the_interpreter_ends_while_a_batch_is_being_made():
    code = """
import sys, time, torch
from lorsa_lens.data import prefetched
def numbers():
    while True:
        yield torch.randn(200, 200) @ torch.randn(200, 200)
items = prefetched(numbers, 2)
next(items)
print("done")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (out.returncode, out.stdout, out.stderr) == (0, "done\n", "")


def test_a_pause_keeps_the_thread_from_the_model():
    model = host_model(zoo.KINDS[0])
    in_forward = []
    handle = host_of(model).block(0).register_forward_hook(lambda *_: in_forward.append(1))
    try:
        source = stream(model, batch_size=1, prefetch=1)
        iterator = iter(source)
        next(iterator)
        with source.paused():
            n_calls = len(in_forward)
            with splice(model, Lorsa.from_attention(model, 0)):
                time.sleep(0.2)
            assert len(in_forward) == n_calls
        assert len(list(iterator)) == 6
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_streamed_is_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = any_model()
    cases = [
        (dict(layers=[]), "layers is empty"),
        (dict(layers=[0, 2]), "layer = 2, but the model has layers 0 to 1"),
        (dict(layers=[0, 0]), r"layers = \[0, 0\] names a layer twice"),
        (dict(batch_size=0), "batch_size = 0 must be positive"),
        (dict(prefetch=-1), "prefetch = -1 must not be negative"),
        (dict(rows=zoo.tokens(2, 65)), "context_size = 65, but the model takes 64 positions"),
    ]
    for option, message in cases:
        with pytest.raises(ValueError, match=message):
            stream(model, **option)
    with pytest.raises(TypeError, match="model is a Linear"):
        stream(torch.nn.Linear(2, 2))


def test_another_vocabulary_is_refused():
    rows = ROWS.clone()
    rows[1, 2] = 64
    source = stream(any_model(), rows=rows, batch_size=7)
    with pytest.raises(ValueError, match="document 1 has the id 64, but the vocabulary has"):
        next(iter(source))
    with pytest.raises(ValueError, match="bos_token_id = 100, but the vocabulary"):
        ActivationStream(any_model(), contexts(bos_token_id=100), [0], batch_size=2)


@pytest.mark.parametrize("name", ["bidirectional", "bert", "bridge-native-bidirectional"])
def test_padding_before_bidirectional_attention_is_refused(name):
    model = host_model(zoo.by_name(name))
    with pytest.raises(ValueError, match="attention of layer 1 is bidirectional and would see the"):
        ActivationStream(model, contexts(respect_documents=True), [1], batch_size=2)
