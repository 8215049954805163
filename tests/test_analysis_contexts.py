"""A pass over a corpus, against the whole of it held in memory."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import zoo

from lorsa_lens import Lorsa
from lorsa_lens.analysis.contexts import ContextStore, collect_contexts
from lorsa_lens.analysis.contexts.kept import NO_CONTEXT, Kept
from lorsa_lens.recording import record_attention

N_POS = 8


def setting(dtype=torch.float32):
    """A model without a tokenizer: contexts are the sequences as they are."""
    model = zoo.KINDS[0].build(dtype)
    model.tokenizer = None
    lorsas = [Lorsa.from_attention(model, layer, n_ov_heads=16, k=3) for layer in (0, 1)]
    return model, lorsas, zoo.tokens(21, N_POS)


def collect(path, tokens, *, batch_size=4, **options):
    model, lorsas, _ = setting()
    sizes = {"context_size": N_POS, "n_top": 3, "n_sampled": 5, "progress": False}
    return collect_contexts(
        model, lorsas, tokens, path, batch_size=batch_size, **{**sizes, **options}
    )


@pytest.fixture(scope="module")
def whole():
    """Everything a pass should find, from one dense tensor per layer."""
    model, lorsas, tokens = setting()
    found = {}
    for lorsa in lorsas:
        layer = lorsa.cfg.layer
        part = record_attention(model, tokens, [layer])[layer].seen_by(lorsa)
        with torch.no_grad():
            code = lorsa.encode(part.x, **part.context)
            z = lorsa.z_pattern(part.x, range(16), **part.context)
        acts = torch.zeros(*tokens.shape, 16).scatter_(-1, code.indices, code.values)
        found[layer] = acts, z
    return found


def test_statistics_of_every_head(tmp_path, whole):
    _, lorsas, tokens = setting()
    with collect(tmp_path / "heads.sqlite", tokens) as store:
        frame = store.table()
        assert len(frame) == 32
        for lorsa in lorsas:
            layer = lorsa.cfg.layer
            acts, z = whole[layer]
            norms = lorsa.W_O.detach().norm(dim=-1)
            assert (acts != 0).any((0, 1)).sum() > 8  # of the others there are no means
            distance = torch.arange(N_POS)[:, None] - torch.arange(N_POS)
            for head in range(16):
                found = store.head(layer, head)
                active = acts[..., head] != 0
                assert found.density == pytest.approx(active.double().mean().item())
                assert found.n_active == int(active.sum())
                assert found.max_activation == pytest.approx(acts[..., head].abs().max().item())
                if not active.any():
                    assert math.isnan(found.mean_offset)
                    assert math.isnan(found.first_token)
                    assert found.mean_energy == 0
                    continue
                size = z[:, head].abs() * active[..., None]
                expected = (size * distance).sum() / size.sum()
                assert found.mean_offset == pytest.approx(expected.item(), rel=1e-4)
                first = size[..., 0].sum() / size.sum()
                assert found.first_token == pytest.approx(first.item(), rel=1e-4)
                energy = (acts[..., head][active] * norms[head]).square().mean()
                assert found.mean_energy == pytest.approx(energy.item(), rel=1e-4)


def test_top_contexts_with_their_z_patterns(tmp_path, whole):
    _, _, tokens = setting()
    with collect(tmp_path / "heads.sqlite", tokens) as store:
        for layer in (0, 1):
            acts, z = whole[layer]
            for head in range(16):
                size, query = acts[..., head].abs().max(1)
                best = size.sort(descending=True, stable=True).indices[:3].tolist()
                kept = store.head(layer, head).top
                assert [one.context for one in kept] == [c for c in best if size[c] > 0]
                for one in kept:
                    at = int(query[one.context])
                    assert one.query == at
                    assert one.activation == pytest.approx(
                        acts[one.context, at, head].item(), rel=1e-5
                    )
                    assert torch.equal(one.tokens, tokens[one.context])
                    expected = z[one.context, head, at]
                    torch.testing.assert_close(one.z_pattern, expected, rtol=2e-3, atol=1e-5)
                    assert one.z_pattern.sum().item() == pytest.approx(one.activation, rel=5e-3)


def test_the_sample_is_of_active_contexts_and_falls_into_quantiles(tmp_path, whole):
    _, _, tokens = setting()
    with collect(tmp_path / "heads.sqlite", tokens) as store:
        acts, _ = whole[1]
        n_sampled = set()
        for head in range(16):
            active = set(torch.nonzero((acts[..., head] != 0).any(1))[:, 0].tolist())
            found = store.head(1, head)
            contexts = [one.context for one in found.sample]
            assert len(contexts) == min(5, len(active)) == len(set(contexts))
            assert set(contexts) <= active
            sizes = [abs(one.activation) for one in found.sample]
            assert sizes == sorted(sizes, reverse=True)
            parts = found.quantiles(2)
            assert [one for part in parts for one in part] == found.sample
            assert abs(len(parts[0]) - len(parts[1])) <= 1
            n_sampled.add(tuple(sorted(contexts)))
        assert len(n_sampled) > 4  # heads have samples of their own


def test_every_context_is_as_likely_in_the_sample():
    """1,000 heads with 40 contexts each: each context in a quarter of the samples of 10."""
    torch.manual_seed(0)
    kept = Kept.empty(1000, 10, 1)
    for start in range(0, 40, 8):
        shape = (8, 1000)
        ones = torch.ones(shape)
        kept.offer(torch.rand(shape), start, torch.zeros(shape, dtype=torch.long), ones)
    counts = kept.context.flatten().bincount(minlength=40)
    assert counts.sum() == 10_000
    assert (counts - 250).abs().max() < 5 * (1000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (4, 2), (6,)])
def test_batches_do_not_matter_and_ties_go_to_the_first(sizes):
    ranks = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0, 3.0]]).T
    kept = Kept.empty(1, 4, 2)
    start = 0
    for size in sizes:
        part = ranks[start : start + size]
        zeros = torch.zeros_like(part, dtype=torch.long)
        kept.offer(part, start, zeros, part)
        start += size
    assert kept.context.tolist() == [[1, 2, 5, 4]]
    assert kept.activation.tolist() == [[3.0, 3.0, 3.0, 2.0]]
    empty = Kept.empty(1, 2, 2)
    nothing = torch.full((3, 1), -torch.inf)
    new = empty.offer(nothing, 0, torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1))
    assert empty.context.tolist() == [[NO_CONTEXT, NO_CONTEXT]]
    assert not new.any()


def test_a_killed_pass_goes_on_to_the_identical_file(tmp_path):
    """SIGKILL in the middle; the second process finds the checkpoint."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_analysis_contexts import collect, setting
        from lorsa_lens.analysis.contexts import collect as module
        save = module._Pass.save
        def slow_save(self, state):
            save(self, state)
            time.sleep({{pause}})
        module._Pass.save = slow_save
        collect({{path!r}}, setting()[2], checkpoint_every=1).close()
        """
    )
    cut, uncut = tmp_path / "cut.sqlite", tmp_path / "uncut.sqlite"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script.format(path=str(cut), pause=60)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    checkpoint = Path(f"{cut}.checkpoint")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not cut.exists()
    _, _, tokens = setting()
    collect(cut, tokens, checkpoint_every=1).close()
    collect(uncut, tokens, checkpoint_every=1000).close()
    assert cut.read_bytes() == uncut.read_bytes()
    assert not checkpoint.exists()
    assert sorted(tmp_path.iterdir()) == [cut, uncut]


def test_resuming_does_not_read_the_corpus_again(tmp_path, monkeypatch):
    from lorsa_lens.analysis.contexts import collect as module

    _, _, tokens = setting()
    path = tmp_path / "heads.sqlite"

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_store", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(path, tokens, checkpoint_every=4)
    monkeypatch.undo()
    added = []
    add = module.LayerHeads.add

    def counting(self, lorsa, record, counted, first_context, seed):
        added.append(first_context)
        add(self, lorsa, record, counted, first_context, seed)

    monkeypatch.setattr(module.LayerHeads, "add", counting)
    collect(path, tokens, checkpoint_every=4).close()
    assert added == [16, 16, 20, 20]  # 21 contexts by 4, saved after 16, two layers


def test_a_limited_pass_and_a_finished_one(tmp_path):
    _, _, tokens = setting()
    path = tmp_path / "heads.sqlite"
    with collect(path, tokens, max_tokens=40) as store:
        assert store.meta["n_tokens"] == 64  # two batches of 4 contexts of 8
        assert max(one.context for h in range(16) for one in store.head(0, h).top) == 7
    written = path.stat().st_mtime_ns
    collect(path, tokens, max_tokens=40).close()
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"of another pass, with seed = 0 and not 1: remove it"):
        collect(path, tokens, max_tokens=40, seed=1)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        ContextStore(tmp_path / "nothing")
    other = tmp_path / "other"
    other.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is no file of contexts"):
        ContextStore(other)
    _, _, tokens = setting()
    with (
        collect(tmp_path / "heads.sqlite", tokens) as store,
        pytest.raises(KeyError, match="no head 16 of layer 1"),
    ):
        store.head(1, 16)
    for name in ("n_top", "n_sampled", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} = 0 must be positive"):
            collect(tmp_path / "x", tokens, **{name: 0})
    model, lorsas, _ = setting()
    with pytest.raises(ValueError, match="different layers"):
        collect_contexts(model, [lorsas[0], lorsas[0]], tokens, tmp_path / "x")
