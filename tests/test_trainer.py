"""The trainer: losses and scales against hand-made ones, and runs that lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lorsa_lens import ConfigError, Lorsa, LorsaConfig
from lorsa_lens.functional import precision
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training import losses, schedules
from lorsa_lens.training.checkpoints import CheckpointError, checkpoints
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.layer import LayerTrainer, Part, TrainingError
from lorsa_lens.training.scaling import Scales, estimate_scales, fit_gain, rescale
from lorsa_lens.training.trainer import Trainer

D_MODEL, N_POS = 8, 6


class ToyBatch(NamedTuple):
    tokens: torch.Tensor
    records: dict
    counted: torch.Tensor
    state: dict


class ToySource:
    """Endless batches made from their number, so that any place can be gone to."""

    def __init__(self, layers, batch_size, poison_at=None, delay=0.0):
        self.layers, self.batch_size, self.n = layers, batch_size, 0
        self.poison_at, self.delay = poison_at, delay

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.n)
            records = {}
            for layer in self.layers:
                x = 3 * torch.randn(self.batch_size, N_POS, D_MODEL, generator=generator)
                out = 0.1 * x.cumsum(1).flip(-1)
                if self.poison_at == self.n and layer == 1:
                    out = out * float("nan")
                positions = torch.arange(N_POS)[None]
                records[layer] = AttentionRecord(x, out, None, positions, None)
            counted = torch.ones(self.batch_size, N_POS, dtype=torch.bool)
            counted[:, 0] = False
            self.n += 1
            time.sleep(self.delay)
            yield ToyBatch(
                torch.zeros_like(counted, dtype=torch.long), records, counted, {"n": self.n}
            )

    def load_state_dict(self, state):
        self.n = state["n"]


def config(tmp_path, **changes):
    values = {
        "training_tokens": 40 * 4 * N_POS, "context_size": N_POS,
        "train_batch_size_tokens": 4 * N_POS, "output_path": str(tmp_path / "run"),
        "checkpoint_every": 5, "log_every": 1, "dead_feature_window": 100,
        "aux_coefficient": 0.1, "aux_k": 2, "init": "random",
        "balance_rate": 0.1, "resample_every": 6,
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})


def lorsas(layers=(0, 1), **changes):
    values = {"d_model": D_MODEL, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 12, "k": 3}
    made = {}
    for layer in layers:
        torch.manual_seed(layer)
        made[layer] = Lorsa(LorsaConfig(**{**values, "layer": layer, **changes}))
    return made


def trainer(cfg, resume=False, poison_at=None, delay=0.0, **changes):
    made = lorsas(**changes)
    batch_size = cfg.batch_size // cfg.gradient_accumulation_steps
    return Trainer(made, ToySource(list(made), batch_size, poison_at, delay), cfg, resume=resume)


def weights(trained):
    return {
        f"{layer}.{name}": tensor.clone()
        for layer, lorsa in trained.items()
        for name, tensor in lorsa.state_dict().items()
    }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------- losses and scales


def a_record(seed=0):
    (batch,) = [next(iter(ToySource([0], 4)))]
    return batch.records[0], batch.counted


def test_scales_make_the_loss_the_fraction_of_variance_unexplained():
    record, counted = a_record()
    scales = estimate_scales(record, counted)
    scaled = scales.scaled(record)
    assert scaled.x[counted].square().mean() == pytest.approx(1)
    mean = scaled.out[counted].mean(0)
    loss = losses.squared_error(mean.expand_as(scaled.out), scaled.out, counted)
    assert float(loss) == pytest.approx(1)


@pytest.mark.parametrize("act_fn", ["topk", "topk_relu", "batchtopk", "jumprelu", "relu"])
def test_folding_scales_is_exact(act_fn):
    k = 3 if "topk" in act_fn else None
    (lorsa,) = lorsas((0,), act_fn=act_fn, k=k, dtype="float64").values()
    if act_fn == "batchtopk":
        lorsa.threshold.fill_(0.2)
    record, _ = a_record()
    scales = Scales(x=0.37, out=5.1)
    expected = lorsa(record.x.double())
    rescale(lorsa, scales, to_raw=False)
    scaled = lorsa(record.x.double() * scales.x) / scales.out
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-12)
    rescale(lorsa, scales, to_raw=True)
    torch.testing.assert_close(lorsa(record.x.double()), expected, rtol=1e-9, atol=1e-12)


def test_the_initial_gain_is_the_least_squares_one():
    record, counted = a_record()
    (lorsa,) = lorsas((0,), dtype="float32").values()
    torch.nn.init.normal_(lorsa.b_O)

    def error(gain):
        with torch.no_grad():
            written = (lorsa(record.x) - lorsa.b_O) * gain
            return float((record.out - lorsa.b_O - written)[counted].square().sum())

    trials = {gain / 1000: error(gain / 1000) for gain in range(1, 2000)}
    best = min(trials, key=trials.get)
    gain = fit_gain(lorsa, record, counted)
    assert gain == pytest.approx(best, abs=1e-3) or (best == 0.001 and gain == 1.0)
    assert error(1.0) == pytest.approx(trials[best], rel=1e-3)


def test_penalties_against_loops():
    (lorsa,) = lorsas((0,), act_fn="relu", k=None).values()
    record, counted = a_record()
    output = lorsa.outputs(record.x)
    total, n = 0.0, 0
    acts, writes = output.acts_pre.detach(), lorsa.W_O.detach()
    for b in range(4):
        for s in range(N_POS):
            if counted[b, s]:
                n += 1
                for z, w in zip(acts[b, s], writes, strict=True):
                    total += max(0.0, float(z)) * float(w.norm())
    penalty = losses.l1_penalty(lorsa, output, counted)
    assert penalty.item() == pytest.approx(total / n, rel=1e-5)
    assert n == 20


def test_l0_penalty_counts_and_pulls_thresholds_up():
    (lorsa,) = lorsas((0,), act_fn="jumprelu", k=None, jumprelu_init_threshold=0.2,
                      jumprelu_bandwidth=0.1).values()  # fmt: skip
    record, counted = a_record()
    output = lorsa.outputs(record.x)
    penalty = losses.l0_penalty(lorsa, output, counted)
    scores = output.acts_pre * lorsa.W_O.norm(dim=-1)
    above = (scores > 0.2)[counted].sum(-1).double().mean()
    assert penalty.item() == pytest.approx(above.item(), rel=1e-6)
    penalty.backward()
    near = ((scores - 0.2).abs() < 0.05)[counted].sum(0) / 20
    # d/d log(threshold) = threshold * (-1 / bandwidth) for each score near it
    torch.testing.assert_close(lorsa.log_threshold.grad, -2.0 * near)


def test_auxiliary_loss_is_what_dead_heads_leave_of_the_error():
    (lorsa,) = lorsas((0,)).values()
    record, counted = a_record()
    output = lorsa.outputs(record.x)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 7, 9]] = True
    loss = losses.auxiliary_loss(lorsa, output, record.out, counted, dead, aux_k=2)
    residual = (record.out - output.recons).detach()
    acts, writes = output.acts_pre.detach(), lorsa.W_O.detach()
    error = variance = 0.0
    for b in range(4):
        for s in range(N_POS):
            if not counted[b, s]:
                continue
            scores = {h: abs(acts[b, s, h]) * writes[h].norm() for h in (2, 7, 9)}
            best = sorted(scores, key=scores.get)[-2:]
            guess = sum(acts[b, s, h] * writes[h] for h in best)
            error += float((guess - residual[b, s]).square().sum())
            variance += float(residual[b, s].square().sum())
    assert loss.item() == pytest.approx(error / variance, rel=1e-5)
    nothing = losses.auxiliary_loss(lorsa, output, record.out, counted, dead & False, aux_k=2)
    assert float(nothing) == 0


def test_a_step_is_adam_on_the_mean_squared_error(tmp_path):
    """Against a step written out: gradients by autograd on raw tensors, then torch's Adam."""
    cfg = config(tmp_path, aux_coefficient=0.0, lr_warm_up_fraction=0.0, token_weights="uniform")
    (ours,) = lorsas((0,)).values()
    (theirs,) = lorsas((0,)).values()
    record, counted = a_record()
    LayerTrainer(ours, Scales(1.0, 1.0), cfg).step([Part(record, counted)], 0)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=cfg.lr, betas=(0.9, 0.99))
    errors = (theirs(record.x) - record.out).square().sum(-1)
    (errors[counted].sum() / counted.sum()).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.max_grad_norm)
    optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_accumulated_parts_are_the_whole_batch(tmp_path):
    record, counted = a_record()
    counted[0, 2:] = False  # parts count differently many tokens
    whole, halves = (next(iter(lorsas((0,)).values())) for _ in range(2))
    cfg = config(tmp_path, aux_coefficient=0.0)
    a = LayerTrainer(whole, Scales(1.0, 1.0), cfg).step([Part(record, counted)], 0)
    parts = [Part(record.batch(rows), counted[rows]) for rows in (slice(0, 2), slice(2, 4))]
    b = LayerTrainer(halves, Scales(1.0, 1.0), cfg).step(parts, 0)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.l0 == pytest.approx(b.l0, rel=1e-6)
    for name, parameter in whole.named_parameters():
        other = halves.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


def test_heads_that_do_not_stay_die_and_come_back(tmp_path):
    cfg = config(tmp_path, dead_feature_window=30, lr=1e-9, balance_rate=0.0, resample_every=0)
    (lorsa,) = lorsas((0,), n_ov_heads=40, k=1).values()
    layer = LayerTrainer(lorsa, Scales(1.0, 1.0), cfg)
    source = iter(ToySource([0], 4))
    fired = []
    for step in range(3):
        batch = next(source)
        layer.step([Part(batch.records[0], batch.counted)], step)
        code = lorsa.encode(batch.records[0].x)
        fired.append(set(code.indices[batch.counted].flatten().tolist()))
    # 20 counted tokens a step: after 3 steps those that did not stay in the last two are dead
    assert set(layer.dead.nonzero().flatten().tolist()) == set(range(40)) - fired[1] - fired[2]


@pytest.mark.parametrize("native", [False, True])
def test_autocast_chooses_nearly_the_same_heads(native, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda _: native)
    (lorsa,) = lorsas((0,), n_ov_heads=64, k=4).values()
    record, _ = a_record()
    exact = lorsa.outputs(record.x)
    with torch.autocast("cpu", torch.bfloat16):
        half = lorsa.outputs(record.x)
    assert half.code.values.dtype == torch.float32
    same = [
        len(set(a.tolist()) & set(b.tolist())) / 4
        for a, b in zip(exact.code.indices.flatten(0, 1), half.code.indices.flatten(0, 1),
                        strict=True)
    ]  # fmt: skip
    assert sum(same) / len(same) > (0.9 if native else 0.9999)
    error = losses.squared_error(exact.recons, record.out, a_record()[1])
    fvu = error.item()
    metrics = LayerTrainer(lorsa, Scales(1.0, 1.0), config(tmp_path, autocast=True)).step(
        [Part(*a_record())], 0
    )
    assert metrics.fvu == pytest.approx(fvu, rel=0.05)


def test_schedules(tmp_path):
    cfg = config(tmp_path, lr_warm_up_fraction=0.1, lr_decay_fraction=0.5)
    factors = [schedules.lr_factor(cfg, step) for step in range(cfg.n_steps)]
    assert cfg.n_steps == 40
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[20] == 1.0
    assert factors[30] == 0.5
    assert factors[39] == pytest.approx(0.05)
    cosine = cfg.replace(lr_scheduler="cosine")
    assert schedules.lr_factor(cosine, 30) == pytest.approx(0.5)
    assert schedules.lr_factor(cosine, 35) == pytest.approx(0.146447, abs=1e-6)
    assert schedules.lr_factor(cfg.replace(lr_scheduler="constant"), 39) == 1.0
    annealed = cfg.replace(k_start=12, k_anneal_fraction=0.25)
    assert [schedules.k_at(annealed, 2, step) for step in (0, 5, 9, 10, 39)] == [12, 7, 3, 2, 2]
    assert schedules.k_at(cfg, None, 0) is None


# ------------------------------------------------------------------------------- whole runs


def test_a_run_learns_logs_and_saves(tmp_path):
    cfg = config(tmp_path, training_tokens=300 * 4 * N_POS, checkpoint_every=100, log_every=50)
    trained = trainer(cfg, k=6, n_ov_heads=48).run(progress=False)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [49, 99, 149, 199, 249, 299]
    assert lines[-1]["blocks.1/losses/mse_loss"] < 0.5 * lines[0]["blocks.1/losses/mse_loss"]
    assert lines[-1]["blocks.0/metrics/l0"] == pytest.approx(6)
    assert lines[-1]["details/n_training_samples"] == 300 * 4 * N_POS
    record, counted = a_record()
    for layer, lorsa in trained.items():
        assert not lorsa.training
        saved = Lorsa.from_pretrained(tmp_path / "run" / "lorsas" / f"blocks.{layer}")
        torch.testing.assert_close(saved(record.x), lorsa(record.x))
        # on raw scale: about as good as the last line says
        error = (lorsa(record.x) - record.out)[counted].square().sum(-1).mean().detach()
        variance = (record.out[counted] - record.out[counted].mean(0)).square().sum(-1).mean()
        assert float(error / variance) < 2 * lines[-1][f"blocks.{layer}/losses/mse_loss"] + 0.05


def test_a_run_without_a_directory_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config(tmp_path, output_path=None)
    in_memory = weights(trainer(cfg).run(progress=False))
    assert list(tmp_path.iterdir()) == []
    assert_equal(in_memory, weights(trainer(config(tmp_path)).run(progress=False)))


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole = weights(trainer(config(tmp_path / "whole")).run(progress=False))
    cfg = config(tmp_path / "parts")
    for poison in (13, 27):  # the source breaks the run twice
        broken = trainer(cfg, resume=True, poison_at=poison)
        with pytest.raises(TrainingError, match=rf"layer 1, step {poison}.*last good checkpoint"):
            broken.run(progress=False)
    resumed = trainer(cfg, resume=True)
    assert resumed.n_done == 25
    assert_equal(weights(resumed.run(progress=False)), whole)
    lines = (tmp_path / "parts/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(40))


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trainer import config, trainer
run = trainer(config(Path({folder!r})), resume=True, delay=0.02)
print("begun", flush=True)
run.run(progress=False)
"""


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    whole = weights(trainer(config(tmp_path / "whole")).run(progress=False))
    cfg = config(tmp_path / "killed")
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    places = []
    for wait in (0.35, 0.6, 0.15):
        command = [sys.executable, "-c", code]
        root = Path(__file__).parents[1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout.readline() == "begun\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        found = checkpoints(tmp_path / "killed/run/checkpoints")
        places.append(found[-1].step if found else 0)
    assert places == sorted(places)
    assert_equal(weights(trainer(cfg, resume=True).run(progress=False)), whole)


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path):
    whole = weights(trainer(config(tmp_path / "whole")).run(progress=False))
    cfg = config(tmp_path / "stopped", checkpoint_every=0)
    run = trainer(cfg)
    step = run._step

    def interrupted(batches):
        if run.n_done == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batches)

    run._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.run(progress=False)
    assert [c.step for c in checkpoints(tmp_path / "stopped/run/checkpoints")] == [18]
    assert_equal(weights(trainer(cfg, resume=True).run(progress=False)), whole)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    cfg = config(tmp_path, n_checkpoints_kept=2)
    run = trainer(cfg)
    run.run(progress=False)
    kept = [c.step for c in checkpoints(tmp_path / "run/checkpoints")]
    assert kept[-2:] == [35, 40]
    assert set(kept) - {35, 40} <= {run._best[1]}
    assert run._best[1] in kept


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    run = trainer(config(tmp_path))
    batches = run._batches()
    run._step(next(batches))
    run.save()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run._step(next(batches))
    monkeypatch.setattr("lorsa_lens.training.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    monkeypatch.undo()
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000001"]
    assert trainer(config(tmp_path), resume=True).n_done == 1


def test_what_cannot_be_resumed_is_refused(tmp_path):
    cfg = config(tmp_path)
    run = trainer(cfg)
    run._step(next(run._batches()))
    checkpoint = run.save()
    with pytest.raises(FileExistsError, match="holds a run already: give resume=True"):
        trainer(cfg)
    with pytest.raises(CheckpointError, match=r"made with lr = 0.003, not 0.1"):
        trainer(cfg.replace(lr=0.1), resume=True)
    with pytest.raises(CheckpointError, match="trains layers 0, 1, not 0"):
        trainer(cfg, resume=True, layers=(0,))
    state = json.loads((checkpoint.path / "state.json").read_text())
    (checkpoint.path / "state.json").write_text(json.dumps({**state, "format_version": 9}))
    with pytest.raises(CheckpointError, match=r"format_version 9.*Upgrade"):
        trainer(cfg, resume=True)
    (checkpoint.path / "state.json").write_text(json.dumps(state)[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer(cfg, resume=True)
    (checkpoint.path / "state.json").write_text(json.dumps(state))
    weights_file = checkpoint.path / "layer_1.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer_1.safetensors cannot be read"):
        trainer(cfg, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size_tokens": 25}, "train_batch_size_tokens = 25 must be a multiple of con"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps = 3 must divide the 4"),
        ({"lr": 0.0}, "lr = 0.0 must be a positive number"),
        ({"adam_beta2": 1.0}, "adam_beta2 = 1.0 must be below 1"),
        ({"k_start": 8}, "k_start and k_anneal_fraction go together"),
        ({"lr_warm_up_fraction": 0.8}, "must not exceed 1 together"),
        ({"dead_feature_window": 0}, "dead_feature_window = 0 must be a positive integer"),
        ({"wandb_project": 3}, "wandb_project = 3 must be a string or None"),
    ],
)
def test_config_errors_name_field_value_and_remedy(tmp_path, changes, message, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_config_files(tmp_path):
    cfg = config(tmp_path, k=5)
    (tmp_path / "a.json").write_text(json.dumps(cfg.to_dict()))
    assert TrainingConfig.from_file(tmp_path / "a.json") == cfg
    (tmp_path / "a.yaml").write_text("k: 5\nlr: 1.0e-3\n")
    assert TrainingConfig.from_file(tmp_path / "a.yaml").lr == 1e-3
    (tmp_path / "b.yaml").write_text("learning_rate: 5\nlr_warm_up_steps: 3\n")
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        TrainingConfig.from_file(tmp_path / "b.yaml")
    for text, message in (("[1", "cannot be read"), ("- 1\n", "holds list, not a mapping")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            TrainingConfig.from_file(tmp_path / "c.yaml")
