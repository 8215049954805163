"""The sinks of a run's numbers: names, W&B with a fake package, TensorBoard read back."""

import json
import sys
import types

import pytest
from test_trainer import config, trainer

from lorsa_lens.training.layer import StepMetrics
from lorsa_lens.training.metrics import JsonLines, TensorBoard, named, open_sinks


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.finished = arguments, [], False
        self.id = arguments.get("id", f"id{len(FakeRun.made)}")
        FakeRun.made.append(self)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A package `wandb` that keeps what it is told; gives the list of its runs."""
    FakeRun.made = []
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: FakeRun(arguments)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return FakeRun.made


def test_the_names_are_those_of_saelens():
    metrics = StepMetrics(
        loss=0.5, fvu=0.4, l0=8.0, n_dead=16.0, dead=0.25, aux_loss=0.1, grad_norm=2.0
    )
    assert named(metrics, 3) == {
        "blocks.3/losses/overall_loss": 0.5,
        "blocks.3/losses/mse_loss": 0.4,
        "blocks.3/losses/auxiliary_loss": 0.1,
        "blocks.3/metrics/explained_variance": 0.6,
        "blocks.3/metrics/l0": 8.0,
        "blocks.3/sparsity/dead_features": 16.0,
        "blocks.3/sparsity/dead_fraction": 0.25,
        "blocks.3/details/grad_norm": 2.0,
    }
    without = named(metrics._replace(fvu=None), 3)
    assert set(named(metrics, 3)) - set(without) == {
        "blocks.3/losses/mse_loss", "blocks.3/metrics/explained_variance",
    }  # fmt: skip


def test_weights_and_biases_gets_what_the_file_gets(tmp_path, wandb):
    cfg = config(tmp_path, wandb_project="heads", log_every=10)
    trainer(cfg).run(progress=False)
    (run,) = wandb
    assert run.finished
    assert run.arguments["project"] == "heads"
    assert run.arguments["config"]["lr"] == cfg.lr
    assert "resume" not in run.arguments
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [{"step": step, **values} for step, values in run.logged] == [
        json.loads(line) for line in lines
    ]
    assert [step for step, _ in run.logged] == [9, 19, 29, 39]


def test_a_resumed_run_goes_on_with_its_run_of_weights_and_biases(tmp_path, wandb):
    cfg = config(tmp_path, wandb_project="heads")
    broken = trainer(cfg, poison_at=17)
    with pytest.raises(RuntimeError, match="step 17"):
        broken.run(progress=False)
    assert wandb[0].finished  # also of a run that fails
    trainer(cfg, resume=True).run(progress=False)
    first, second = wandb
    assert (second.arguments["id"], second.arguments["resume"]) == (first.id, "must")
    assert second.logged[0][0] == 15  # from the checkpoint on
    trainer(cfg.replace(wandb_project="others"), resume=True).run(progress=False)
    assert "id" not in wandb[2].arguments


def test_a_run_without_a_directory_still_logs(tmp_path, wandb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(config(tmp_path, wandb_project="heads", output_path=None)).run(progress=False)
    assert len(wandb[0].logged) == 40
    assert list(tmp_path.iterdir()) == []


def scalars(folder):
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module).EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    cfg = config(tmp_path, tensorboard=True, log_every=10)
    trainer(cfg).run(progress=False)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    read = scalars(tmp_path / "run/tensorboard")
    assert set(read) == set(lines[0]) - {"step"}
    for name, values in read.items():
        assert values == [(x["step"], pytest.approx(x[name], rel=1e-6)) for x in lines], name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_steps_after_the_checkpoint_come_once(tmp_path):
    pytest.importorskip("tensorboard")
    for first, last in ((0, 8), (5, 10)):  # stopped at 8, resumed from 5
        sink = TensorBoard(tmp_path, first)
        for step in range(first, last):
            sink.log({"x": step + 100.0 * first}, step)
        sink.close()
    assert scalars(tmp_path)["x"] == [
        *((step, float(step)) for step in range(5)),
        *((step, step + 500.0) for step in range(5, 10)),
    ]


@pytest.mark.parametrize(
    ("option", "package", "message"),
    [
        ({"wandb_project": "heads"}, "wandb", r"wandb_project is set.*'lorsa-lens\[wandb\]'"),
        ({"tensorboard": True}, "torch.utils.tensorboard",
         r"tensorboard is on.*'lorsa-lens\[tensorboard\]'"),
    ],
)  # fmt: skip
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, option, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        open_sinks(config(tmp_path, **option), tmp_path / "run", 0)


def test_lines_after_the_checkpoint_and_a_torn_one_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1.0}\n{"step": 5, "x": 2.0}\n{"step": 9, "x')
    sink = JsonLines(path, 5)
    sink.log({"x": 3.0}, 5)
    sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "x": 1.0}, {"step": 5, "x": 3.0}]


def test_the_progress_bar_shows_loss_fvu_l0_and_dead(tmp_path, capsys):
    trainer(config(tmp_path, training_tokens=24 * 3)).run(progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "training: 100%" in last
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    for name, metric, form in (
        ("loss", "losses/overall_loss", ".4f"),
        ("fvu", "losses/mse_loss", ".4f"),
        ("l0", "metrics/l0", ".1f"),
        ("dead", "sparsity/dead_fraction", ".0%"),
    ):
        mean = (line[f"blocks.0/{metric}"] + line[f"blocks.1/{metric}"]) / 2
        assert f"{name}={format(mean, form)}" in last
