"""`lorsa-lens trace`, and the IOI example, on a tiny stand-in for GPT-2."""

import runpy
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

from lorsa_lens.cli import app
from lorsa_lens.singular import Circuit
from lorsa_lens.singular.prompt import trace_prompt

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "w1 w2 w3 w4 w1 w2 w3"


@pytest.fixture
def model():
    return zoo.by_name("learned").build(torch.float32)


def run(monkeypatch, model, *arguments):
    monkeypatch.setattr("lorsa_lens.hosts.loading.load_host", lambda name: model)
    return CliRunner().invoke(app, ["trace", "--model", "tiny", *arguments])


def test_a_trace_is_written(monkeypatch, model, tmp_path):
    answer = answer_of(model)
    result = run(monkeypatch, model, "--prompt", PROMPT, "--answer", answer, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "circuit.html",
        "circuit.json",
        "circuit.graphml",
        "circuit-tracer.json",
    }
    circuit = Circuit.load(tmp_path / "circuit.json")
    assert f"{len(circuit.nodes)} nodes, {len(circuit.edges)} edges" in result.output
    assert circuit.tokens[-7:] == tuple(PROMPT.split())
    assert circuit.meta["answer"] == answer


def answer_of(model):
    with torch.no_grad():
        return model.to_string(model(model.to_tokens(PROMPT))[0, -1].argmax()[None])


def test_a_logit_difference_is_traced(model):
    answer = answer_of(model)
    wrong = "w5" if answer != "w5" else "w6"
    circuit = trace_prompt(model, PROMPT, answer, wrong)
    assert circuit.meta["wrong"] == wrong
    assert any(edge.down.kind == "root" for edge in circuit.edges)
    # the other way round the difference is negative: nothing writes it
    assert trace_prompt(model, PROMPT, wrong, answer).nodes == ()


def test_errors_are_said(monkeypatch, model, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    result = run(monkeypatch, model, "--prompt", PROMPT, "--answer", "w1 w2", *out)
    assert result.exit_code == 2
    assert "2 tokens" in result.output
    result = run(monkeypatch, model, "--prompt", "", "--answer", "w1", *out)
    assert result.exit_code == 2
    assert "prompt is empty" in result.output
    answer = answer_of(model)
    wrong = "w5" if answer != "w5" else "w6"
    arguments = ("--prompt", PROMPT, "--answer", wrong, "--wrong", answer)
    result = run(monkeypatch, model, *arguments, *out)
    assert result.exit_code == 1
    assert "Nothing to trace" in result.output
    assert not (tmp_path / "out").exists()


def test_the_ioi_example_on_a_stand_in(model, tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "ioi_gpt2.py"))
    names = [("w7", "w8"), ("w9", "w10")]
    example["compare"].__globals__["NAMES"] = names
    model.to_single_token = lambda text: int(model.to_tokens(text.strip(), prepend_bos=False)[0, 0])
    merged = example["compare"](model, "w1 {io} w2 {s} w3 {s} w4", tmp_path / "ioi.html")
    out = capsys.readouterr().out
    assert "w7 and w8" in out
    assert "\nmerged " in out
    assert merged.meta["n_prompts"] == 2
