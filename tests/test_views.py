# ruff: noqa: RUF001 (the characters that stand for others are the subject here)
import html
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorsa_lens.views import (
    MAX_HEADS,
    MAX_TEXT_TOKENS,
    MAX_TOKENS,
    Figure,
    Heading,
    Table,
    Text,
    attention_view,
    display_token,
    display_tokens,
    render,
    save,
    token_view,
    z_pattern_view,
)
from lorsa_lens.views.bundle import bundle
from lorsa_lens.views.spec import escape, script_json

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
TOKENS = ["<s>", "▁a", "▁b", "▁a"]
HOSTILE = [
    "</script>",
    "<script>alert(1)</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<img/src='x'/onerror='document.title=1'>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "&copy",
    "\u2028\u2029",
    "\u202e\x00\x7f\x85",
    "\ud800",
    "'\"`\\",
]

fragments = st.sampled_from(
    [*HOSTILE, *"<>/!?&#;·‹›⏎▁ĠĊ \n\t\r\u200d\u2060", "<0x0A>", "<s>", "script", "lt", "amp;"]
)
any_text = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zs", "Zl", "Zp"])),
    st.lists(fragments, max_size=6).map("".join),
)
steady = settings(deadline=None, derandomize=True, database=None, max_examples=150)


def causal(heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, tokens, tokens, generator=generator)
    future = torch.ones(tokens, tokens).triu(1).bool()
    return scores.masked_fill(future, -math.inf).softmax(-1)


def letters(count: int) -> list[str]:
    return [f"t{index}" for index in range(count)]


def drawn(page: str) -> list[tuple[str, str, dict]]:
    """Read id, component and props back from the statements of a page."""
    calls = re.findall(r"^CircuitsVis\.render\((\".*?\"), CircuitsVis\.(\w+), (.*)\);$", page, re.M)
    return [(json.loads(name), component, json.loads(props)) for name, component, props in calls]


def without_hook(function):
    """The function itself: the type checker of the test suite refuses wrong shapes before it."""
    return inspect.unwrap(function)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("cat", "cat"),
        (" cat", "·cat"),
        ("▁cat", "·cat"),
        ("Ġcat", "·cat"),
        ("ĠĠ", "··"),
        ("\n", "⏎"),
        ("Ċ", "⏎"),
        ("<0x0A>", "⏎"),
        ("<0x41>", "‹0x41›"),
        ("\t", "⇥"),
        ("\r\n", "␍⏎"),
        ("", "∅"),
        ("<s>", "‹s›"),
        ("<bos>", "‹bos›"),
        ("<|endoftext|>", "‹|endoftext|›"),
        ("</script>", "‹/script›"),
        ("<div", "‹div"),
        ("<", "<"),
        ("->", "->"),
        ("a < b", "a·<·b"),
        ("x<y>", "x‹y›"),
        ("AT&T", "AT&T"),
        ("&amp;", "&\u2060amp;"),
        ("\xa0", "‹U+00A0›"),
        ("\u202e", "‹U+202E›"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\u200c", "‹U+200C›"),
        ("\ud800", "‹U+D800›"),
        ("日本", "日本"),
    ],
)
def test_display_token(token, shown):
    assert display_token(token) == shown


class Reader(HTMLParser):
    """Collects what a browser would show of a string, and what it would take for markup."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.shown = ""
        self.markup = []

    def handle_data(self, data):
        self.shown += data

    def handle_starttag(self, tag, attrs):
        self.markup.append(tag)

    handle_endtag = handle_comment = handle_decl = handle_pi = unknown_decl = lambda self, text: (
        self.markup.append(text)
    )


@steady
@given(any_text)
@example("<<s>>")
def test_shown_tokens_are_plain_visible_and_stable(token):
    shown = display_token(token)
    assert shown
    assert not any(char.isspace() for char in shown)
    assert html.unescape(shown) == shown
    reader = Reader()
    reader.feed(shown)
    reader.close()
    assert reader.markup == []
    assert reader.shown == shown
    assert display_token(shown) == shown
    shown.encode("utf-8")


def test_one_string_is_not_a_sequence_of_tokens():
    with pytest.raises(TypeError, match="one string"):
        without_hook(display_tokens)("abc")
    with pytest.raises(TypeError):
        display_token(3)


# --- figures ------------------------------------------------------------------------------------


def test_attention_props():
    pattern = torch.tensor([[[1.0, 0.0], [0.33333, 0.66667]]])
    figure = attention_view(pattern, ["<s>", "▁a"], head_names=["L5.3"])
    assert figure.spec.component == "AttentionHeads"
    assert figure.spec.props == {
        "attention": [[[1.0, 0.0], [0.333, 0.667]]],
        "tokens": ["‹s›", "·a"],
        "attentionHeadNames": ["L5.3"],
        "maskUpperTri": True,
        "minValue": 0.0,
        "maxValue": 1.0,
        "negativeColor": "#d55e00",
        "positiveColor": "#0072b2",
    }
    assert "attention" in figure.spec.legend
    assert "Grey" in figure.spec.legend


def test_attention_in_both_directions_is_not_masked():
    figure = attention_view(torch.full((1, 2, 2), 0.5), ["a", "b"])
    assert figure.spec.props["maskUpperTri"] is False
    assert figure.spec.props["attentionHeadNames"] == ["Head 0"]
    assert "Grey" not in figure.spec.legend


def test_z_pattern_scale_is_symmetric_and_shared_by_the_heads():
    z_pattern = torch.tensor([[[0.5, 0.0], [-2.12345, 1.0]], [[0.25, 0.0], [0.0, -0.0001]]])
    props = z_pattern_view(z_pattern, ["a", "b"]).spec.props
    assert props["attention"] == [[[0.5, 0.0], [-2.123, 1.0]], [[0.25, 0.0], [0.0, 0.0]]]
    assert (props["minValue"], props["maxValue"]) == (-2.123, 2.123)
    assert "-0.0" not in script_json(props["attention"])


def test_given_scale_is_used_and_saturation_is_said():
    z_pattern = torch.tensor([[[0.5, 0.0], [-2.0, 1.0]]])
    narrow = z_pattern_view(z_pattern, ["a", "b"], max_abs=1.5).spec
    assert (narrow.props["minValue"], narrow.props["maxValue"]) == (-1.5, 1.5)
    assert "Larger values have full colour too" in narrow.legend
    wide = z_pattern_view(z_pattern, ["a", "b"], max_abs=4.0).spec
    assert (wide.props["minValue"], wide.props["maxValue"]) == (-4.0, 4.0)
    assert "Larger" not in wide.legend


@pytest.mark.parametrize(
    ("values", "rounded", "limit"),
    [
        ([1234.56789, -1.0], [1234.568, -1.0], 1234.568),
        ([0.123456, 0.0], [0.123, 0.0], 0.123),
        ([0.00123456, -0.0001], [0.00123, -0.0001], 0.00123),
        ([2.34567e-7, 0.0], [2.35e-7, 0.0], 2.35e-7),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
    ],
)
def test_rounding_follows_a_small_scale(values, rounded, limit):
    spec = token_view(["a", "b"], torch.tensor(values, dtype=torch.float64)).spec
    assert spec.component == "ColoredTokens"
    assert spec.props["values"] == pytest.approx(rounded, rel=1e-12, abs=0)
    assert spec.props["maxValue"] == pytest.approx(limit, rel=1e-12)
    assert spec.props["minValue"] == -spec.props["maxValue"]


def test_token_view_props_and_legend():
    figure = token_view(["▁a", "</script>"], torch.tensor([0.5, -2.0]), name="head <5.301>")
    assert figure.spec.props["tokens"] == ["·a", "‹/script›"]
    assert figure.spec.props["values"] == [0.5, -2.0]
    assert "head <5.301>" in figure.spec.legend
    assert "head &lt;5.301&gt;" in figure.spec.legend_html()
    assert "\u22122" in figure.spec.legend_html()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_any_floating_tensor_is_taken(dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    pattern = causal(2, 3).to(device, dtype).requires_grad_()
    expected = torch.round(pattern.detach().cpu().double(), decimals=3).tolist()
    assert attention_view(pattern, letters(3)).spec.props["attention"] == expected
    assert z_pattern_view(-pattern, letters(3)).spec.props["minValue"] == -1.0
    assert token_view(letters(3), pattern[0, 0]).spec.props["values"] == [1.0, 0.0, 0.0]
    assert pattern.requires_grad


def test_long_tokens_are_cut_on_axes_only():
    tokens = ["x" * 30, "y" * 20]
    shown = attention_view(causal(1, 2), tokens).spec.props["tokens"]
    assert shown == ["x" * 19 + "…", "y" * 20]
    assert token_view(tokens, torch.ones(2)).spec.props["tokens"] == tokens


@pytest.mark.parametrize("view", [attention_view, z_pattern_view])
@pytest.mark.parametrize(
    ("shape", "n_tokens", "message"),
    [
        ((4, 4), 4, r"must be \[head, query, key\], got shape \(4, 4\); one head is \w+\[None\]"),
        ((1, 2, 4, 4), 4, r"got shape \(1, 2, 4, 4\); choose one sequence of the batch"),
        ((2, 4, 4), 3, r"there are 3 tokens, got shape \(2, 4, 4\)"),
        ((2, 4, 3), 4, r"there are 4 tokens, got shape \(2, 4, 3\)"),
        ((2, 3, 4), 4, r"there are 4 tokens, got shape \(2, 3, 4\)"),
        ((0, 4, 4), 4, r"is empty, got shape \(0, 4, 4\)"),
        ((1, 0, 0), 0, r"is empty, got shape \(1, 0, 0\)"),
        ((MAX_HEADS + 1, 2, 2), 2, r"17 heads, one figure draws at most 16; .*\w+\[heads\]"),
        ((16, 65, 65), 65, r"16 heads of 65 tokens are too much .* at most 15 heads"),
        ((1, MAX_TOKENS + 1, MAX_TOKENS + 1), MAX_TOKENS + 1, r"129 tokens.* at most 128; .*slice"),
    ],
)
def test_heat_maps_refuse_wrong_shapes(view, shape, n_tokens, message):
    with pytest.raises(ValueError, match=message):
        without_hook(view)(torch.zeros(shape), letters(n_tokens))


def test_the_limits_themselves_are_drawn():
    pattern = causal(MAX_HEADS, 64)
    assert len(attention_view(pattern, letters(64)).spec.props["attention"]) == 16
    pattern = causal(4, MAX_TOKENS)
    assert len(attention_view(pattern, letters(MAX_TOKENS)).spec.props["attention"]) == 4
    token_view(letters(MAX_TEXT_TOKENS), torch.ones(MAX_TEXT_TOKENS))


@pytest.mark.parametrize("view", [attention_view, z_pattern_view])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_heat_maps_refuse_what_is_not_finite(view, bad):
    pattern = causal(2, 4)
    pattern[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"1 values that are NaN or infinite.* at \[1, 2, 0\]"):
        view(pattern, TOKENS)


@pytest.mark.parametrize("value", [-0.2, 1.2])
def test_attention_outside_zero_to_one_is_refused(value):
    pattern = causal(1, 4)
    pattern[0, 3, 1] = value
    with pytest.raises(ValueError, match="z_pattern_view draws signed"):
        attention_view(pattern, TOKENS)


def test_attention_just_outside_is_taken_for_rounding():
    pattern = torch.tensor([[[1.004, 0.0], [-0.004, 1.0]]])
    assert attention_view(pattern, ["a", "b"]).spec.props["attention"] == [[[1, 0], [0, 1]]]


@pytest.mark.parametrize("max_abs", [0.0, -1.0, math.nan, math.inf])
def test_max_abs_must_be_above_zero(max_abs):
    with pytest.raises(ValueError, match="max_abs must be finite and above 0"):
        z_pattern_view(causal(1, 4), TOKENS, max_abs=max_abs)
    with pytest.raises(ValueError, match="max_abs must be finite and above 0"):
        token_view(TOKENS, torch.ones(4), max_abs=max_abs)


@pytest.mark.parametrize(
    ("shape", "n_tokens", "message"),
    [
        ((3,), 4, "values has 3 positions, but there are 4 tokens"),
        ((4, 1), 4, r"values must be \[pos\].* got shape \(4, 1\)"),
        ((0,), 0, "empty"),
        ((MAX_TEXT_TOKENS + 1,), MAX_TEXT_TOKENS + 1, "at most 2048"),
    ],
)
def test_token_view_refuses_wrong_shapes(shape, n_tokens, message):
    with pytest.raises(ValueError, match=message):
        without_hook(token_view)(letters(n_tokens), torch.zeros(shape))


def test_other_refusals():
    with pytest.raises(ValueError, match="head_names must name each of the 2 heads, got 1"):
        attention_view(causal(2, 4), TOKENS, head_names=["a"])
    with pytest.raises(TypeError, match="head_names"):
        without_hook(attention_view)(causal(2, 4), TOKENS, head_names="ab")
    with pytest.raises(TypeError, match="one string"):
        without_hook(attention_view)(causal(1, 4), "abcd")
    with pytest.raises(TypeError, match=r"floating dtype, got torch\.int64"):
        without_hook(attention_view)(torch.ones(1, 4, 4, dtype=torch.int64), TOKENS)
    with pytest.raises(TypeError):
        attention_view([[[1.0]]], ["a"])
    with pytest.raises(TypeError):
        attention_view(causal(1, 4), [["a"], ["b"], ["c"], ["d"]])
    with pytest.raises(ValueError, match="component must be one of"):
        Figure("alert(1)//", {}, legend="nothing")
    with pytest.raises(ValueError, match="legend must say"):
        Figure("ColoredTokens", {}, legend=" ")


# --- notebooks ----------------------------------------------------------------------------------


def test_notebooks_get_the_offline_source(monkeypatch):
    from circuitsvis.utils import render as circuitsvis_render

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(circuitsvis_render, "internet_on", refuse)
    monkeypatch.setattr(circuitsvis_render.request, "urlopen", refuse)
    figure = token_view(["a", "</script>"], torch.tensor([1.0, -1.0]))
    assert isinstance(figure, circuitsvis_render.RenderedHTML)
    for source in (figure._repr_html_(), figure.__html__(), str(figure), figure.show_code()):
        assert bundle() in source
        assert "unpkg" not in source
        assert source.count("</script") == 1
        (element_id, component, props) = drawn(source)[0]
        assert component == "ColoredTokens"
        assert props == figure.spec.props
        assert f'<div id="{element_id}"></div>' in source
    assert figure._repr_html_() != figure._repr_html_()
    assert repr(figure).startswith("Figure(ColoredTokens: Colour: activation")
    assert len(repr(figure)) < 200


# --- pages --------------------------------------------------------------------------------------


def test_many_figures_share_one_bundle(tmp_path):
    pattern = causal(8, 42)
    figures = [attention_view(pattern, letters(42)), z_pattern_view(pattern - 0.5, letters(42))]
    page = render(*figures)
    assert page.count(bundle()) == 1
    assert [(name, component) for name, component, _ in drawn(page)] == [
        ("figure-1", "AttentionHeads"),
        ("figure-2", "AttentionHeads"),
    ]
    assert [props for *_, props in drawn(page)] == [figure.spec.props for figure in figures]
    for number, figure in enumerate(figures, start=1):
        assert page.count(f'<div id="figure-{number}"></div>') == 1
        assert f"<figcaption>{figure.spec.legend_html()}</figcaption>" in page
    path = save(tmp_path / "deep" / "er" / "two.html", *figures)
    assert path == tmp_path / "deep" / "er" / "two.html"
    assert path.read_text(encoding="utf-8") == page == render(*figures)
    assert path.stat().st_size < 1_600_000


def test_nothing_on_the_page_refers_to_the_network():
    page = render(
        Heading("Heads"),
        attention_view(causal(2, 4), TOKENS),
        Text("text"),
        Table(["a"], [[1]]),
        token_view(TOKENS, torch.ones(4)),
    )
    own = re.sub(r"'sha256-[^']*'", "", page.replace(bundle(), ""))
    assert len(own) < len(page) - 1_000_000
    for reference in (
        "http:",
        "https:",
        "//",
        "unpkg",
        "google",
        "@import",
        "url(",
        "src=",
        "href",
    ):
        assert reference not in own, reference
    assert "default-src 'none'" in own
    assert "sourceMappingURL" not in page
    assert "unpkg" not in page
    assert not re.search("</script", bundle(), re.I)


@settings(steady, max_examples=50)
@given(st.lists(any_text, min_size=1, max_size=4))
@example(HOSTILE)
def test_arbitrary_text_stays_text(texts):
    plain = render(Heading("a"), Text("b"), Table(["c"], [["d"]]), token_view(["e"], torch.ones(1)))
    values = torch.arange(len(texts), dtype=torch.float32)
    figure = token_view(texts, values, name=texts[-1])
    raw = Figure("ColoredTokens", {"tokens": texts, "values": [0.0] * len(texts)}, legend="raw")
    page = render(
        *(Heading(text) for text in texts),
        *(Text(text) for text in texts),
        Table(texts, [texts, texts]),
        figure,
        raw,
        title=texts[0],
    )
    page.encode("utf-8")
    assert page.lower().count("<script") == plain.lower().count("<script")
    assert page.lower().count("</script") == plain.lower().count("</script")
    assert "<img" not in page.replace(bundle(), "").lower()
    calls = drawn(page)
    assert len(calls) == 2
    assert calls[0][2] == figure.spec.props
    plain_texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
    assert calls[1][2] == {"tokens": plain_texts, "values": [0.0] * len(texts)}


def test_script_json_escapes_what_ends_scripts_and_lines():
    value = {"a": "</script><!--&\u2028\u2029", "b": [1.5, True, None, "é"]}
    text = script_json(value)
    assert text == (
        '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028\\u2029","b":[1.5,true,null,"é"]}'
    )
    assert json.loads(text) == value
    assert script_json("\ud800") == '"\ufffd"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(math.nan)


def test_sections_as_html():
    page = render(
        Heading("One & two"),
        Heading("three", level=3),
        Text("first <b>\nline\n\n\n\nsecond\ud800"),
        Table(["head", "<n>", "share"], [["5.3", 12, 0.123456], ["5.4", 7, 1e-9]]),
        title="<T>",
    )
    assert "<title>&lt;T&gt;</title>" in page
    assert "<h1>&lt;T&gt;</h1>" in page
    assert "<h2>One &amp; two</h2>" in page
    assert "<h3>three</h3>" in page
    assert "<p>first &lt;b&gt;\nline</p>\n<p>second\ufffd</p>" in page
    assert '<tr><th>head</th><th class="number">&lt;n&gt;</th><th class="number">share</th>' in page
    assert '<td>5.3</td><td class="number">12</td><td class="number">0.1235</td>' in page
    assert '<td class="number">1e-09</td>' in page
    assert "<script" not in page
    assert escape("'\"") == "&#x27;&quot;"


def test_pages_refuse_what_they_cannot_show():
    from circuitsvis.utils.render import RenderedHTML

    bare = without_hook(render)
    with pytest.raises(ValueError, match="sections is empty"):
        render()
    with pytest.raises(TypeError, match="section 1 is a str; wrap it in Text"):
        bare(Text("a"), "b")
    with pytest.raises(TypeError, match="section 0 is a RenderedHTML; make it with"):
        bare(RenderedHTML("", ""))
    with pytest.raises(TypeError, match="section 0 is a Tensor"):
        bare(torch.ones(1))
    with pytest.raises(ValueError, match="level must be 2 or 3"):
        Heading("a", level=1)
    with pytest.raises(ValueError, match=r"rows\[1\] must have 2 cells"):
        Table(["a", "b"], [["1", "2"], ["3"]])
    with pytest.raises(ValueError, match="header must be the column titles"):
        Table([], [])
    with pytest.raises(TypeError):
        Table(["a"], [[None]])


@pytest.mark.parametrize("name", ["page", "page.htm", "page.pdf", "page.HTML", ".html"])
def test_the_name_must_end_in_html(tmp_path, name):
    with pytest.raises(ValueError, match=r"path must end in \.html"):
        save(tmp_path / "new" / name, Text("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_page(tmp_path):
    (tmp_path / "a.html").mkdir()
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        save(tmp_path / "a.html", Text("a"))


@pytest.mark.parametrize("stage", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_page(tmp_path, monkeypatch, stage):
    path = save(tmp_path / "page.html", Text("old"))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, Text("new"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save(str(path), Text("new"))
    assert "new" in path.read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_pages_have_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_text("")
    path = save(tmp_path / "page.html", Text("a"))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_importing_views_and_writing_text_is_light():
    program = (
        "import sys, lorsa_lens.views as views\n"
        "from lorsa_lens.views import Heading, Table, Text, display_token, render\n"
        "render(Heading('a'), Text('b'), Table(['c'], [[1]]))\n"
        "assert set(views.__all__) <= set(dir(views))\n"
        "heavy = {'circuitsvis', 'transformer_lens', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "views.Figure\n"
        "assert 'circuitsvis' in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_unknown_names_are_refused():
    import lorsa_lens.views as views

    with pytest.raises(AttributeError, match="has no attribute 'attention_veiw'"):
        views.attention_veiw  # noqa: B018


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_figures_render_in_a_browser_without_a_network(tmp_path):
    tokens = ["<s>", "▁a", "\n", "", *HOSTILE]
    pattern = causal(3, len(tokens))
    values = torch.linspace(-1, 2, len(tokens))
    page = save(
        tmp_path / "page.html",
        Heading("Attention"),
        attention_view(pattern, tokens, head_names=["L0.1", "</script>", "<b>"]),
        z_pattern_view(pattern[:1] * values, tokens),
        token_view(tokens, values),
        # Tokens that were not made safe must stay inert too: the page's policy sees to it.
        Figure("ColoredTokens", {"tokens": HOSTILE, "values": [1.0] * len(HOSTILE)}, legend="raw"),
        Table(["a"], [["last"]]),
        title="Four figures",
    )
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=15000",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    finished = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, check=True, timeout=120
    )
    dom = finished.stdout.decode("utf-8", errors="replace")
    assert "<title>Four figures</title>" in dom
    assert "<td>last</td>" in dom

    starts = [dom.index(f'<div id="figure-{number}">') for number in range(1, 5)]
    ends = [dom.index("<figcaption>", start) for start in starts]
    first, second, third, raw = (dom[start:end] for start, end in zip(starts, ends, strict=True))
    assert first.count("<canvas") == 3 + 1  # a thumbnail per head, and the head in full
    assert second.count("<canvas") == 1 + 1
    sizes = re.findall(r'<canvas[^>]* height="(\d+)" width="(\d+)"', first + second)
    assert len(sizes) == 6
    assert all(int(height) > 20 and int(width) > 20 for height, width in sizes)
    assert "&lt;/script&gt;</h4>" in first
    assert "Head 0 Zoomed" in second
    shown = [html.unescape(text) for text in re.findall(r"px;[^>]*>([^<]*)</span></span>", third)]
    assert shown == display_tokens(tokens)
    assert (
        '<img src="x"' in raw
    )  # the browser did make an element of it, and did not run its handler
