"""From text to Lorsas: the front doors of training, the command line, and records in memory."""

import json
import re
import shutil
from dataclasses import fields

import jaxtyping
import pytest
import torch
import zoo
from typer.testing import CliRunner

from lorsa_lens import Lorsa, run_with_lorsas
from lorsa_lens.cli import app
from lorsa_lens.data import RecordedActivations
from lorsa_lens.evaluation import evaluate
from lorsa_lens.functional import precision
from lorsa_lens.recording import record_attention
from lorsa_lens.training import TrainingConfig, train, train_on
from lorsa_lens.training.run_config import RunConfig

SMALL = {
    "n_ov_heads": 64, "k": 4, "context_size": 16, "train_batch_size_tokens": 128,
    "training_tokens": 128 * 20, "prefetch_batches": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Hugging Face model and its tokenizer."""
    zoo.by_name("bridge-llama")
    folder = tmp_path_factory.mktemp("llama")
    zoo.hugging_face(torch.float32, "Llama").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def words(n, seed=0):
    ids = torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def test_all_layers_are_trained_from_one_pass_and_get_better():
    model = zoo.by_name("learned").build(torch.float32)
    tokens = zoo.tokens(batch=64, pos=16)
    few, many = (
        train(model, tokens, config=TrainingConfig(**{**SMALL, "training_tokens": n * 128}),
              progress=False)
        for n in (1, 150)
    )  # fmt: skip
    assert list(many) == [0, 1]
    for layer in many:
        before, after = (evaluate(model, lorsas[layer], tokens)[0].fvu for lorsas in (few, many))
        assert after < 0.6 * before
    assert run_with_lorsas(model, tokens, lorsas=list(many.values())).isfinite().all()


def test_one_layer_and_its_sizes_by_default():
    model = zoo.by_name("learned").build(torch.float32)
    config = TrainingConfig(context_size=16, train_batch_size_tokens=64, training_tokens=64)
    (lorsa,) = train(model, zoo.tokens(8, 16), [1], config, progress=False).values()
    assert (lorsa.cfg.layer, lorsa.cfg.n_qk_heads, lorsa.cfg.n_ov_heads) == (1, 4, 8 * 32)
    assert lorsa.cfg.k == 4


def test_training_on_records_is_the_same_each_time():
    model = zoo.by_name("learned").build(torch.float32)
    records = record_attention(model, zoo.tokens(24, 16), [0])

    def trained(seed):
        lorsa = Lorsa.from_attention(model, 0, n_ov_heads=64, k=4)
        config = TrainingConfig(**{**SMALL, "seed": seed})
        return train_on({0: lorsa}, records, config, progress=False)[0].W_O

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_records_in_memory_come_once_each_epoch_and_from_any_place():
    model = zoo.by_name("learned").build(torch.float32)
    tokens = zoo.tokens(10, 8)
    records = record_attention(model, tokens, [0])

    def source():
        return RecordedActivations(records, tokens, batch_size=5, seed=3)

    batches = [batch for _, batch in zip(range(6), source(), strict=False)]
    orders = []
    for epoch in range(3):
        two = torch.cat([batch.tokens for batch in batches[2 * epoch : 2 * epoch + 2]])
        assert sorted(two.tolist()) == sorted(tokens.tolist())
        orders.append(two.tolist())
    assert orders[0] != orders[1] != orders[2]
    resumed = source()
    resumed.load_state_dict(json.loads(json.dumps(batches[2].state)))
    after = next(iter(resumed))
    assert torch.equal(after.tokens, batches[3].tokens)
    assert torch.equal(after.records[0].x, batches[3].records[0].x)
    with pytest.raises(ValueError, match="batch_size = 11 must be from 1 to 10"):
        RecordedActivations(records, tokens, batch_size=11)
    with pytest.raises(ValueError, match="seed = 3, not 4"):
        RecordedActivations(records, tokens, batch_size=5, seed=4).load_state_dict(
            source().state_dict()
        )


def invoke(*arguments):
    wide = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}  # messages on one line
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=wide)


def test_from_a_text_file_to_evaluated_lorsas_on_the_command_line(llama, tmp_path):
    text, run, file = tmp_path / "text.txt", tmp_path / "run", tmp_path / "run.yaml"
    text.write_text(words(800))
    fields = "\n".join(f"{name}: {value}" for name, value in SMALL.items())
    file.write_text(f"model: {llama}\ntokens: {text}\noutput_path: {run}\n{fields}\nlog_every: 5\n")
    result = invoke("train", file, "--layers", "1", "--lr", "0.001")
    assert result.exit_code == 0, result.output
    config = json.loads((run / "run_config.json").read_text())
    assert (config["lr"], config["layers"], config["k"]) == (0.001, [1], 4)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert "torch" in json.loads((run / "environment.json").read_text())["packages"]
    card = (run / "README.md").read_text()
    assert "| 1 | 4 | 64 | 4 | `lorsas/blocks.1` |" in card
    lorsa = Lorsa.from_pretrained(re.search(r'from_pretrained\("(.*)"\)', card)[1])
    assert lorsa.cfg.layer == 1
    from lorsa_lens.hosts.loading import load_host

    model = load_host(str(llama))
    ids = model.tokenizer(words(160, seed=1), return_tensors="pt")["input_ids"]
    ids = ids[0, :160].view(10, 16)
    (fidelity,) = evaluate(model, lorsa, ids)
    assert 0 < fidelity.fvu < 1
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(words(160, seed=1))
    evaluated = invoke("eval", run, "--tokens", held_out)
    assert evaluated.exit_code == 0, evaluated.output
    assert "fvu" in (run / "evaluation.json").read_text()
    assert "<html" in (run / "evaluation.html").read_text()
    again = invoke("train", file, "--layers", "1", "--lr", "0.001")
    assert again.exit_code == 2
    assert "holds a run already" in re.sub(r"[\s│]+", " ", again.output)
    resumed = invoke("train", file, "--layers", "1", "--lr", "0.001", "--resume")
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "incomplete RunConfig: it lacks model"),
        (["--model", "x"], "tokens = None and cached_activations_path = None: give one of them"),
        (["--model", "x", "--tokens", "y", "--k", "0"], "k = 0 must be a positive integer"),
        (["--model", "x", "--tokens", "y", "--act-fn", "best"], "act_fn = 'best' must be one of"),
        (["--learning-rate", "1"], "No such option"),
        (["nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    result = invoke("train", *arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "Traceback" not in result.output


def test_help_has_an_option_for_every_field():
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"})
    text = " ".join(re.sub(r"[\s│]+", " ", result.output).split())
    for field in fields(RunConfig):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "Highest learning rate of Adam. (default 0.003)" in text


def weights_after_two_steps(**changes):
    model = zoo.by_name("learned").build(torch.float32)
    config = TrainingConfig(**{**SMALL, "training_tokens": 256, **changes})
    (lorsa,) = train(model, zoo.tokens(32, 16), [0], config, progress=False).values()
    return lorsa.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_gives_the_same_weights(monkeypatch):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    compiled = torch._dynamo.utils.counters
    compiled.clear()
    fast, plain = weights_after_two_steps(compile=True), weights_after_two_steps()
    assert compiled["stats"]["unique_graphs"] > 0
    for name, tensor in plain.items():
        if name.startswith("W_"):  # biases start at 0, and Adam makes the least gradient a step
            assert (fast[name] - tensor).norm() < 1e-3 * tensor.norm(), name


def test_a_run_under_autocast_stays_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda _: True)
    half, exact = weights_after_two_steps(autocast=True), weights_after_two_steps()
    for name, tensor in exact.items():
        assert half[name].dtype == torch.float32
        if name.startswith("W_"):  # biases start at 0, and Adam makes the least gradient a step
            assert (half[name] - tensor).norm() < 0.05 * tensor.norm(), name
    assert any(not torch.equal(half[name], tensor) for name, tensor in exact.items())
