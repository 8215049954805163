"""The memory that a run is said to take, against sums by hand and against real runs."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch._subclasses.fake_tensor import FakeTensorMode

from lorsa_lens import ConfigError
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.training import TrainingConfig
from lorsa_lens.training.memory import PROCESS_STATUS, estimate_memory, resident_bytes
from lorsa_lens.training.simulation import LiveBytes, without_contents

SMALL = {
    "n_ov_heads": 64, "k": 4, "context_size": 16, "train_batch_size_tokens": 256,
    "training_tokens": 2560, "output_path": "nowhere",
}  # fmt: skip


def model():
    return zoo.KINDS[0].build(torch.float32)


def needs(**changes):
    return estimate_memory(model(), TrainingConfig(**{**SMALL, **changes}))


# -------------------------------------------------------------------------------------- counting


def test_bytes_are_counted_while_tensors_live():
    with FakeTensorMode(), LiveBytes("cpu", assumed_count=3) as memory:
        a = torch.empty(1000)
        assert memory.now == 4000
        view = a.view(10, 100)[2:]
        assert memory.now == 4000
        double = (view * 2).double()  # 800 numbers: 3200 bytes, then 6400, then one of them
        assert (memory.now, memory.peak) == (4000 + 6400, 4000 + 3200 + 6400)
        memory.mark()
        del a, view
        gc.collect()
        assert (memory.now, memory.peak) == (6400, 10400)
        double.mul_(2)
        assert memory.peak == 10400
        assert bool((double > 0).all()) is True
        assert int((double > 0).sum()) == 3
        assert torch.ones(20, dtype=torch.bool).nonzero().shape == (3, 1)
        assert double[double > 0].shape == (800,)
        torch.empty(10, device="meta")
        assert memory.now == 6400


def test_a_model_gets_its_weights_back():
    host = model()
    before = {name: parameter for name, parameter in host.named_parameters()}
    expected = host(zoo.tokens())
    with FakeTensorMode(), LiveBytes("cpu", 1) as memory, without_contents(host, "cpu"):
        tensors = {id(t): t for t in (*host.parameters(), *host.buffers())}
        assert memory.now == sum(t.nbytes for t in tensors.values())
        assert all(p is not before[name] for name, p in host.named_parameters())
    assert all(p is before[name] for name, p in host.named_parameters())
    assert torch.equal(host(zoo.tokens()), expected)


# --------------------------------------------------------------------------------------- by hand


def test_rows_are_what_can_be_counted_by_hand():
    said = needs()
    # W_Q and W_K of 4 circuits, W_V and W_O of 64 heads, and their biases, of 2 layers of width 32
    numbers = 2 * (2 * (4 * 32 * 8 + 4 * 8) + 2 * 64 * 32 + 64 + 32)
    assert said.weights == said.gradients == 4 * numbers
    counts = 2 * 64 * 8  # of dead heads; and each of 8 parameters has its step, of 2 layers
    assert 0 <= said.optimizer - 2 * said.weights - counts <= 4096
    part = 16 * 16 * (2 * 2 * 32 * 4 + 17)  # x and out of 2 layers; token, document, counted
    views = zoo.KINDS[0].host == "bridge"  # on which records may be parts of larger tensors
    assert part <= said.batch <= (2 if views else 1.02) * part + 1000  # and positions
    assert said.prefetched == 2 * said.batch
    assert said.disk == (3 * 4 + 1) * said.weights
    assert said.shuffling == 512 * 16 * 17
    held = said.language_model + 2 * said.weights + said.optimizer + said.batch
    assert said.peak == held + said.lorsa_step + said.prefetched + said.model_activations


def test_what_makes_a_run_take_less():
    base = needs()
    parts = needs(gradient_accumulation_steps=4, output_path=None)
    assert parts.disk == parts.saving == 0
    assert parts.lorsa_step < 0.6 * base.lorsa_step
    assert parts.batch == pytest.approx(base.batch, rel=0.05)
    assert parts.prefetched < 0.3 * base.prefetched
    cached = TrainingConfig(**SMALL, cached_activations_path="x", prefetch_batches=0)
    one = estimate_memory(model(), cached, [1])
    assert one.weights == base.weights / 2
    assert one.model_activations == one.batch
    assert one.prefetched == 0


@pytest.mark.parametrize("act_fn", ["batchtopk", "jumprelu"])
def test_every_selection_can_be_estimated(act_fn):
    k = None if act_fn in ("relu", "jumprelu") else 4
    said = needs(act_fn=act_fn, k=k, aux_coefficient=0.1, dead_feature_window=1)
    # the activations before selection at least, for the forward and the backward pass
    assert said.lorsa_step > 2 * 256 * 64 * 4


@pytest.mark.parametrize("name", ["bridge-gemma2", "gemma2"])
def test_hosts_of_other_kinds_can_be_estimated(name):
    kinds = {kind.name: kind for kind in zoo.KINDS}
    if name not in kinds:
        pytest.skip("not with this TransformerLens")
    host = kinds[name].build(torch.float32)
    said = estimate_memory(host, TrainingConfig(**SMALL))
    assert said.language_model >= sum(p.nbytes for p in set(host.parameters()))


def test_a_model_without_weights_gives_the_same_estimate(tmp_path):
    zoo.by_name("bridge-llama")
    zoo.hugging_face(torch.float32, "Llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    empty = load_host(str(tmp_path), device="meta")
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    config = TrainingConfig(**SMALL)
    real = vars(estimate_memory(load_host(str(tmp_path)), config))
    assert vars(estimate_memory(empty, config)) == pytest.approx(real, rel=0.02)


def test_end_to_end_is_refused():
    with pytest.raises(ConfigError, match=r"objective = 'kl': memory is estimated for 'reconst"):
        needs(objective="kl")


# ------------------------------------------------------------------------------------- real runs

RUN = """
import gc, json, sys
sys.path.insert(0, {tests!r})
import torch, zoo
torch.set_num_threads(1)
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.training.memory import estimate_memory, resident_bytes

def run(values, layers, output_path):
    model = zoo.KINDS[0].build(torch.float32)
    cfg = TrainingConfig(output_path=output_path, checkpoint_every=2, **values)
    said = estimate_memory(model, cfg, layers)
    del model
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is held now
    before = resident_bytes()
    model = zoo.KINDS[0].build(torch.float32)
    train(model, zoo.tokens(100, cfg.context_size), layers, cfg, progress=False)
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return [said.peak, peak - before]

for i, (values, layers) in enumerate(json.loads({settings!r})):
    print(json.dumps(run(values, layers, {folder!r} + f"/run{{i}}")))
"""


@pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="only Linux says what a process holds")
def test_the_peak_is_that_of_real_runs(tmp_path):
    warm_up = {"n_ov_heads": 64, "k": 4, "context_size": 16, "train_batch_size_tokens": 256,
               "training_tokens": 512}  # fmt: skip
    wide = {"n_ov_heads": 4096, "k": 16, "context_size": 64, "train_batch_size_tokens": 1024,
            "training_tokens": 3 * 1024, "prefetch_batches": 0}  # fmt: skip
    parts = {"n_ov_heads": 1024, "k": 16, "context_size": 64, "train_batch_size_tokens": 8192,
             "training_tokens": 2 * 8192, "gradient_accumulation_steps": 2}  # fmt: skip
    settings = json.dumps([(warm_up, [0]), (wide, [0, 1]), (parts, [1])])
    code = RUN.format(tests=str(Path(__file__).parent), settings=settings, folder=str(tmp_path))
    # By default the C library keeps freed memory of up to 32 MB a piece to itself.
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "131072",
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    _, *pairs = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(pairs) == 2
    for said, measured in pairs:
        assert measured > 80e6
        assert said == pytest.approx(measured, rel=0.2)


def test_what_the_process_holds_now():
    before = resident_bytes()
    if before is None:
        pytest.skip("only Linux says what a process holds")
    held = torch.ones(20_000_000)
    assert resident_bytes() - before > 0.9 * held.nbytes
