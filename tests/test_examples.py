"""The examples run as they stand, and what they print is what they claim."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import word_models
import zoo
from test_notebooks import check_superposition

EXAMPLES = Path(__file__).parents[1] / "examples"
WITH_OPTIONS = (
    "attention_superposition",
    "global_induction_circuit",
    "circuit_of_recall",
    "gpt2_pythia",
    "induction_heads",
    "ioi_gpt2",
    "name_tracking_on_tinystories",
    "successor_heads",
    "trace_recall",
)


def run(name, *arguments, **constants):
    """What an example's `main` returns for a command line, with other constants."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    assert constants.keys() <= main.__globals__.keys()
    main.__globals__.update(constants)
    return main([str(argument) for argument in arguments])


def check_page(path, *texts):
    """A page that holds these texts and fetches nothing."""
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "default-src 'none'" in page
    for text in texts:
        assert text in page


def test_every_example_is_run_by_a_test():
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    for example in EXAMPLES.glob("*.py"):
        assert any(f'"{example.stem}"' in text or example.name in text for text in tests)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_help_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    doc = runpy.run_path(str(EXAMPLES / f"{name}.py"))["__doc__"]
    assert doc.strip() in out
    assert "--out" in out


def test_splice_and_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():  # restores the mode that the example sets
        names = runpy.run_path(str(EXAMPLES / "splice_and_look.py"))
    torch.testing.assert_close(
        names["logits"], names["model"](names["tokens"]), rtol=1e-4, atol=1e-4
    )
    assert "largest difference of a logit" in capsys.readouterr().out
    assert (tmp_path / "lorsa_demo" / "splice_and_look.html").stat().st_size > 1_000_000


def test_induction_heads_are_found_and_carry_induction(tmp_path, capsys):
    found = run("induction_heads", "--steps", 250, "--out", tmp_path / "page.html")
    assert len(found.heads) >= 10
    assert found.ce_recovered >= 0.99
    assert found.share > 0.9
    assert found.accuracy > 0.98
    assert found.accuracy_without < 0.3
    assert f"L1.{found.heads[0]}" in capsys.readouterr().out
    check_page(tmp_path / "page.html", "cross entropy recovered", "CircuitsVis.render")


def test_a_transformer_is_read_off_its_weights(tmp_path, capsys):
    out = ("--out", tmp_path / "page.html", "--graphml", tmp_path / "circuit.graphml")
    found = run("global_induction_circuit", "--steps", 120, *out)
    assert found.accuracy > 0.98
    assert found.key_match > 20 * abs(found.query_match)
    assert "L1.qk0: it looks for the token at hand among what was fetched by" in found.program
    assert found.program in capsys.readouterr().out
    check_page(tmp_path / "page.html", "Heads that make circuits attend", "of a corpus")
    assert "L1.qk0" in (tmp_path / "circuit.graphml").read_text()


def test_successor_heads_are_found(tmp_path, capsys):
    found = run("successor_heads", "--steps", 400, "--out", tmp_path / "page.html")
    assert [successors.rule for successors in found] == ["nextnum", "nextday", "nextord"]
    for successors in found:
        assert successors.heads
        assert successors.share >= 0.9
        # causal, and for this rule alone
        assert successors.accuracy > 0.95
        assert successors.accuracy_without < 0.75
        assert successors.others_without > 0.95
    # one attention head serves all three rules, a Lorsa head one
    assert all(2 in successors.attended for successors in found)
    heads = [head for successors in found for head in successors.heads]
    assert len(heads) == len(set(heads))
    assert f"L0.{found[0].heads[0]}" in capsys.readouterr().out
    check_page(tmp_path / "page.html", "nextnum", "CircuitsVis.render")


def test_superposition_is_taken_apart_and_an_sae_stands_beside(tmp_path, capsys):
    page = tmp_path / "page.html"
    found = run("attention_superposition", "--steps", 120, "--out", page, N_TEST=96)
    check_superposition(found)
    out = capsys.readouterr().out
    for heading in ("Attention heads are shared", "Pulled apart", "What stays mixed"):
        assert heading in out
    check_page(page, "SAE features", "has none", "CircuitsVis.render")


def test_any_model_of_the_hub_on_one_in_a_folder(tmp_path, capsys):
    with zoo.quiet():
        folder = word_models.save_gpt2("induction", tmp_path / "words")
    page = tmp_path / "page.html"
    sizes = ("--steps", 60, "--heads", 128, "--k", 4)
    with zoo.quiet():
        found = run("gpt2_pythia", "--model", folder, "--layer", 1, *sizes, "--out", page)
    assert found.layer == 1
    assert found.fidelity.ce_recovered > 0.9
    assert len(found.heads) >= 10
    assert found.validation.cost > 2 * found.validation.random_cost
    assert "induction" in capsys.readouterr().out
    check_page(page, "words, layer 1", "CircuitsVis.render")


def test_any_model_of_the_hub_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        run("gpt2_pythia", "--model", tmp_path / "nothing")
    with zoo.quiet():
        folder = word_models.save_gpt2("induction", tmp_path / "words")
    with zoo.quiet(), pytest.raises(SystemExit, match="--behaviour juggling must be one of: "):
        run("gpt2_pythia", "--model", folder, "--behaviour", "juggling")


def test_name_tracking_says_what_to_do_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Give --model a folder") as ended:
        run("name_tracking_on_tinystories", "--model", "./stories260k")
    assert "there is no folder ./stories260k" in str(ended.value)
    assert "ggml-org/models" in str(ended.value)
    with zoo.quiet():
        folder = word_models.save_gpt2("induction", tmp_path / "words")
    with zoo.quiet(), pytest.raises(SystemExit, match="no two first names"):
        run("name_tracking_on_tinystories", "--model", folder, "--layer", 1)


def test_the_heads_that_track_names(assets, tmp_path, capsys):
    """At small settings: a Lorsa that is hardly trained has the heads already."""
    pytest.importorskip("transformers", "5", reason="the tokenizer's file is of transformers 5")
    tokens = np.load(assets / "stories260k" / "val_tokens.npy")[:64]
    np.save(tmp_path / "tokens.npy", tokens)
    page = tmp_path / "page.html"
    files = ("--model", assets / "stories260k", "--tokens", tmp_path / "tokens.npy", "--out", page)
    sizes = ("--steps", 30, "--heads", 256, "--k", 16)
    with zoo.quiet():
        found = run("name_tracking_on_tinystories", *files, *sizes, N_READ=32, N_CHANGED=16)
    assert found.attention_head == 6
    assert found.attention_cost > 0.5
    assert found.validation.cost > 0.1 * found.attention_cost
    assert found.validation.cost > 3 * found.validation.random_cost
    assert found.validation.cost_elsewhere < 0.05
    assert "attention head L2H6, at its mean" in capsys.readouterr().out
    check_page(page, "L2H6", "CircuitsVis.render")


def test_the_recall_circuit_is_traced(tmp_path, capsys):
    page = tmp_path / "recall.html"  # the IOI example is run in test_singular_cli.py
    numbers = run("trace_recall", "--no-training", "--prompts", 3, "--out", page)
    assert numbers["weight of the source edge"] > 0.9
    assert numbers["attention after ablating, change"] < -0.5
    assert abs(numbers["the same for random vectors"]) < 0.1
    assert numbers["cumulative, singular"] < 0.7 * numbers["cumulative, rotated (null)"]
    assert "cumulative, singular" in capsys.readouterr().out
    check_page(page, "<svg", "The circuit of the first prompt")


def test_ioi_says_that_there_is_no_model(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        run("ioi_gpt2", "--model", tmp_path / "nothing")


def test_the_readme_shows_the_example():
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    lines = [line.split("  #")[0].rstrip() for line in code.splitlines() if line.strip()]
    example = (EXAMPLES / "splice_and_look.py").read_text()
    missing = [line for line in lines if not line.startswith("#") and line not in example]
    assert not missing
    assert len(lines) <= 26
