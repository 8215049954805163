"""What training reaches: the numbers of docs/training.md, made anew. Takes minutes.

`make test-slow` shows them.
"""

import sys

import numpy as np
import pytest
import torch

from lorsa_lens import Lorsa
from lorsa_lens.evaluation import evaluate
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.training import TrainingConfig, train, train_on

pytestmark = pytest.mark.slow


def report(name, values):
    sys.stdout.write(f"\n{name}: {values}\n")


def trained(name, seed, *, n_steps, n_train, adam_beta2, **sizes):
    """Lorsas of every layer of a testbed model, held-out text, and what they do on it."""
    model, language = load_model(name), load_language(name)
    text, test = language.sample(n_train, seed=seed), language.sample(512, seed=10_000 + seed)
    layers = range(model.cfg.n_layers)
    lorsas = {
        layer: Lorsa.from_attention(model, layer, seed=seed, act_fn="topk_relu", k=4, **sizes)
        for layer in layers
    }
    n_pos = text.tokens.shape[1]
    cfg = TrainingConfig(
        context_size=n_pos, train_batch_size_tokens=32 * n_pos,
        training_tokens=n_steps * 32 * n_pos, seed=seed, adam_beta2=adam_beta2,
    )  # fmt: skip
    train_on(lorsas, record_attention(model, text.tokens, layers), cfg, progress=False)
    asked = test.answer >= 0
    rows = evaluate(model, list(lorsas.values()), test.tokens, predicted=asked)
    return model, lorsas, test, rows


def fvu_at(model, lorsa, test, positions):
    """Squared error at some positions, over the variance of the output at all of them."""
    record = record_attention(model, test.tokens, [lorsa.cfg.layer])[lorsa.cfg.layer]
    with torch.no_grad():
        error = (lorsa(record.x, **record.context) - record.out).double().square().sum(-1)
    out = record.out.double()
    variance = (out - out.mean((0, 1))).square().sum(-1).mean()
    return (error[positions].mean() / variance).item()


RULES = {
    "n_steps": 800, "n_train": 8192, "adam_beta2": 0.95, "n_qk_heads": 8, "n_ov_heads": 256,
}  # fmt: skip
INDUCTION = {
    "n_steps": 700, "n_train": 4096, "adam_beta2": 0.99, "n_qk_heads": 6, "n_ov_heads": 192,
}  # fmt: skip


def test_superposed_rules():
    results = []
    for seed in range(3):
        model, lorsas, test, rows = trained("rules", seed, **RULES)
        asked = test.answer >= 0
        results.append((float(rows[0].ce_recovered), fvu_at(model, lorsas[0], test, asked)))
    recovered, rule_fvu = np.mean(results, axis=0)
    report("recovered and rule FVU", results)
    assert recovered >= 0.985
    assert rule_fvu <= 0.004


def test_induction():
    _, _, _, rows = trained("induction", 0, **INDUCTION)
    report("recovered", [float(row.ce_recovered) for row in rows])
    report("FVU", [float(row.fvu) for row in rows[:2]])
    assert rows[0].ce_recovered >= 0.999
    assert rows[1].ce_recovered >= 0.999
    assert rows[0].fvu <= 0.11
    assert rows[1].fvu <= 0.04


def test_a_real_model(assets):
    folder = assets / "stories260k"
    model = load_host(str(folder))
    cfg = TrainingConfig(n_ov_heads=1024, k=16, training_tokens=4_096_000)
    lorsas = train(model, str(folder / "train_tokens.npy"), config=cfg, progress=False)
    held_out = torch.from_numpy(np.load(folder / "val_tokens.npy")[:, :128].astype(np.int64))
    *rows, together = evaluate(model, list(lorsas.values()), held_out)
    recovered = [float(row.ce_recovered) for row in rows]
    report("recovered", [*recovered, float(together.ce_recovered)])
    report("FVU", [float(row.fvu) for row in rows])
    report("dead", [float(row.dead) for row in rows])
    assert min(recovered) >= 0.93
    assert np.mean(recovered) >= 0.95
    assert together.ce_recovered >= 0.90
