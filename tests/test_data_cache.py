"""Activations from disk are those of the model; what is broken or foreign is refused."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import zoo
from test_data_activations import assert_equal_records, contexts, stream

from lorsa_lens.data import (
    ActivationStream,
    CachedActivations,
    CacheError,
    cache_activations,
    cache_size,
    fingerprint,
)
from lorsa_lens.recording import record_attention

ROWS = zoo.tokens(batch=11, pos=8)
NAMES = ["learned", "shortformer", "gemma2", "bridge-gpt2", "bridge-llama", "bridge-gemma2"]
kinds = pytest.mark.parametrize(
    "kind", [param for param in zoo.kind_params if param.values[0].name in NAMES]
)


@functools.cache
def host_model(kind):
    return kind.build(torch.float32)


def any_model():
    return host_model(zoo.KINDS[0])


def cached(folder, model=None, *, layers=(0, 1), n_tokens=88, per_shard=4, **options):
    """A cache of `ROWS` in shards of 4, 4 and 3."""
    source = stream(any_model() if model is None else model, layers, ROWS, batch_size=2)
    return cache_activations(
        source, folder, n_tokens=n_tokens, contexts_per_shard=per_shard, **options
    )


@pytest.fixture
def folder(tmp_path):
    cached(tmp_path / "cache")
    return tmp_path / "cache"


def read(folder, *args, batch_size=3, **options):
    return list(CachedActivations(folder, *args, batch_size=batch_size, **options))


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


# ------------------------------------------------------------------------------- what comes back


@kinds
def test_what_is_read_is_what_was_recorded(kind, tmp_path):
    model = host_model(kind)
    size = cached(tmp_path / "cache", model, layers=[1, 0])
    assert (size.n_contexts, size.n_tokens) == (11, 88)
    whole = record_attention(model, ROWS, [1, 0], batch_size=2)
    batches = read(tmp_path / "cache", model)
    assert [len(batch.tokens) for batch in batches] == [3, 3, 3, 2]
    for n, batch in enumerate(batches):
        rows = slice(3 * n, 3 * n + 3)
        assert torch.equal(batch.tokens, ROWS[rows])
        assert batch.counted.all()
        assert torch.equal(batch.document[:, 0], torch.arange(11)[rows])
        expected = {layer: record.batch(rows) for layer, record in whole.items()}
        assert_equal_records(batch.records, expected)


@kinds
def test_the_disk_it_takes_is_stated_before(kind, tmp_path):
    model = host_model(kind)
    source = stream(model, [1, 0], ROWS, batch_size=2)
    stated = cache_size(source, n_tokens=81)
    written = cache_activations(source, tmp_path, n_tokens=81)
    assert written.n_contexts == stated.n_contexts == 11
    n_bytes = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert n_bytes == written.n_bytes <= stated.n_bytes <= 1.2 * n_bytes
    half = cache_size(source, n_tokens=81, dtype=torch.bfloat16)
    assert half.n_bytes < 0.6 * stated.n_bytes


def test_special_tokens_and_padding_come_back(tmp_path):
    packed = contexts(ROWS[:, :5], bos_token_id=zoo.BOS, respect_documents=True)
    source = ActivationStream(any_model(), packed, [0], batch_size=2)
    start = source.state_dict()
    cache_activations(source, tmp_path, n_tokens=50)
    (batch,) = read(tmp_path, batch_size=10)
    source.load_state_dict(start)
    expected = list(source)[:5]
    for name in ("tokens", "counted", "document"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(b, name) for b in expected]))
    assert batch.counted[:2].tolist() == [[False] + [True] * 4, [False, True] + [False] * 3]
    assert batch.document[1].tolist() == [0, 0, -1, -1, -1]


def test_some_layers_in_a_smaller_precision(tmp_path):
    cached(tmp_path / "cache", dtype=torch.bfloat16)
    whole = record_attention(any_model(), ROWS, [1])[1]
    (batch,) = read(tmp_path / "cache", layers=[1], batch_size=11)
    assert list(batch.records) == [1]
    assert torch.equal(batch.records[1].x, whole.x.bfloat16())
    assert torch.equal(batch.records[1].out, whole.out.bfloat16())
    assert batch.records[1].input_norm.gain.dtype == torch.float32


def test_the_manifest_says_what_it_was_made_from(folder):
    said = manifest(folder)
    assert said["complete"] is True
    assert said["fingerprint"] == fingerprint(any_model())
    assert said["layers"] == [0, 1]
    assert said["sites"] == {"0": ["x", "out"], "1": ["x", "out"]}
    assert (said["d_model"], said["context_size"], said["dtype"]) == (32, 8, "float32")
    assert said["source"].startswith("a tensor, [11, 8] int64; context_size 8")
    assert "torch" in said["versions"]
    assert [shard["n_contexts"] for shard in said["shards"]] == [4, 4, 3]
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]  # fmt: skip


def test_files_are_mapped_and_not_read(folder):
    source = CachedActivations(folder, batch_size=2)
    next(iter(source))
    assert list(source._open) == [0]  # the other shards are not even opened
    (shard,) = source._open.values()
    before = shard.records[0].x.clone()
    batch = next(iter(CachedActivations(folder, batch_size=2)))
    batch.records[0].x.zero_()  # a copy: the file is as it was
    assert torch.equal(shard.records[0].x, before)


# ------------------------------------------------------------------------------ order and place


def test_a_shuffled_order_goes_through_all_sequences_each_epoch(folder):
    orders = {}
    for seed in (0, 1):
        batches = read(folder, shuffle_seed=seed, n_epochs=2)
        assert [len(batch.tokens) for batch in batches] == [3, 3, 3, 2] * 2
        whole = record_attention(any_model(), ROWS, [0], batch_size=2)[0]
        for epoch in (0, 1):
            numbers = torch.cat([b.document[:, 0] for b in batches[4 * epoch : 4 * epoch + 4]])
            assert sorted(numbers.tolist()) == list(range(11))
            orders[seed, epoch] = tuple(numbers.tolist())
        for batch in batches:
            numbers = batch.document[:, 0]
            assert torch.equal(batch.tokens, ROWS[numbers])
            assert torch.equal(batch.records[0].x, whole.x[numbers])
            assert torch.equal(batch.records[0].out, whole.out[numbers])
    assert len(set(orders.values())) == 4


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("seed", [None, 5])
def test_resumed_after_every_batch_it_goes_on_with_the_next_one(folder, seed, prefetch):
    def make():
        return CachedActivations(
            folder, batch_size=4, shuffle_seed=seed, n_epochs=2, prefetch=prefetch
        )

    source = make()
    states, tokens = [source.state_dict()], []
    for batch in source:
        assert batch.state == source.state_dict()
        states.append(source.state_dict())
        tokens.append(batch.tokens.tolist())
    assert len(tokens) == 6
    for n, state in enumerate(states):
        other = make()
        other.load_state_dict(json.loads(json.dumps(state)))
        assert [batch.tokens.tolist() for batch in other] == tokens[n:]
    broken_off = make()
    assert next(iter(broken_off)).tokens.tolist() == tokens[0]
    assert next(iter(broken_off)).tokens.tolist() == tokens[1]
    with pytest.raises(ValueError, match=r"read with shuffle_seed = .*, and here it is 7"):
        CachedActivations(folder, batch_size=4, shuffle_seed=7).load_state_dict(states[0])


# ---------------------------------------------------------------------------------- interrupted


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_data_cache import cached
from lorsa_lens.io import atomic
real, n_replaced = os.replace, 0
def replace(*paths):
    global n_replaced
    n_replaced += 1
    if {before} and n_replaced == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
    if n_replaced == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
atomic.os.replace = replace
cached({folder!r})
"""


# Files are put in place in this order: the manifest, shard 0, the manifest, shard 1, ...
@pytest.mark.parametrize(("at", "before", "n_shards"), [(4, True, 1), (4, False, 1), (5, False, 2)])
def test_a_write_that_was_killed_is_refused_and_can_be_finished(tmp_path, at, before, n_shards):
    folder, here = tmp_path / "cache", Path(__file__).parent
    path = [str(here), str(here.parent), *filter(None, sys.path)]
    code = KILLED.format(path=path, before=before, at=at, folder=str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, env=environment
    )
    assert out.returncode == -signal.SIGKILL, out.stderr.decode()
    message = f"was interrupted after {4 * n_shards} of 11 contexts: finish it with"
    with pytest.raises(CacheError, match=message):
        CachedActivations(folder, batch_size=2)
    with pytest.raises(ValueError, match="is not empty: give a new one, or resume=True"):
        cached(folder)
    with pytest.raises(CacheError, match="begun for 11 contexts, and this is for 10"):
        cached(folder, n_tokens=80, resume=True)
    assert cached(folder, resume=True).n_contexts == 11
    cached(tmp_path / "whole")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_exception_leaves_what_can_be_finished(tmp_path):
    source = stream(any_model(), [0], torch.cat([ROWS, torch.full((1, 8), 99)]), batch_size=2)
    with pytest.raises(ValueError, match="document 11 has the id 99"):
        cache_activations(source, tmp_path, n_tokens=96, contexts_per_shard=2)
    with pytest.raises(CacheError, match="was interrupted after 10 of 12 contexts"):
        CachedActivations(tmp_path, batch_size=2)


def test_resuming_what_is_complete_or_another_cache(folder, tmp_path):
    before = manifest(folder)
    assert cached(folder, resume=True).n_contexts == 11
    assert manifest(folder) == before
    with pytest.raises(CacheError, match=r"begun with layers = \[0, 1\], and this is \[0\]"):
        cached(folder, layers=[0], resume=True)
    with pytest.raises(CacheError, match="begun with dtype = float32, and this is bfloat16"):
        cached(folder, dtype=torch.bfloat16, resume=True)
    with pytest.raises(CacheError, match=r"holds no manifest\.json: it is no cache"):
        cached(tmp_path / "nothing", resume=True)


# ------------------------------------------------------------------------------------- refusals


def test_a_folder_with_something_in_it_is_not_touched(folder, tmp_path):
    with pytest.raises(ValueError, match="cache is not empty"):
        cached(folder)
    (tmp_path / "file").write_text("kept")
    for where in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is not empty"):
            cached(where)
    assert (tmp_path / "file").read_text() == "kept"


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 12_345))
    # 11 contexts of 8 positions: x and out of 2 layers, 32 wide, in float32, and 17 bytes for
    # token, document and `counted`; a shard has 2 masks, positions and norms, and a header
    assert 11 * 8 * (4 * 32 * 4 + 17) + 2 * (8 * (8 + 8) + 8 * 32) + 4096 == 51_416
    message = r"the cache takes 51\.4 kB, and .* has 12\.3 kB left: choose fewer tokens or layers"
    with pytest.raises(ValueError, match=message):
        cached(tmp_path / "a" / "b", per_shard=12)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_is_not_silent(tmp_path):
    with pytest.warns(UserWarning, match="has only 88 of the 800 tokens asked for: the cache in"):
        size = cached(tmp_path / "cache", n_tokens=800)
    assert (size.n_contexts, size.n_tokens) == (11, 88)
    assert manifest(tmp_path / "cache")["n_contexts"] == 11
    assert len(CachedActivations(tmp_path / "cache", batch_size=2)) == 11


def test_exactly_the_contexts_asked_for(tmp_path):
    assert cached(tmp_path / "cache", n_tokens=50).n_contexts == 7
    batches = read(tmp_path / "cache", batch_size=20)
    assert torch.equal(batches[0].tokens, ROWS[:7])


def test_another_model_is_refused(folder):
    read(folder, any_model())
    other = zoo.KINDS[0].build(torch.float32)
    read(folder, other)  # the same weights
    parameter = list(other.parameters())[3]
    with torch.no_grad():
        parameter.flatten()[0] += 1e-4
    message = r"the cache was made with .* \(weights [0-9a-f]{16}\), and the model given is"
    with pytest.raises(CacheError, match=message):
        CachedActivations(folder, other, batch_size=2)
    with pytest.raises(CacheError, match=message):
        cached(folder, other, resume=True)
    with pytest.raises(CacheError, match=message):
        CachedActivations(folder, zoo.KINDS[0].build(torch.bfloat16), batch_size=2)


def test_a_fingerprint_changes_with_every_parameter():
    model = zoo.KINDS[0].build(torch.float32)
    seen = {fingerprint(model)}
    n_parameters = 0
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.01)
        seen.add(fingerprint(model))
        n_parameters += 1
    assert len(seen) == 1 + n_parameters


def test_damage_is_found(folder):
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors has \d+ bytes, and the manif"):
        CachedActivations(folder, batch_size=2)
    shard.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is damaged"):
        read(folder)
    shard.unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is missing"):
        CachedActivations(folder, batch_size=2)
    shard.write_bytes(whole)
    read(folder)
    said = manifest(folder)
    for damaged, message in [
        ("{", r"manifest\.json is damaged: JSONDecodeError"),
        ("[]", r"manifest\.json is damaged: TypeError"),
        (json.dumps({**said, "format_version": 2}), r"has format version 2, and this .* reads 1"),
        (json.dumps({k: v for k, v in said.items() if k != "layers"}), "damaged: TypeError"),
        (json.dumps({**said, "shards": []}), "is empty"),
    ]:
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(CacheError, match=message):
            CachedActivations(folder, batch_size=2)


def test_what_cannot_be_read_is_named(folder, tmp_path):
    with pytest.raises(CacheError, match="layer 3 is not in the cache, which has the layers 0, 1"):
        CachedActivations(folder, layers=[0, 3], batch_size=2)
    with pytest.raises(CacheError, match=r"holds no manifest\.json"):
        CachedActivations(tmp_path / "nothing", batch_size=2)
    for option, message in [
        (dict(batch_size=0), "batch_size = 0 must be positive"),
        (dict(batch_size=2, n_epochs=0), "n_epochs = 0 must be positive"),
        (dict(batch_size=2, shuffle_seed=-1), "shuffle_seed = -1 must not be negative"),
        (dict(batch_size=2, prefetch=-1), "prefetch = -1 must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            CachedActivations(folder, **option)
    with pytest.raises(ValueError, match="n_tokens = 0 must be positive"):
        cached(tmp_path / "new", n_tokens=0)
    with pytest.raises(ValueError, match="contexts_per_shard = 0 must be positive"):
        cached(tmp_path / "new", per_shard=0)
