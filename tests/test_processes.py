"""Two processes train the same Lorsas as one, in every layout, and go on with its runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from training_jobs import run_job

from lorsa_lens.data import open_documents, pack
from lorsa_lens.data.sharing import SharedContexts
from lorsa_lens.training.run import join_processes

SHARDS = hasattr(torch.cpu.Stream, "record_event")
"""Before PyTorch 2.7, FSDP2 needs GPUs: `parallel = "sharded"` is refused without."""

DIVIDED = ["sharded", "heads"] if SHARDS else ["heads"]
LAYOUTS = ["data", *DIVIDED, "layers"]
PARTS = {"data": 2, "sharded": 2, "heads": 1, "layers": 1}
"""In how many parts one process must take a batch to do what two processes do."""

ALL_TERMS = {
    "aux_coefficient": 0.1, "dead_feature_window": 300, "token_weights": "energy",
    "balance_rate": 0.1, "k_start": 8, "k_anneal_fraction": 0.5,
}  # fmt: skip
KINDS = {
    "topk_relu": {"act_fn": "topk_relu"},
    "batchtopk": {"act_fn": "batchtopk"},
    "jumprelu": {"act_fn": "jumprelu", "k": None, "l0_coefficient": 0.01},
    "relu": {"act_fn": "relu", "k": None, "l1_coefficient": 0.01},
}
UNEVEN = {"n_qk_heads": 5, "n_ov_heads": 45}
"""Rows that two processes cannot share out equally."""

SHORT = {"training_tokens": 3 * 8 * 24, "checkpoint_every": 0}


def in_two_processes(folder, jobs):
    """Run jobs under `torchrun`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("training_jobs.py"))
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script, str(folder), str(folder / "jobs.json")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )


def hand_over(source, target):
    """Make a run that has come half as far as another one."""
    shutil.copytree(source / "checkpoints/step_000000004", target / "checkpoints/step_000000004")


def a_run_of_files(folder):
    """The fields of a `RunConfig`."""
    zoo.hugging_face(torch.float32, "GPT2", n_ctx=zoo.N_CTX).save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{i % 60}" for i in range(600)))
    return {
        "model": str(folder / "model"), "tokens": str(folder / "text.txt"), "parallel": "layers",
        "model_dtype": "bfloat16",
        "n_ov_heads": 16, "k": 2, "context_size": 8, "train_batch_size_tokens": 32,
        "training_tokens": 64,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: in one process, in two, and begun in one and ended in the other."""
    folder = tmp_path_factory.mktemp("runs")
    for n_parts in (1, 2):
        changes = {**ALL_TERMS, "gradient_accumulation_steps": n_parts}
        run_job(folder / f"one_{n_parts}", changes, [0, 1])
    for name, changes in {**KINDS, "uneven": UNEVEN}.items():
        for n_parts in (1, 2):
            steps = {"gradient_accumulation_steps": n_parts}
            run_job(folder / f"one_{n_parts}_{name}", {**SHORT, **changes, **steps}, [1])
    jobs = []
    for layout in LAYOUTS:
        changes = {**ALL_TERMS, "parallel": layout}
        hand_over(folder / f"one_{PARTS[layout]}", folder / f"one_then_two_{layout}")
        jobs.append([f"two_{layout}", changes, [0, 1]])
        jobs.append([f"one_then_two_{layout}", changes, [0, 1]])
    uneven = ["two_sharded_uneven", {**SHORT, **UNEVEN, "parallel": "sharded"}, [1]]
    jobs += [uneven, uneven] if SHARDS else []  # the second time it is there, and loaded
    for layout in DIVIDED:
        for name, changes in KINDS.items():
            jobs.append([f"two_{layout}_{name}", {**SHORT, **changes, "parallel": layout}, [1]])
    jobs.append(["odd", {"parallel": "heads", "n_qk_heads": 5, "n_ov_heads": 50}, [0]])
    jobs.append(["few", {"parallel": "layers"}, [0]])
    jobs.append(["diverged", {"parallel": "heads", "lr": 1e200}, [0]])
    jobs.append(["from_files", a_run_of_files(folder), [0, 1]])
    in_two_processes(folder, jobs)
    for layout in LAYOUTS:
        hand_over(folder / f"two_{layout}", folder / f"two_then_one_{layout}")
        changes = {**ALL_TERMS, "gradient_accumulation_steps": PARTS[layout]}
        run_job(folder / f"two_then_one_{layout}", changes, [0, 1])
    return folder


def assert_same(a, b, besides=()):
    assert a.keys() == b.keys()
    for name in a.keys() - set(besides):
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9, msg=name)


def lorsa(run, layer):
    return load_file(run / "lorsas" / f"blocks.{layer}" / "lorsa.safetensors")


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("made", ["two", "one_then_two", "two_then_one"])
def test_one_and_two_processes_train_the_same(runs, layout, made):
    one, other = runs / f"one_{PARTS[layout]}", runs / f"{made}_{layout}"
    for layer in (0, 1):
        assert_same(lorsa(other, layer), lorsa(one, layer))
        start = load_file(one / f"checkpoints/step_000000004/layer_{layer}.safetensors")
        assert not torch.allclose(start["lorsa.W_O"], lorsa(one, layer)["W_O"], rtol=1e-3)
    assert logged(other)[0]["step"] == (0 if made == "two" else 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_and_logs_say_nothing_of_the_layout(runs, layout):
    one, two = runs / f"one_{PARTS[layout]}", runs / f"two_{layout}"
    for step in (4, 8):
        names = sorted(path.name for path in (two / f"checkpoints/step_{step:09d}").iterdir())
        assert names == ["layer_0.safetensors", "layer_1.safetensors", "state.json"]
        for name in names[:2]:
            a, b = (load_file(run / f"checkpoints/step_{step:09d}" / name) for run in (one, two))
            assert_same(a, b)
    expected, found = logged(one), logged(two)
    assert len(found) == 8
    assert any(line["blocks.1/losses/auxiliary_loss"] > 0 for line in expected)
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, rel=1e-6)


@pytest.mark.parametrize("layout", DIVIDED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_selection_trains_the_same(runs, layout, kind):
    # Each process's share of a batch gives a threshold of its own; they take the mean.
    besides = ["threshold"] if layout == "sharded" else []
    one, two = runs / f"one_{PARTS[layout]}_{kind}", runs / f"two_{layout}_{kind}"
    assert_same(lorsa(one, 1), lorsa(two, 1), besides)


@pytest.mark.skipif(not SHARDS, reason="this PyTorch shards on GPUs only")
def test_shards_may_be_unequal(runs):
    assert_same(lorsa(runs / "one_2_uneven", 1), lorsa(runs / "two_sharded_uneven", 1))


def test_all_processes_refuse_and_stop_alike(runs):
    for rank in (0, 1):
        odd = (runs / f"odd.{rank}.error").read_text()
        assert odd.startswith("ConfigError: parallel = 'heads' with 2 processes: n_qk_heads = 5 mu")
        few = (runs / f"few.{rank}.error").read_text()
        assert few.startswith("ConfigError: parallel = 'layers' with 2 processes, but 1 layers")
        diverged = (runs / f"diverged.{rank}.error").read_text()
        assert diverged.startswith("TrainingError: layer 0, step 1: the loss is")
        assert diverged.endswith("No checkpoint yet")


def test_a_run_of_several_processes_documents_all_layers(runs):
    card = (runs / "from_files/README.md").read_text()
    for layer in (0, 1):
        assert f"| {layer} | 4 | 16 | 2 | `lorsas/blocks.{layer}` |" in card
        assert lorsa(runs / "from_files", layer)["W_O"].isfinite().all()
        assert lorsa(runs / "from_files", layer)["W_O"].dtype == torch.float32
    fields = json.loads((runs / "from_files/run_config.json").read_text())
    assert fields["parallel"] == "layers"
    assert {"blocks.0/metrics/l0", "blocks.1/metrics/l0"} <= logged(runs / "from_files")[0].keys()


def test_gpus_get_nccl_and_a_device_each(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.distributed.init_process_group", asked.append)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    assert join_processes("cuda") == "cuda"
    assert asked == []
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert join_processes("cuda") == "cuda:3"
    assert join_processes("cpu") == "cpu"
    assert asked == [3, "cpu:gloo,cuda:nccl", "gloo"]


@pytest.mark.parametrize("n", [2, 3])
def test_shares_make_up_the_whole_and_places_agree(n):
    def contexts():
        return pack(open_documents(torch.arange(5 * 12).reshape(12, 5)), 5)

    whole = contexts()
    shares = [SharedContexts(contexts(), rank, n) for rank in range(n)]
    for _ in range(12 // (2 * n)):
        expected = whole.next_batch(2 * n).tokens
        parts = [share.next_batch(2).tokens for share in shares]
        assert torch.equal(torch.cat(parts), expected)
        assert len({str(share.state_dict()) for share in shares}) == 1
        assert shares[0].state_dict() == whole.state_dict()
    assert all(share.next_batch(2) is None for share in shares)
    with pytest.raises(ValueError, match="rank = 3"):
        SharedContexts(contexts(), 3, 3)
