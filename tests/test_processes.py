"""Two processes train the same Lorsas as one that goes through its batches in two parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorsa_lens.data import open_documents, pack
from lorsa_lens.data.sharing import SharedContexts

TRAIN = """
import os, sys
import torch
import torch.distributed as dist
from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training import train

torch.set_num_threads(1)
if "RANK" in os.environ:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = "file://" + sys.argv[2]
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
tokens = load_language("rules").sample(64, seed=1).tokens
cfg = TrainingConfig(
    n_ov_heads=48, k=4, context_size=48, train_batch_size_tokens=8 * 48,
    training_tokens=int(sys.argv[4]) * 8 * 48, checkpoint_every=6, aux_coefficient=0.1,
    dead_feature_window=500, gradient_accumulation_steps=int(sys.argv[3]), output_path=sys.argv[1],
)
train(load_model("rules"), tokens, [0], cfg, resume=True, progress=False)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def run(folder, store, n_processes, n_steps=12):
    """Train in `n_processes` processes; returns the final weights."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(folder), str(store)]
    arguments = [*command, str(2 // n_processes), str(n_steps)]
    world = {"WORLD_SIZE": str(n_processes)} if n_processes > 1 else {}
    processes = [
        subprocess.Popen(
            arguments,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), **world,
                 **({"RANK": str(rank)} if n_processes > 1 else {})},
        )
        for rank in range(n_processes)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [0] * n_processes
    return load_file(Path(folder) / "lorsas" / "blocks.0" / "lorsa.safetensors")


def test_one_and_two_processes_train_the_same(tmp_path):
    one = run(tmp_path / "one", tmp_path / "unused", 1)
    two = run(tmp_path / "two", tmp_path / "store", 2)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


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
