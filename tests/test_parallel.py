"""Heads divided among processes, here threads: what the whole Lorsa does, is the oracle."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorsa_lens import ConfigError, Lorsa, LorsaConfig
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training import losses
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.parallel.exchange import exchanged
from lorsa_lens.training.parallel.head_shard import OF_NO_HEAD, HeadShard
from lorsa_lens.training.parallel.layout import Layout
from lorsa_lens.training.parts import Part
from lorsa_lens.training.ranks import Ranks

D_MODEL, N_POS = 8, 6


class Threads:
    """What threads that play processes hand to each other."""

    def __init__(self, n):
        self.n, self.slots, self.barrier = n, [None] * n, threading.Barrier(n, timeout=20)
        self.gathered = []

    def all(self, rank, tensor):
        self.slots[rank] = tensor
        self.barrier.wait()
        tensors = list(self.slots)
        self.barrier.wait()
        return tensors

    def run(self, work):
        """What each thread returns."""
        with ThreadPoolExecutor(self.n) as pool:
            return list(pool.map(lambda rank: work(ThreadRanks(self, rank)), range(self.n)))


class ThreadRanks(Ranks):
    def __init__(self, threads, rank):
        self.threads, self.rank, self.n, self._device = threads, rank, threads.n, None

    def _reduced(self, tensor, operation):
        stacked = torch.stack(self.threads.all(self.rank, tensor.clone()))
        maximum = operation == torch.distributed.ReduceOp.MAX
        return tensor.copy_(stacked.amax(0) if maximum else stacked.sum(0))

    def gather(self, rows):
        self.threads.gathered.append(rows.shape)
        return torch.cat(self.threads.all(self.rank, rows))

    def deal(self, rows):
        sent = self.threads.all(self.rank, rows)
        return torch.cat([r[self.rank] for r in sent]) if self.rank < len(rows) else None


def a_lorsa(**changes):
    values = {"d_model": D_MODEL, "n_qk_heads": 6, "d_qk_head": 4, "n_ov_heads": 24, "k": 5,
              "dtype": "float64"}  # fmt: skip
    torch.manual_seed(1)
    lorsa = Lorsa(LorsaConfig(**{**values, **changes})).train()
    for parameter in lorsa.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return lorsa


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, N_POS, D_MODEL, generator=generator, dtype=torch.float64)
    counted = torch.rand(3, N_POS, generator=generator) < 0.8
    return x, x.cumsum(1).flip(-1), counted


def objective(lorsa, dead, factors=None):
    """The loss with every term that there is; the code's activations; who stays how often."""
    x, out, counted = a_batch()
    output = lorsa.outputs(x, score_factors=factors)
    loss = losses.squared_error(output.recons, out, counted)
    if lorsa.cfg.act_fn == "relu":
        loss = loss + 0.3 * losses.l1_penalty(lorsa, output, counted)
    if lorsa.cfg.act_fn == "jumprelu":
        loss = loss + 0.3 * losses.l0_penalty(lorsa, output, counted)
    loss = loss + 0.5 * losses.auxiliary_loss(lorsa, output, out, counted, dead, 3)
    loss.backward()
    return loss.detach(), output


KINDS = [
    {},
    {"k": None},
    {"act_fn": "topk_relu", "k": 9},
    {"act_fn": "batchtopk"},
    {"act_fn": "jumprelu", "k": None, "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.4},
    {"act_fn": "relu", "k": None},
    {"positional_embedding_type": "rotary", "qk_norm": "head", "attn_scores_soft_cap": 3.0},
    {"positional_embedding_type": "alibi"},
    {"n_ov_heads": 6, "k": 4},
]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shards_are_the_whole(kind, n):
    whole = a_lorsa(**kind)
    n_heads = whole.cfg.n_ov_heads
    dead = torch.arange(n_heads) % 5 == 1
    dead[: n_heads // 3] = False  # of three processes the first one has no dead head
    factors = 1 + torch.rand(n_heads, dtype=torch.float64)
    shards = Threads(n)

    def work(ranks):
        shard = HeadShard(whole, ranks).train()
        own = slice(ranks.rank * n_heads // n, (ranks.rank + 1) * n_heads // n)
        loss, output = objective(shard, dead[own], factors[own])
        gradients = {
            name: parameter.grad if name in OF_NO_HEAD else ranks.gather(parameter.grad)
            for name, parameter in shard.named_parameters()
        }
        dense = torch.zeros(3, N_POS, len(shard.W_O), dtype=torch.float64)
        dense.scatter_add_(-1, output.code.indices, output.code.values.detach())
        return loss, output.recons.detach(), gradients, dense, dict(shard.named_buffers())

    results = shards.run(work)
    loss, output = objective(whole, dead, factors)
    expected = torch.zeros(3, N_POS, n_heads, dtype=torch.float64)
    expected.scatter_add_(-1, output.code.indices, output.code.values.detach())
    assert torch.equal(torch.cat([dense for *_, dense, _ in results], -1) != 0, expected != 0)
    for shard_loss, recons, gradients, _, buffers in results:
        torch.testing.assert_close(shard_loss, loss)
        torch.testing.assert_close(recons, output.recons.detach())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(buffers[name], buffer)


def test_only_the_scores_of_candidates_are_exchanged():
    threads = Threads(3)
    whole, (x, *_) = a_lorsa(n_ov_heads=240), a_batch()

    def work(ranks):
        with torch.no_grad():
            return HeadShard(whole, ranks)(x)

    for written in threads.run(work):
        torch.testing.assert_close(written, whole(x).detach())
    assert threads.gathered == [(1, 3, N_POS, 5)] * 3  # k scores a token, not 80


def test_buffers_become_the_mean_of_those_of_all_processes():
    def work(ranks):
        layout, lorsa = Layout(), a_lorsa(act_fn="batchtopk", dtype="float32")
        layout.batch = ranks
        lorsa.threshold.fill_(ranks.rank + 1)
        layout.agree(lorsa)
        return lorsa.threshold.item()

    assert Threads(3).run(work) == [2.0, 2.0, 2.0]


def a_part(rank, *, padded):
    x, out, counted = a_batch(rank)
    positions = torch.arange(N_POS)[None] + (rank if padded else 0)
    keep = torch.rand(3, 1, N_POS) < 0.5 if padded else None
    return Part(AttentionRecord(x, out, x + 1, positions, keep), counted)


def assert_joined(part, shares):
    """A part is its shares, one after the other."""
    records = [share.record for share in shares]
    for name in ("x", "out", "qk_input"):
        expected = torch.cat([getattr(record, name) for record in records])
        assert torch.equal(getattr(part.record, name), expected)
    expected = torch.cat([record.positions.expand(3, -1) for record in records])
    assert torch.equal(part.record.positions, expected)
    assert torch.equal(part.counted, torch.cat([share.counted for share in shares]))
    if all(record.keep is None for record in records):
        assert part.record.keep is None
    else:
        masks = [torch.ones(3, 1, N_POS) if r.keep is None else r.keep for r in records]
        assert torch.equal(part.record.keep, torch.cat([mask.bool() for mask in masks]))
    assert part.record.attn_out is None


@pytest.mark.parametrize("padded", [(False, False), (False, True), (True, True)])
def test_shares_of_a_batch_are_put_together(padded):
    shares = [a_part(rank, padded=pads) for rank, pads in enumerate(padded)]

    def work(ranks):
        own = shares[ranks.rank]
        return exchanged([own], own, ranks, lambda rows: ranks.gather(rows[0]))

    for part in Threads(2).run(work):
        assert_joined(part, shares)


def test_layers_are_dealt_out():
    shares = [
        [a_part(10 * layer + rank, padded=layer == 1) for layer in range(2)] for rank in range(3)
    ]

    def work(ranks):
        sent = shares[ranks.rank]
        own = sent[ranks.rank] if ranks.rank < 2 else None
        return exchanged(sent, own, ranks, ranks.deal)

    first, second, third = Threads(3).run(work)
    assert third is None  # three processes, two layers left: it has none
    assert first.record.keep.all()
    assert_joined(second, [share[1] for share in shares])
    assert_joined(Part(first.record._replace(keep=None), first.counted), [s[0] for s in shares])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "heads", "compile": True}, "compile = True needs whole Lorsas"),
        ({"parallel": "sharded", "resample_every": 5}, "resample_every = 5 needs whole Lorsas"),
        ({"parallel": "layers", "objective": "kl"}, "objective = 'kl' trains all Lorsas at once"),
        ({"parallel": "tensor"}, "parallel = 'tensor' must be one of"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)
