"""Training from a cache of activations on disk: the same text, no language model, no surprises."""

import shutil

import pytest
import torch
import zoo

from lorsa_lens import ConfigError
from lorsa_lens.data import (
    ActivationStream,
    CachedActivations,
    CacheError,
    cache_activations,
    contexts_for_model,
)
from lorsa_lens.training import TrainingConfig, train

TOKENS = zoo.tokens(24, 16)
SMALL = {
    "n_ov_heads": 64, "k": 4, "context_size": 16, "train_batch_size_tokens": 128,
    "training_tokens": 128 * 12, "prefetch_batches": 0, "prepend_bos": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return zoo.KINDS[0].build(torch.float32)


@pytest.fixture(scope="module")
def cache(model, tmp_path_factory):
    """A cache of both layers in shards of 8 contexts."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    contexts = contexts_for_model(model, TOKENS, 16, prepend_bos=False)
    stream = ActivationStream(model, contexts, [0, 1], batch_size=4)
    cache_activations(stream, folder, n_tokens=TOKENS.numel(), contexts_per_shard=8)
    return folder


def config(cache, **changes):
    return TrainingConfig(**{**SMALL, "cached_activations_path": str(cache), **changes})


def test_the_language_model_does_not_run(model, cache, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    few = train(model, layers=[1], config=config(cache, training_tokens=128), progress=False)
    many = train(model, layers=[1], config=config(cache, training_tokens=128 * 60), progress=False)
    batch = next(iter(CachedActivations(cache, batch_size=24)))
    x, out = batch.records[1].x, batch.records[1].out
    before, after = (
        float((lorsas[1](x) - out).detach().square().sum()) for lorsas in (few, many)
    )  # fmt: skip
    assert after < 0.8 * before


def test_a_run_from_a_cache_resumes_bit_for_bit(model, cache, tmp_path):
    cfg = config(cache, output_path=str(tmp_path / "run"), checkpoint_every=5)
    whole = train(model, TOKENS, [0, 1], cfg, progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000012")
    resumed = train(model, TOKENS, [0, 1], cfg, resume=True, progress=False)
    for layer in (0, 1):
        assert torch.equal(whole[layer].W_O, resumed[layer].W_O)
        assert torch.equal(whole[layer].W_Q, resumed[layer].W_Q)


def test_without_an_end_all_batches_are_whole(cache):
    source = CachedActivations(cache, batch_size=10, shuffle_seed=3, n_epochs=None)
    batches = [batch for _, batch in zip(range(12), source, strict=False)]
    numbers = torch.cat([batch.document[:, 0] for batch in batches]).tolist()
    assert len(numbers) == 120
    for epoch in range(5):  # 24 contexts each
        assert sorted(numbers[24 * epoch : 24 * epoch + 24]) == list(range(24))
    again = CachedActivations(cache, batch_size=10, shuffle_seed=3, n_epochs=None)
    again.load_state_dict(batches[2].state)  # in the middle of the second epoch
    assert torch.equal(next(iter(again)).tokens, batches[3].tokens)
    assert torch.equal(batches[2].tokens, TOKENS[numbers[20:30]])


def test_processes_share_what_one_would_read(cache):
    def first(n, **options):
        source = CachedActivations(cache, shuffle_seed=1, n_epochs=None, **options)
        return [batch for _, batch in zip(range(n), source, strict=False)]

    whole = first(7, batch_size=8)
    shares = [first(7, batch_size=4, rank=rank, n_ranks=2) for rank in (0, 1)]
    for one, a, b in zip(whole, *shares, strict=True):
        assert torch.equal(one.tokens, torch.cat([a.tokens, b.tokens]))
        assert a.state == b.state == one.state
    with pytest.raises(ValueError, match="rank = 2 must be from 0 to n_ranks - 1 = 1"):
        CachedActivations(cache, batch_size=4, rank=2, n_ranks=2)
    with pytest.raises(ValueError, match=r"n_epochs = 1 with n_ranks = 2: .* give n_epochs = None"):
        CachedActivations(cache, batch_size=4, rank=0, n_ranks=2)


def test_what_does_not_fit_is_refused(model, cache):
    def refused(message, *, error=CacheError, tokens=None, layers=(0,), of=model, **changes):
        with pytest.raises(error, match=message):
            train(of, tokens, list(layers), config(cache, **changes), progress=False)

    other = TOKENS.clone()
    other[0, 0] = 5 if other[0, 0] != 5 else 6
    refused("made from a tensor.*differ: give the same, or no tokens", tokens=other)
    refused("differ: give the same, or no tokens", tokens=TOKENS[:3])
    refused("differ: give the same", tokens=TOKENS, prepend_bos=True)
    refused("made with .* and the model given is", of=zoo.KINDS[1].build(torch.float32))
    refused(
        "context_size = 8, but the cache in .* has contexts of 16 tokens",
        error=ConfigError, context_size=8,
    )  # fmt: skip
    refused("holds no manifest", cached_activations_path=str(cache.parent))
    refused("tokens = None and cached_activations_path = None", error=ConfigError,
            cached_activations_path=None)  # fmt: skip


def test_a_layer_that_was_not_cached_is_refused(model, tmp_path):
    contexts = contexts_for_model(model, TOKENS, 16, prepend_bos=False)
    stream = ActivationStream(model, contexts, [1], batch_size=4)
    cache_activations(stream, tmp_path / "cache", n_tokens=64)
    with pytest.raises(CacheError, match="layer 0 is not in the cache, which has the layers 1"):
        train(model, config=config(tmp_path / "cache"), progress=False)
