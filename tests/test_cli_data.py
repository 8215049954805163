"""`lorsa-lens cache-activations`, `lift` and `train --dry-run`, as a user types them."""

import json
import re
from importlib.metadata import version

import jaxtyping
import pytest
import torch
from test_train import SMALL, invoke, llama, words  # noqa: F401 - a fixture

from lorsa_lens import Lorsa, splice
from lorsa_lens.data import CachedActivations
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.recording import record_attention
from lorsa_lens.training.layer import LayerTrainer
from lorsa_lens.training.memory import estimate_memory, resident_bytes
from lorsa_lens.training.run_config import RunConfig
from lorsa_lens.training.trial import trial_peak


def said(result):
    return re.sub(r"[\s│┃]+", " ", result.output)


# ------------------------------------------------------------------------------ cache-activations


def test_cached_on_the_command_line_then_trained(llama, tmp_path):  # noqa: F811
    text, cache, run = tmp_path / "text.txt", tmp_path / "cache", tmp_path / "run"
    text.write_text(words(700))
    arguments = ["cache-activations", "--model", llama, "--tokens", text, "--output-path", cache,
                 "--n-tokens", 480, "--context-size", 16, "--model-batch-size", 4]  # fmt: skip
    stated = invoke(*arguments, "--dry-run")
    assert stated.exit_code == 0, stated.output
    assert not cache.exists()
    amount = re.search(r"480 tokens of 2 layers take ([\d.]+) kB in", said(stated))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    n_bytes = sum(path.stat().st_size for path in cache.glob("*.safetensors"))
    assert n_bytes <= 1000 * float(amount[1]) <= 1.2 * n_bytes
    model = load_host(str(llama))
    batch = next(iter(CachedActivations(cache, model, batch_size=30)))
    assert batch.tokens.shape == (30, 16)
    assert (batch.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert not batch.counted[:, 0].any()
    assert batch.counted[:, 1:].all()
    expected = record_attention(model, batch.tokens, [1])[1]
    torch.testing.assert_close(batch.records[1].out, expected.out)
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    trained = invoke("train", "--model", llama, "--cached-activations-path", cache,
                     "--output-path", run, *fields)  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert Lorsa.from_pretrained(run / "lorsas" / "blocks.0").cfg.n_ov_heads == 64
    assert str(cache) in (run / "README.md").read_text()
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "is not empty: give a new one, or resume=True" in said(again)
    resumed = invoke(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output


def test_options_of_a_cache(llama, tmp_path):  # noqa: F811
    text, cache, file = tmp_path / "text.txt", tmp_path / "cache", tmp_path / "cache.yaml"
    text.write_text(words(300))
    file.write_text(f"model: {llama}\ntokens: {text}\noutput_path: {cache}\ncontext_size: 8\n")
    result = invoke("cache-activations", file, "--layers", 1, "--n-tokens", 80, "--dtype",
                    "bfloat16", "--no-prepend-bos")  # fmt: skip
    assert result.exit_code == 0, result.output
    source = CachedActivations(cache, batch_size=10)
    assert source.layers == [1]
    batch = next(iter(source))
    assert batch.records[1].x.dtype == torch.bfloat16
    assert batch.counted.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "incomplete CacheConfig: it lacks model, output_path, tokens"),
        (["--model", "./no", "--tokens", "x.npy", "--output-path", "y"], "there is no folder ./no"),
        (["--model", "LLAMA", "--tokens", "x.npy", "--output-path", "y"], "there is no file x.npy"),
        (["--model", "LLAMA", "--tokens", "x.npy", "--output-path", "y", "--dtype", "int8"],
         "dtype = 'int8' must be one of"),
        (["--model", "LLAMA", "--tokens", "TEXT", "--output-path", "y", "--layers", "7"],
         "layer = 7, but the model has layers 0 to 1"),
    ],
)  # fmt: skip
def test_mistakes_of_a_cache(llama, tmp_path, arguments, message, monkeypatch):  # noqa: F811
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    (tmp_path / "text.txt").write_text(words(10))
    paths = {"LLAMA": llama, "TEXT": tmp_path / "text.txt"}
    result = invoke("cache-activations", *(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert "Traceback" not in result.output


# ------------------------------------------------------------------------------------------- lift


def test_lifted_layers_are_the_layers(llama, tmp_path):  # noqa: F811
    result = invoke("lift", "--model", llama, "--output-path", tmp_path)
    assert result.exit_code == 0, result.output
    model = load_host(str(llama))
    lorsas = [Lorsa.from_pretrained(tmp_path / f"blocks.{layer}") for layer in (0, 1)]
    ids = torch.arange(4, 40)[None]
    expected = model(ids)
    with splice(model, lorsas):
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    again = invoke("lift", "--model", llama, "--output-path", tmp_path, "--layers", 1)
    assert again.exit_code == 2
    assert "blocks.1: there already; give --overwrite to replace" in said(again)
    before = (tmp_path / "blocks.0" / "lorsa.safetensors").read_bytes()
    replaced = invoke("lift", "--model", llama, "--output-path", tmp_path, "--layers", 1,
                      "--n-ov-heads", 128, "--k", 8, "--overwrite")  # fmt: skip
    assert replaced.exit_code == 0, replaced.output
    assert "layer 1: 4 query-key circuits, 128 heads, K 8, in" in said(replaced)
    cfg = Lorsa.from_pretrained(tmp_path / "blocks.1").cfg
    assert (cfg.n_ov_heads, cfg.k, cfg.layer) == (128, 8, 1)
    assert (tmp_path / "blocks.0" / "lorsa.safetensors").read_bytes() == before


@pytest.mark.parametrize("init", ["tied", "svd", "random"])
def test_an_initialisation_is_the_one_of_python(llama, tmp_path, init):  # noqa: F811
    result = invoke("lift", "--model", llama, "--output-path", tmp_path, "--layers", 0, "--init",
                    init, "--n-qk-heads", 8, "--n-ov-heads", 64, "--k", 4, "--seed", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    model, lorsa = load_host(str(llama)), Lorsa.from_pretrained(tmp_path / "blocks.0")
    same = Lorsa.from_attention(model, 0, init=init, seed=3, n_qk_heads=8, n_ov_heads=64, k=4)
    for name, tensor in same.state_dict().items():
        assert torch.equal(lorsa.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "exact", "--n-ov-heads", 64], "init = 'exact' needs the layer's own sizes"),
        (["--layers", 2], "layer = 2, but the model has layers 0 to 1"),
        (["--n-ov-heads", 66], "n_ov_heads = 66 must be a multiple of n_qk_heads = 4"),
    ],
)
def test_mistakes_of_a_lift_write_nothing(llama, tmp_path, arguments, message):  # noqa: F811
    result = invoke("lift", "--model", llama, "--output-path", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- dry run


def test_a_dry_run_prints_the_estimate_and_writes_nothing(llama, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    result = invoke("train", "--model", llama, "--tokens", "not_there.txt", *fields, "--dry-run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    cfg = RunConfig(model=str(llama), tokens="x", **SMALL).training()
    needs = estimate_memory(load_host(str(llama)), cfg)

    def in_table(row):
        number, unit = re.search(rf" {row} ([\d.]+) (bytes|kB|MB)", said(result)).groups()
        return float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[unit]

    for row, name in (
        ("peak", "peak"), ("Lorsas: weights", "weights"), ("Lorsas: gradients", "gradients"),
        ("Lorsas: Adam", "optimizer"), ("language model", "language_model"), ("disk", "disk"),
        ("one Lorsa's step", "lorsa_step"), ("batches prepared ahead", "prefetched"),
    ):  # fmt: skip
        assert in_table(row) == pytest.approx(getattr(needs, name), rel=0.03), row


def test_a_trial_measures_some_steps_and_leaves_nothing(llama, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "text.txt").write_text(words(400))
    monkeypatch.chdir(tmp_path)
    steps = []
    step = LayerTrainer.step
    monkeypatch.setattr(
        LayerTrainer, "step", lambda self, *args: steps.append(args[1]) or step(self, *args)
    )
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["train", "--model", llama, "--tokens", "text.txt", *fields, "--layers", "0"]
    result = invoke(*arguments, "--dry-run", "--trial-steps", "3")
    assert result.exit_code == 0, result.output
    assert steps == [0, 1, 0, 1, 2]  # two that the estimate plays through, three real ones
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    number, unit = re.search(r"measured in 3 steps ([\d.]+) (MB|GB)", said(result)).groups()
    measured = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
    assert measured >= 0.98 * resident_bytes()  # the most so far is not below what is held now
    assert "goes with --dry-run" in said(invoke(*arguments, "--trial-steps", "3"))


def test_a_trial_sees_what_steps_hold(llama, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "text.txt").write_text(words(400))
    cfg = RunConfig(model=str(llama), tokens=str(tmp_path / "text.txt"), layers=(0,), **SMALL)
    step, before = LayerTrainer.step, trial_peak(cfg, 1)
    n_bytes = before - resident_bytes() + 200_000_000

    def hungry(self, *args):
        held = torch.ones(n_bytes // 4)
        assert held.sum() > 0
        return step(self, *args)

    monkeypatch.setattr(LayerTrainer, "step", hungry)
    assert trial_peak(cfg, 1) > before + 100_000_000
    with pytest.raises(ValueError, match="n_steps = 0: give at least 1"):
        trial_peak(cfg, 0)


# -------------------------------------------------------------------------------- a run's directory


def test_a_run_that_is_killed_has_said_what_it_was(llama, tmp_path, monkeypatch):  # noqa: F811
    def killed(*args, **kwargs):
        raise SystemExit(9)

    (tmp_path / "text.txt").write_text(words(200))
    run = tmp_path / "run"
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["train", "--model", llama, "--tokens", tmp_path / "text.txt",
                 "--output-path", run, *fields]  # fmt: skip
    monkeypatch.setattr("lorsa_lens.training.run.train", killed)
    assert invoke(*arguments).exit_code == 9
    config = json.loads((run / "run_config.json").read_text())
    assert (config["model"], config["k"], config["lr"]) == (str(llama), 4, 0.003)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["git"] is None or set(environment["git"]) == {"commit", "changed_files"}
    assert not (run / "README.md").exists()
    monkeypatch.undo()
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    other = invoke(*arguments, "--lr", 0.5)
    assert other.exit_code == 2
    assert "holds a run already" in said(other)
    assert json.loads((run / "run_config.json").read_text())["lr"] == 0.003
