"""`lorsa-lens heads` on a run directory made by hand."""

import json

import pytest
import zoo
from typer.testing import CliRunner

from lorsa_lens import Lorsa
from lorsa_lens.cli import app


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run of a tiny model, which is handed out in place of one on disk."""
    model = zoo.KINDS[0].build(zoo.torch.float32)
    monkeypatch.setattr("lorsa_lens.hosts.loading.load_host", lambda name, device: model)
    for layer in (0, 1):
        lorsa = Lorsa.from_attention(model, layer, n_ov_heads=16, k=4)
        lorsa.save_pretrained(tmp_path / "lorsas" / f"blocks.{layer}")
    text = tmp_path / "text.txt"
    words = [f"w{int(token)}" for token in zoo.tokens(1, 400)[0] - 4]
    text.write_text(" ".join(words))
    config = {"model": "tiny", "tokens": str(text), "device": "cpu"}
    (tmp_path / "run_config.json").write_text(json.dumps(config))
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["heads", *map(str, arguments)], env={"COLUMNS": "200"})


def test_tables_are_printed_and_saved(run_dir):
    result = invoke(
        run_dir, "--context-size", 12, "--n-prompts", 8, "--n-sequences", 6, "--contexts", 96
    )
    assert result.exit_code == 0, result.output
    folder = run_dir / "heads"
    tables = {
        "prompts", "text", "named", "correspondence", "spans", "circuits", "logits", "reads",
        "pairs",
    }  # fmt: skip
    files = {f"{name}.{suffix}" for name in tables for suffix in ("csv", "json")}
    assert {path.name for path in folder.iterdir()} == {*files, "contexts.sqlite"}
    rows = json.loads((folder / "correspondence.json").read_text())
    assert [(row["layer"], row["head"]) for row in rows] == [
        (layer, head) for layer in (0, 1) for head in range(16)
    ]
    overlaps = json.loads((folder / "circuits.json").read_text())
    n_circuits = Lorsa.from_pretrained(run_dir / "lorsas" / "blocks.0").cfg.n_qk_heads
    assert {(row["layer"], row["circuit"]) for row in overlaps} == {
        (layer, circuit) for layer in (0, 1) for circuit in range(n_circuits)
    }
    scores = json.loads((folder / "text.json").read_text())
    assert {row["behaviour"] for row in scores} >= {"previous token", "first token"}
    assert {row["kind"] for row in scores} == {"ov", "qk", "attention"}
    assert "Attention heads that a Lorsa head spans" in result.output
    assert str(folder) in result.output.replace("\n", "")


def test_some_layers_into_another_folder(run_dir, tmp_path):
    out = tmp_path / "elsewhere"
    result = invoke(
        run_dir, "--layers", 1, "--out", out, "--context-size", 12, "--n-prompts", 8,
        "--n-sequences", 6,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "text.json").read_text())
    assert {row["layer"] for row in rows} == {1}
    assert not (run_dir / "heads").exists()


def test_runs_that_cannot_be_read_are_refused(run_dir, tmp_path):
    result = invoke(run_dir, "--layers", 7)
    assert result.exit_code == 2
    assert "has no layer 7: it has [0, 1]" in " ".join(result.output.split())
    empty = tmp_path / "empty"
    empty.mkdir()
    result = invoke(empty)
    assert result.exit_code == 2
    assert "give --model and --tokens" in " ".join(result.output.split())
    result = invoke(empty, "--model", "tiny", "--tokens", run_dir / "text.txt")
    assert result.exit_code == 2
    assert "there are no Lorsas in" in " ".join(result.output.split())
