"""The demo from end to end: subjects, stories, the page, and the command line."""

import dataclasses
import functools
import io
import re
import textwrap

import numpy as np
import pytest
import torch
import zoo
from rich.console import Console
from typer.testing import CliRunner

from lorsa_lens import Lorsa
from lorsa_lens.analysis.relations import RELATIONS
from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.cli import app
from lorsa_lens.demo import figures, subjects
from lorsa_lens.demo.report import print_story, save_page
from lorsa_lens.demo.story import tell
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.testbed import load_language
from lorsa_lens.testbed.models import load_weights
from lorsa_lens.testbed.network import run_network


@pytest.fixture
def small(monkeypatch):
    """The demo on little text."""
    testbed, model = subjects.from_testbed, subjects.from_model
    monkeypatch.setattr(subjects, "N_TEST", 16)
    monkeypatch.setattr(subjects, "from_testbed", functools.partial(testbed, n_train=64))
    monkeypatch.setattr(subjects, "from_model", functools.partial(model, n_train=32, n_ctx=24))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random GPT-2 with its tokenizer, as a folder with a Hugging Face model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    zoo.hugging_face(torch.float32, "GPT2", n_ctx=zoo.N_CTX).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def named(story):
    return [finding for finding in story.findings if finding.heads]


@functools.cache
def rules_story(n_steps):
    subject = subjects.from_testbed("rules", n_train=512)
    return tell(subject, n_steps=n_steps, progress=False)


# ----------------------------------------------------------------------------------- the subjects


def test_the_rules_are_the_relations_of_the_rules_model():
    subject = rules_story(100).subject
    labels = load_language("rules").label(subject.test_tokens)
    assert list(subject.sources) == list(load_language("rules").rules)
    for index, sources in enumerate(subject.sources.values()):
        assert torch.equal(sources >= 0, labels.rule == index)
        assert torch.equal(sources[sources >= 0], labels.source[labels.rule == index])
    assert torch.equal(subject.predicted, labels.answer >= 0)
    assert not (subject.train_tokens[:128] == subject.test_tokens).all(1).any()
    assert subject.str_tokens(subject.test_tokens[0])[0] == "<bos>"


def test_the_induction_model_is_asked_where_the_source_is_the_only_one(small):
    subject = subjects.from_testbed("induction")
    assert list(subject.sources) == ["induction", "previous token"]
    assert subject.layers == [0, 1]
    tokens = subject.test_tokens
    for row, sequence in enumerate(tokens.tolist()):
        for q, token in enumerate(sequence):
            earlier = [k for k in range(q) if sequence[k] == token]
            assert len(earlier) <= 1
            expected = earlier[0] + 1 if earlier else -1
            assert int(subject.sources["induction"][row, q]) == expected
    assert torch.equal(
        subject.sources["previous token"], (torch.arange(tokens.shape[1]) - 1).expand_as(tokens)
    )


def test_a_model_in_a_folder_is_loaded_as_it_is(folder):
    model = load_host(str(folder))
    original = zoo.hugging_face(torch.float32, "GPT2")
    tokens = zoo.tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(tokens).logits, rtol=1e-4, atol=1e-4)
    assert model.tokenizer.convert_ids_to_tokens([0, 4, 63]) == ["<bos>", "w0", "w59"]


def test_a_model_writes_its_own_text(folder, small):
    subject = subjects.from_model(str(folder), layers=[1, 0, 1], seed=3)
    assert subject.name == "tiny"
    assert subject.layers == [0, 1]
    assert subject.train_tokens.shape == (32, 24)
    assert subject.test_tokens.shape == (16, 24)
    assert subject.sizes == {"n_qk_heads": 4, "n_ov_heads": 256, "k": 4}
    tokens = torch.cat([subject.test_tokens, subject.train_tokens])
    assert (tokens[:, 0] == zoo.BOS).all()
    assert 0 <= int(tokens.min()) < int(tokens.max()) < zoo.D_VOCAB
    again = subjects.from_model(str(folder), seed=3)
    assert torch.equal(again.test_tokens, subject.test_tokens)
    other = subjects.from_model(str(folder), seed=4)
    assert not torch.equal(other.test_tokens, subject.test_tokens)
    for relation, find in RELATIONS.items():
        assert torch.equal(subject.sources[relation], find(subject.test_tokens))
    # It is the model's own: far more likely to it than random tokens are.
    with torch.no_grad():
        own = float(subject.model(tokens, return_type="loss"))
        random = float(subject.model(zoo.tokens(48, 24), return_type="loss"))
    assert own < random - 1.0


def test_a_text_is_cut_into_whole_contexts(folder, small, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 60}" for i in range(23 * 7 + 5)))
    subject = subjects.from_model(str(folder), tokens_file=path)
    tokens = torch.cat([subject.test_tokens, subject.train_tokens])
    assert tokens.shape == (7, 24)
    assert (tokens[:, 0] == zoo.BOS).all()
    assert tokens[:, 1:].flatten().tolist() == [4 + i % 60 for i in range(23 * 7)]
    assert subject.test_tokens.shape[0] == 2  # a third, rounded down
    assert subject.str_tokens(tokens[0])[:3] == ["<bos>", "w0", "w1"]


def test_token_ids_come_from_a_file(folder, small, tmp_path):
    ids = np.arange(60 * 30, dtype=np.uint16).reshape(60, 30) % 64
    np.save(tmp_path / "ids.npy", ids)
    subject = subjects.from_model(str(folder), tokens_file=tmp_path / "ids.npy")
    tokens = torch.cat([subject.test_tokens, subject.train_tokens])
    assert np.array_equal(tokens.numpy(), ids[:48, :24])  # as many as training and test ask for


# ----------------------------------------------------------------------------------- the story


@pytest.mark.parametrize("name", ["rules", "induction"])
def test_a_story_has_rows_for_each_layer_and_findings_for_each_relation(name, small, tmp_path):
    subject = subjects.from_testbed(name)
    story = tell(subject, n_steps=2, progress=False)
    layers = subject.layers
    assert [lorsa.cfg.layer for lorsa in story.lorsas] == layers
    together = [None] if len(layers) > 1 else []
    assert [row.layer for row in story.fidelity] == layers + together
    pairs = [(layer, relation) for layer in layers for relation in subject.sources]
    assert [(finding.layer, finding.relation) for finding in story.findings] == pairs
    page = save_page(tmp_path / "new" / "page.html", [story])
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "new" / "page.html"
    assert subject.title in html
    for relation in subject.sources:
        assert f">{relation}<" in html
    out = io.StringIO()
    print_story(Console(file=out, width=200), story)
    for relation in subject.sources:
        assert relation in out.getvalue()
    assert f"{story.fidelity[0].ce_zero:.3f}" in out.getvalue()
    assert f"{story.fidelity[0].fvu:.4f}" in out.getvalue()


def test_findings_are_the_scores_of_the_trained_lorsa():
    story = rules_story(100)
    (lorsa,), record = story.lorsas, story.records[0]
    assert record.x.shape[:2] == story.subject.test_tokens.shape
    scores = source_scores(lorsa, record, story.subject.sources)
    for finding in story.findings:
        assert finding.heads == scores[finding.relation].heads()
        if finding.heads:
            expected = scores[finding.relation].mean_share(finding.heads)
            assert finding.share == pytest.approx(expected)
            with torch.no_grad():
                code = lorsa.encode(record.x)
            stays = torch.isin(code.indices, torch.tensor(finding.heads)) & (code.values != 0)
            guessed, true = stays.any(-1), story.subject.sources[finding.relation] >= 0
            precision, recall = (
                float((guessed & true).sum() / all_of.sum()) for all_of in (guessed, true)
            )
            f1 = 2 * precision * recall / (precision + recall)
            assert finding.f1 == pytest.approx(f1, abs=1e-6)
        else:
            assert np.isnan(finding.share)
            assert np.isnan(finding.f1)


def test_only_answers_count_for_the_cross_entropy():
    """By the testbed's own forward pass: nearly nothing at answers, much at what is drawn."""
    story = rules_story(100)
    labels = load_language("rules").label(story.subject.test_tokens)
    weights, config = load_weights("rules")
    with torch.no_grad():
        log_probs = run_network(weights, labels.tokens, config).logits.log_softmax(-1)
    losses = -log_probs.gather(-1, labels.answer.clamp(min=0)[..., None])[..., 0]
    expected = float(losses[:, :-1][labels.answer[:, :-1] >= 0].mean())
    assert expected < 0.1
    assert story.fidelity[0].ce_clean == pytest.approx(expected, abs=1e-5)


def test_the_seed_is_that_of_initialisation_too(small):
    subject = subjects.from_testbed("rules")
    first, second = (
        tell(subject, n_steps=1, seed=seed, progress=False).lorsas[0].W_O.detach()
        for seed in (0, 1)
    )
    assert (first - second).norm() > first.norm()  # independent directions, not one step apart


def test_attention_masses_are_those_of_the_plain_network():
    """The patterns of the testbed's own forward pass, which uses no TransformerLens."""
    story = rules_story(100)
    subject = story.subject
    weights, config = load_weights("rules")
    with torch.no_grad():
        (pattern,) = run_network(weights, subject.test_tokens, config).patterns
    for finding in story.findings:
        sources = subject.sources[finding.relation]
        masses = [
            pattern[b, :, q, sources[b, q]].tolist() for b, q in (sources >= 0).nonzero().tolist()
        ]
        means = np.mean(masses, axis=0)
        assert finding.attention_head == means.argmax()
        assert finding.attention_mass == pytest.approx(means.max(), abs=1e-4)


def test_training_on_the_rules_names_heads_and_a_lorsa_that_knows_nothing_has_none():
    story = rules_story(100)
    (fidelity,) = story.fidelity
    assert fidelity.fvu < 0.2
    assert fidelity.ce_recovered > 0.5
    assert sum(finding.share > 0.7 for finding in named(story)) >= 6
    torch.manual_seed(0)
    untrained = Lorsa(story.lorsas[0].cfg)
    scores = source_scores(untrained, story.records[0], story.subject.sources)
    assert sum(bool(score.heads()) for score in scores.values()) <= 2
    before = tell(story.subject, n_steps=1, progress=False).fidelity[0]
    assert before.fvu > 5 * fidelity.fvu


def test_the_figures_show_named_heads_at_work_on_one_sequence(tmp_path):
    story = rules_story(100)
    (lorsa,) = story.lorsas
    row = figures._scene(story, lorsa, named(story)).row
    html = save_page(tmp_path / "page.html", [story]).read_text(encoding="utf-8")
    assert "Layer 0: what the heads fetch" in html
    shown = {relation: int(head) for head, relation in re.findall(r'"L0\.(\d+) (\w+)"', html)}
    assert len(shown) >= 5
    record = story.records[0].batch(slice(row, row + 1))
    with torch.no_grad():
        code = lorsa.encode(record.x)
    for finding in named(story):
        if finding.relation in shown:
            head = shown[finding.relation]
            assert head in finding.heads
            asked = story.subject.sources[finding.relation][row] >= 0
            stays = ((code.indices[0] == head) & (code.values[0] != 0)).any(-1)
            assert (stays & asked).any()


def test_no_figure_of_a_layer_without_named_heads(small):
    story = tell(subjects.from_testbed("rules"), n_steps=1, progress=False)
    nothing = dataclasses.replace(story, findings=[])
    assert figures.layer_figures(nothing, story.lorsas[0]) == []


# ----------------------------------------------------------------------------------- command line


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *(str(argument) for argument in arguments)])


def refused(*arguments):
    """The message of a refusal: exit status 2, no traceback, in a few lines."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)  # the frame breaks lines anywhere
    assert len(text) < 700
    return text


def run_notebook_lines(output, tokens):
    """Execute what the command line says to type, and give what it defines."""
    _, _, lines = output.partition("The same in a notebook:")
    lines = textwrap.dedent(lines.strip("\n"))
    assert len(lines.strip().splitlines()) == 3
    names = {"tokens": tokens}
    with torch.no_grad():
        exec(compile(lines, "notebook", "exec"), names)
    return names


def test_the_demo_runs_on_the_testbed(small, tmp_path):
    result = invoke("--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.html", "induction_L0", "induction_L1", "rules_L0",
    ]  # fmt: skip
    for title in ("Eleven rules in one layer", "Induction in two attention-only layers"):
        assert title in result.output
        assert title in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    names = run_notebook_lines(result.output, load_language("rules").sample(2, seed=0).tokens)
    acts = names["cache"]["blocks.0.attn.lorsa.hook_acts_post"]
    assert acts.shape == (2, 48, 256)
    assert ((acts != 0).sum(-1) <= 4).all()


def test_the_demo_runs_on_a_model_in_a_folder(folder, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("--model", folder, "--layers", 1, "--steps", 2, "--out", "it's here")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "it's here").iterdir()) == [
        "index.html", "tiny_L1",
    ]  # fmt: skip
    names = run_notebook_lines(result.output, zoo.tokens(2, 12))
    assert names["cache"]["blocks.1.attn.lorsa.hook_pattern"].shape == (2, 4, 12, 12)
    assert names["logits"].shape == (2, 12, 64)


def test_the_same_seed_tells_the_same_story(small, tmp_path):
    runs = [invoke("--steps", 2, "--seed", 5, "--out", tmp_path / name) for name in "ab"]
    tables = [result.output.partition("The page:")[0] for result in runs]
    assert "CE spliced" in tables[0]
    # Progress bars hold times; the tables are what has frames.
    first, second = ([line for line in table.splitlines() if "│" in line] for table in tables)
    assert first == second
    assert len(first) > 10


def test_options_that_contradict_each_other_are_refused(tmp_path):
    for option in ("--tokens", "--layers"):
        assert "--tokens and --layers need --model" in refused(option, 0)
    assert "there is no file nowhere.npy" in refused("--model", "x", "--tokens", "nowhere.npy")
    assert "--steps" in refused("--steps", 0)
    (tmp_path / "file").write_text("")
    assert "--out" in refused("--out", tmp_path / "file")
    assert not (tmp_path / "lorsa_demo").exists()


def test_models_that_cannot_be_loaded_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "there is no folder" in refused("--model", tmp_path / "nowhere")
    assert "holds no config.json" in refused("--model", tmp_path / "empty")
    assert "the model no-such-model cannot be loaded" in refused("--model", "no-such-model")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "lorsa-never-heard-of"}')
    assert "cannot be loaded" in refused("--model", tmp_path / "empty")


def test_layers_and_tokens_that_do_not_fit_are_refused(folder, small, tmp_path):
    assert "layer = 9, but the model has layers 0 to 1" in refused("--model", folder, "--layers", 9)

    def refused_ids(array):
        np.save(tmp_path / "ids.npy", array)
        return refused("--model", folder, "--tokens", tmp_path / "ids.npy")

    def refused_text(data, name="text.txt"):
        (tmp_path / name).write_bytes(data)
        return refused("--model", folder, "--tokens", tmp_path / name)

    assert "ids outside 0 to 63, the model's vocabulary" in refused_ids(np.full((4, 9), 64))
    assert "ids outside 0 to 63" in refused_ids(np.full((4, 9), -1))
    assert "holds int64 of shape [9]: give integers" in refused_ids(np.zeros(9, dtype=np.int64))
    assert "holds float64 of shape [4, 9]: give integers" in refused_ids(np.zeros((4, 9)))
    assert "gives 2 sequences of 9 tokens" in refused_ids(np.zeros((2, 9), dtype=np.int64))
    assert "gives 9 sequences of 1 tokens" in refused_ids(np.zeros((9, 1), dtype=np.int64))
    assert "no .npy file of numbers" in refused_ids(np.array([[{"a": 1}]], dtype=object))
    assert "no .npy file of numbers" in refused_text(b"w1 w2 w3", "text.npy")
    assert "gives 2 sequences of 24 tokens" in refused_text(b"w1 " * 68)
    assert "gives 0 sequences" in refused_text(b"")
    assert "no text in UTF-8" in refused_text(b"\xff\xfe\x00w")


def test_help_is_shown_without_a_command():
    for arguments in ([], ["--help"], ["demo", "--help"]):
        result = CliRunner().invoke(app, arguments)
        assert "Low-Rank Sparse Attention" in result.output or "--model" in result.output
        assert "Traceback" not in result.output


# ----------------------------------------------------------------------------------- a real model


@pytest.fixture
def stories(assets):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the tokenizer's file is of transformers 5")
    return assets / "stories260k"


@pytest.mark.parametrize("source", ["the model itself", "val_tokens.npy", "a text"])
def test_the_demo_runs_on_a_real_model(stories, assets, source, small, tmp_path):
    arguments = ["--model", stories, "--steps", 5, "--layers", 1, "--out", tmp_path]
    if source == "a text":
        arguments += ["--tokens", assets / "texts" / "tinystories_sample.txt"]
    elif source == "val_tokens.npy":
        arguments += ["--tokens", stories / source]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "stories260k: 5 layers, d_model 64" in result.output
    # The notes on this model know one head of this layer: head 3 attends to the previous token.
    assert re.search(r"previous token +│ 1 +│ H3: 0\.[4-9]", result.output)
    names = run_notebook_lines(result.output, torch.arange(20)[None])
    assert names["cache"]["blocks.1.attn.lorsa.hook_acts_post"].shape == (1, 20, 512)
