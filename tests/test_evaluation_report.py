"""An evaluation as tables, JSON and a page, and `lorsa-lens eval`."""

import functools
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
import zoo
from rich.console import Console
from typer.testing import CliRunner

from lorsa_lens import Lorsa
from lorsa_lens.cli import app
from lorsa_lens.data import contexts_for_model
from lorsa_lens.evaluation import evaluate, print_evaluation, save_evaluation, to_dict
from lorsa_lens.evaluation.fidelity import METRICS
from lorsa_lens.evaluation.subject import find_subject
from lorsa_lens.views import Bars, render

HOSTILE = '"><script>alert(1)</script><img src="http://evil.test/x.png">'


@functools.cache
def rows():
    model = zoo.by_name("bridge-gpt2").build(torch.float32)
    lorsas = [Lorsa.from_attention(model, layer, n_ov_heads=64, k=3) for layer in (0, 1)]
    return evaluate(model, lorsas, zoo.tokens(batch=4, pos=10))


def test_json_holds_every_number():
    found = json.loads(json.dumps(to_dict(rows(), {"model": "m"}), allow_nan=False))
    assert found["about"] == {"model": "m"}
    assert found["confidence"] == 0.95
    assert [row["layer"] for row in found["rows"]] == [0, 1, None]
    first, together = rows()[0], found["rows"][2]
    assert set(found["rows"][0]["metrics"]) == set(METRICS)
    for name, entry in found["rows"][0]["metrics"].items():
        value = getattr(first, name)
        assert (entry["value"], entry["low"], entry["high"]) == (value, value.low, value.high)
    assert found["rows"][0]["dead"] == first.dead
    assert sum(found["rows"][0]["density_histogram"].values()) == 64
    assert len(found["rows"][0]["matched_heads"]) == 4
    assert "fvu" not in together["metrics"]
    assert "dead" not in together
    names = found["rows"][0]["sae_lens"]
    assert names["model_performance_preservation/ce_loss_score"] == first.ce_recovered
    assert names["model_behavior_preservation/kl_div_score"] == first.kl_recovered
    assert names["reconstruction_quality/explained_variance"] == first.explained_variance
    assert names["sparsity/l0"] == 3.0


def test_what_is_no_number_is_null_in_json():
    model = zoo.by_name("bridge-gpt2").build(torch.float32)
    (row,) = evaluate(model, Lorsa.from_attention(model, 1), zoo.tokens(1, 6))
    metric = to_dict([row])["rows"][0]["metrics"]["kl_zero"]
    assert metric == {"value": float(row.kl_zero), "low": None, "high": None}


def test_tables_have_a_row_for_each_layer_and_their_intervals():
    out = io.StringIO()
    print_evaluation(Console(file=out, width=80), rows())
    first = rows()[0]
    half = (first.ce_recovered.high - first.ce_recovered.low) / 2
    assert f"{first.ce_recovered:.4f}" in out.getvalue()
    assert f"± {half:.1g}" in out.getvalue()
    assert "…" not in out.getvalue()
    assert f"{first.fvu_without_sinks:.4f}" in out.getvalue()
    predictions, reconstruction = out.getvalue().split("Output of the layer")
    assert "all" in predictions
    assert "all" not in reconstruction  # it has no outputs of its own


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_files_are_written_and_the_page_needs_no_network(tmp_path):
    json_file, page_file = save_evaluation(tmp_path / "new", rows(), {HOSTILE: HOSTILE})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "evaluation.html",
        "evaluation.json",
    ]
    assert json.loads(json_file.read_text())["about"] == {HOSTILE: HOSTILE}
    text = page_file.read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload", "onerror"} & {name for name, _ in page.attributes}
    assert page.tags.count("svg") == 3 + 2  # three charts over layers, a histogram for each
    assert "&lt;script&gt;" in text
    assert "E|y - y&#x27;|^2 / E|y - E y|^2." in text  # the formula of the FVU
    half = (rows()[2].kl.high - rows()[2].kl.low) / 2
    assert f"{rows()[2].kl:.4f} ± {half:.1g}" in text
    assert f"{rows()[2].ce_recovered:.4f}" in text


# -------------------------------------------------------------------------------------- bars


def rectangles(html):
    pattern = r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([-\d.]+)" height="([-\d.]+)"'
    return [tuple(map(float, match)) for match in re.findall(pattern, html)]


def test_bars_are_as_high_as_their_values():
    bars = Bars(["a", "b", "c"], {"x": [1.0, -0.5, math.nan], "y": [0.5, 0.0, 0.25]})
    shapes = rectangles(bars.to_html())
    assert len(shapes) == 5  # not the one that is no number
    heights = [height for *_, height in shapes]
    one = heights[0]
    assert heights == pytest.approx([one, one / 2, one / 2, 0, one / 4], abs=0.11)
    zero = shapes[0][1] + one
    assert shapes[1][1] == pytest.approx(zero, abs=0.11)  # hangs below 0
    x = [shape[0] for shape in shapes]
    assert x[0] < x[2] < x[1] < x[3] < x[4]


def test_whiskers_span_their_intervals_and_text_is_escaped():
    bars = Bars([HOSTILE], {HOSTILE: [0.5]}, {HOSTILE: [(0.25, 1.0)]})
    html = bars.to_html()
    assert "<script" not in html
    assert "<img" not in html
    ((_, y, _, height),) = rectangles(html)
    whisker = re.search(r'y1="([\d.]+)" y2="([\d.]+)" stroke="currentColor" stroke-width', html)
    low, high = map(float, whisker.groups())
    assert low - high == pytest.approx(1.5 * height, abs=0.3)
    assert low == pytest.approx(y + height / 2, abs=0.11)
    unknown = Bars(["a"], {"x": [0.5]}, {"x": [(math.nan, math.nan)]})
    assert "stroke-width" not in unknown.to_html()


def test_bars_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got 0 labels and 1 series"):
        Bars([], {"x": []})
    with pytest.raises(ValueError, match="series 'x' has 1 values for 2 labels"):
        Bars(["a", "b"], {"x": [1.0]})
    with pytest.raises(ValueError, match="is an interval without a series"):
        Bars(["a"], {"x": [1.0]}, {"y": [(0.0, 1.0)]})
    assert "<svg" in render(Bars(["a"], {"x": [0.0]}))


# ------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    zoo.by_name("bridge-llama")
    folder = tmp_path_factory.mktemp("llama")
    zoo.hugging_face(torch.float32, "Llama").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(llama, tmp_path_factory):
    """What a run leaves, with Lorsas of both layers."""
    from lorsa_lens.hosts.loading import load_host

    folder = tmp_path_factory.mktemp("runs") / "first"
    model = load_host(str(llama))
    for layer in (1, 0):
        lorsa = Lorsa.from_attention(model, layer, n_ov_heads=64, k=3)
        lorsa.save_pretrained(folder / "lorsas" / f"blocks.{layer}")
    config = {"model": str(llama), "context_size": 12, "prepend_bos": False, "tokens": "x"}
    (folder / "run_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    generator = torch.Generator().manual_seed(3)
    lines = [torch.randint(0, 60, (20,), generator=generator).tolist() for _ in range(12)]
    path.write_text(
        "\n".join(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) for ids in lines)
    )
    return path


def invoke(*arguments):
    arguments = ["eval", *map(str, arguments)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})


def test_a_run_is_evaluated_on_its_own_model(run_dir, text, llama):
    from lorsa_lens.hosts.loading import load_host

    result = invoke(run_dir, "--tokens", text)
    assert result.exit_code == 0, result.output
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert (run_dir / "evaluation.html").is_file()
    model = load_host(str(llama))
    lorsas = [Lorsa.from_pretrained(run_dir / "lorsas" / f"blocks.{layer}") for layer in (0, 1)]
    contexts = contexts_for_model(model, str(text), 12, prepend_bos=False)
    expected = evaluate(model, lorsas, contexts)
    assert [row["layer"] for row in found["rows"]] == [0, 1, None]
    for row, values in zip(found["rows"], expected, strict=True):
        assert row["n_documents"] == 12
        for name, value in values.metrics().items():
            assert row["metrics"][name]["value"] == pytest.approx(value, rel=1e-6), name
    assert found["about"]["model"] == str(llama)
    assert found["about"]["context_size"] == 12
    assert f"{expected[2].ce_recovered:.4f}" in result.output


def test_single_lorsas_with_options(run_dir, text, llama, tmp_path):
    result = invoke(
        run_dir / "lorsas" / "blocks.1", "--tokens", text, "--model", llama, "--out", tmp_path,
        "--context-size", "9", "--batch-size", "4", "--max-tokens", "80", "--sinks", "first",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    (row,) = found["rows"]
    assert row["layer"] == 1
    assert row["n_tokens"] == 2 * 4 * 8  # two batches of four contexts, without their BOS
    assert row["metrics"]["sink_share"]["value"] == 0  # the first positions are BOS
    assert found["about"]["sinks"] == "first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/lorsas/blocks.0"], "nothing says which model the Lorsas belong to: give --model"),
        (["{run}", "{run}/lorsas/blocks.0"], "is a run's directory: give it alone"),
        (["nowhere", "--model", "{llama}"], "nowhere is no folder here"),
        (["{run}", "--model", "./nowhere"], "there is no folder ./nowhere"),
        (["{run}", "--context-size", "1000"], "context_size = 1000, but the model takes"),
        (["{run}", "--sinks", "norm"], "sinks = 'norm' must be one of attention, first"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run_dir, llama, text, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    filled = [argument.format(run=run_dir, llama=llama) for argument in arguments]
    result = invoke(*filled, "--tokens", text)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "Traceback" not in result.output


def test_a_run_from_python_says_no_model_but_the_rest(tmp_path):
    run = tmp_path / "run"
    (run / "lorsas" / "blocks.10").mkdir(parents=True)
    (run / "lorsas" / "blocks.9").mkdir()
    fields = {"context_size": 64, "exclude_special_tokens": False}
    (run / "training_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="nothing says which model"):
        find_subject([str(run)])
    subject = find_subject([str(run)], model="gpt2")
    assert [path.rpartition("blocks.")[2] for path in subject.lorsas] == ["9", "10"]
    assert (subject.context_size, subject.prepend_bos) == (64, True)
    assert subject.exclude_special_tokens is False
    assert subject.out == run
    (run / "lorsas" / "blocks.9").rmdir()
    (run / "lorsas" / "blocks.10").rmdir()
    with pytest.raises(ValueError, match="holds no Lorsas yet: has the run ended"):
        find_subject([str(run)], model="gpt2")
