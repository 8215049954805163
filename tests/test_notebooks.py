"""The notebooks are committed executed, open offline, and do what they say."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = ("attention_superposition", "circuits", "five_minute_tour", "train_your_own")
MAX_BYTES = 4_000_000


def cells(name):
    """The code cells of a notebook."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def output_text(cell):
    """All that a cell shows, as text."""
    parts = []
    for output in cell["outputs"]:
        parts += [output.get("text", ""), *output.get("data", {}).values()]
    return "\n".join("".join(part) for part in parts if not isinstance(part, dict))


def execute(name, folder, monkeypatch, **parameters):
    """Run a notebook's code in this process, with other parameters; its names at the end."""
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        tree = ast.parse("".join(cell["source"]))
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        place = f"{name}.ipynb, code cell {number}"
        exec(compile(tree, place, "exec"), names)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), place, "eval"), names)
            assert getattr(value, "_repr_html_", value.__repr__)()
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return names


def test_every_notebook_is_run_by_a_test():
    assert {"attention_superposition", "five_minute_tour", "train_your_own"} <= set(NAMES)
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    for name in NAMES:
        assert any(f'execute("{name}"' in text for text in tests), name


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_executed(name):
    found = cells(name)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    kinds = {output["output_type"] for cell in found for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}  # no errors
    streams = {o["name"] for cell in found for o in cell["outputs"] if o["output_type"] == "stream"}
    assert streams <= {"stdout"}  # no warnings, no progress bars
    assert sum(bool(cell["outputs"]) for cell in found) > len(found) / 2


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_offline_and_names_no_machine(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < MAX_BYTES
    shown = "\n".join(output_text(cell) for cell in cells(name))
    assert "CircuitsVis.render" in shown or name in ("circuits", "train_your_own")
    # what a browser would fetch: scripts, styles, pictures, modules
    assert not re.findall(r"""(?:src|href)\s*=\s*["']https?:|<script[^>]+src=""", shown)
    assert not re.findall(r"""import\s*(?:[\w{}*, ]+from\s*)?["']https?:""", shown)
    without_bundle = "\n".join(line for line in shown.splitlines() if len(line) < 2000)
    assert not re.findall(r"/(?:home|work|tmp|root|Users)/", without_bundle)
    assert "Warning" not in without_bundle


def test_the_five_minute_tour(tmp_path, monkeypatch, capsys):
    names = execute("five_minute_tour", tmp_path, monkeypatch, N_STEPS=120)
    out = capsys.readouterr().out
    assert names["largest_difference"] < 1e-3
    assert "the same logits: True" in out
    assert "blocks.0.attn.lorsa.hook_acts_post" in out
    assert names["fidelity"].ce_recovered > 0.9
    # the source that the language knows is where the head that matters fetches from
    row, query, head = names["row"], names["query"], names["strongest"]
    source = int(names["labels"].source[row, query])
    assert names["sources"][head].endswith(f"(position {source})")
    assert names["chances"]["none"] > 0.9
    assert names["chances"]["all four"] < 0.5
    assert "the same logits again: True" in out
    assert names["page"].stat().st_size > 1_000_000


def test_train_your_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("pandas")
    names = execute("train_your_own", tmp_path, monkeypatch, N_STEPS=120)
    out = capsys.readouterr().out
    assert "must be a multiple of context_size = 40" in out
    trained, untrained = (names["measured"][name] for name in ("trained", "untrained"))
    assert trained[-1].ce_recovered > 0.9
    for ours, start in zip(trained[:2], untrained[:2], strict=True):
        assert ours.fvu < 0.5 * start.fvu
    assert len(names["ax"].lines) == 2
    induction = names["induction"]
    assert len(induction) >= 10
    assert set(induction["layer"]) == {1}
    by_induction, by_others = (cost.mean().item() for cost in names["costs"].values())
    assert by_induction > 1
    assert by_induction > 5 * by_others
    assert names["same"]
    assert "metrics.jsonl" in out


def test_attention_superposition(tmp_path, monkeypatch):
    names = execute("attention_superposition", tmp_path, monkeypatch, N_STEPS=120, N_TEST=96)
    check_superposition(names["found"])


def check_superposition(found):
    """What the example and the notebook say about shared heads and both dictionaries."""
    attention, sae, lorsa = found.methods.values()
    # every attention head serves several rules, and does not tell them
    for costs in found.head_costs:
        assert sum(cost > 0.5 for cost in costs.values()) >= 3
    assert mean(row.f1 for row in attention) < 0.4
    # both dictionaries tell rules, and break the rule itself more than the others
    for rows in (sae, lorsa):
        assert mean(row.f1 for row in rows) > 0.55
        assert mean(row.cost for row in rows) > 5 * mean(row.cost_elsewhere for row in rows)
        assert sum(row.f1 > 0.8 for row in rows) >= 4
    # the Lorsa's units know their sources, where the model attends to them
    for rule in ("nextday", "nextord", "prevnum", "lastname"):
        assert found.sources[rule].attention > 0.8
        assert found.sources[rule].lorsa > 0.75
    assert tuple(found.shares.shape) == (256, 3)
    sums = found.shares.sum(1)[found.shares.any(1)]
    torch.testing.assert_close(sums, torch.ones_like(sums))


def mean(values):
    values = list(values)
    return sum(values) / len(values)
