"""The examples run as they stand, and the numbers they print are what they claim."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_tested_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "induction_heads",
        "ioi_gpt2",
        "splice_and_look",
        "successor_heads",
        "trace_recall",
    }


def test_splice_and_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():  # restores the mode that the example sets
        names = runpy.run_path(str(EXAMPLES / "splice_and_look.py"))
    torch.testing.assert_close(
        names["logits"], names["model"](names["tokens"]), rtol=1e-4, atol=1e-4
    )
    assert "largest difference of a logit" in capsys.readouterr().out
    assert (tmp_path / "lorsa_demo" / "splice_and_look.html").stat().st_size > 1_000_000


def test_induction_heads_are_found_and_carry_induction():
    numbers = runpy.run_path(str(EXAMPLES / "induction_heads.py"))["main"](n_steps=300)
    assert numbers["cross entropy recovered"] > 0.99
    assert numbers["share of their z pattern on the source"] > 0.9
    assert numbers["accuracy"] > 0.98
    assert numbers["accuracy without them"] < 0.3


def test_successor_heads_are_found(capsys):
    found = runpy.run_path(str(EXAMPLES / "successor_heads.py"))["main"](n_steps=400)
    out = capsys.readouterr().out
    assert all(found[rule] for rule in ("nextnum", "nextday", "nextord"))
    for rule in found:
        share = int(out.split(f"\n{rule}: ")[1].split("heads, ")[1].split("%")[0])
        assert share > 70
    # one attention head serves many rules, a Lorsa head one
    assert "  nextnum    0.2\n" in out
    heads = [head for rule in found.values() for head in rule]
    assert len(heads) == len(set(heads))


def test_the_recall_circuit_is_traced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the IOI example is run in test_singular_cli.py
    numbers = runpy.run_path(str(EXAMPLES / "trace_recall.py"))["main"](retrain=False, n_prompts=3)
    assert "head.L0.0.6.5      -> head.L1.0.33.6     through the src" in capsys.readouterr().out
    assert numbers["weight of the source edge"] > 0.9
    assert numbers["attention after ablating, change"] < -0.5
    assert abs(numbers["the same for random vectors"]) < 0.1
    assert numbers["cumulative, singular"] < 0.7 * numbers["cumulative, rotated (null)"]
    assert "<svg" in (tmp_path / "lorsa_trace" / "recall.html").read_text()


def test_the_readme_shows_the_example():
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    lines = [line.split("  #")[0].rstrip() for line in code.splitlines() if line.strip()]
    example = (EXAMPLES / "splice_and_look.py").read_text()
    missing = [line for line in lines if not line.startswith("#") and line not in example]
    assert not missing
    assert len(lines) <= 26
