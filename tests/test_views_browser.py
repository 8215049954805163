# ruff: noqa: RUF001 (the characters that stand for others are the subject here)
"""Every kind of figure and page in a real Chromium without a network: drawn, hover, keyboard."""

import math
import re

import pytest
import torch
import zoo
from browser import chromium, console, opened, overflow

from lorsa_lens import Lorsa
from lorsa_lens.dashboard import Prompt, write_site
from lorsa_lens.evaluation import evaluate, save_evaluation
from lorsa_lens.views import (
    Bars,
    Excerpt,
    HeadFacts,
    Plot,
    Table,
    Text,
    attention_view,
    compare_view,
    head_card,
    layer_overview,
    plot_fvu_by_k,
    save,
    token_view,
    z_pattern_view,
)

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\"><svg onload=alert(1)>",
    "'\"`\\",
    "\u202e\u2066abc",
    "&lt;b&gt;",
]  # fmt: skip
NAME = " ".join(HOSTILE)
SHOWN = NAME.replace("\u202e", "‹U+202E›").replace("\u2066", "‹U+2066›")
WORDS = ["<s>", "a", "\n", "", *HOSTILE]


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def wait(browser, condition, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def hover(browser, element):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def causal(n_heads, n_tokens):
    scores = torch.randn(n_heads, n_tokens, n_tokens)
    return scores.masked_fill(torch.ones(n_tokens, n_tokens).triu(1).bool(), -math.inf).softmax(-1)


def some_facts(head):
    return HeadFacts(
        layer=1,
        head=head,
        behaviours={NAME: 0.9},
        density=0.01,
        max_activation=2.0,
        mean_offset=1.5,
        excerpts=[Excerpt(WORDS, 9, 1.5, [1.0, -0.5, *[0.0] * 6, 0.2, 0.0])],
        raises=[(word, 1.0) for word in WORDS],
        lowers=[(word, -1.0) for word in WORDS],
        reads_most=[(word, 1.0) for word in WORDS],
        reads_least=[(word, -1.0) for word in WORDS],
        origins={0: 0.75, 1: 0.25},
        effective_heads=1.6,
    )


# --- figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A page with one of everything; figures 1 to 3 are heat maps, 4 is coloured text."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    torch.manual_seed(0)
    pattern, values = causal(3, len(WORDS)), torch.linspace(-1, 2, len(WORDS))
    moved = pattern * values
    axes = plot_fvu_by_k({"<img src=x>": {8: 0.5, 16: 0.25}})
    page = save(
        tmp_path_factory.mktemp("figures") / "page.html",
        attention_view(pattern, WORDS, head_names=["one", "two", NAME]),
        z_pattern_view(moved, WORDS, head_names=["one", "two", NAME]),
        compare_view(pattern[0], moved[1:], WORDS, attention_name=NAME, head_names=["one", "two"]),
        token_view(WORDS, values, name=NAME),
        head_card(some_facts(3)),
        layer_overview([some_facts(3), some_facts(4)]),
        Bars(WORDS, {NAME: [1.0] * len(WORDS)}),
        Table(WORDS, [WORDS]),
        Text(NAME),
        Plot(axes, legend=NAME),
        title=NAME,
    )
    axes.figure.clear()
    return page


def shown_head(browser, number):
    return browser.find_element("css selector", f"#figure-{number} h2").text


def thumbnails(browser, number):
    return browser.find_elements("css selector", f"#figure-{number} [role=button]")


def drawn(browser, page, width=1280):
    opened(browser, page, width)
    wait(browser, lambda: all(len(thumbnails(browser, number)) == 3 for number in (1, 2, 3)))
    wait(browser, lambda: browser.find_elements("css selector", "#figure-4 .colored-tokens > span"))


@pytest.mark.parametrize("width", [1280, 390])
def test_all_figures_are_drawn_and_fit(figures, browser, width):
    console(browser)
    drawn(browser, figures, width)
    assert overflow(browser, width) <= 0
    for number in (1, 2, 3):
        canvases = browser.find_elements("css selector", f"#figure-{number} canvas")
        assert len(canvases) == 3 + 1  # a thumbnail for each, and one in full
        assert all(canvas.size["width"] > 40 for canvas in canvases)
        assert canvases[-1].size["width"] > 0.6 * min(width, 800)
    spans = browser.find_elements("css selector", "#figure-4 .colored-tokens > span")
    assert len(spans) == len(WORDS)
    assert len(browser.find_elements("css selector", "svg path")) == 2 * 3  # arrows and their heads
    assert len(browser.find_elements("css selector", "svg rect title")) >= len(WORDS)
    (picture,) = browser.find_elements("tag name", "img")  # the plot
    assert picture.get_attribute("alt") == SHOWN
    assert browser.execute_script("return arguments[0].naturalWidth", picture) > 100
    assert browser.title == SHOWN
    assert console(browser) == []


def test_heads_are_shown_on_hover_and_kept_by_a_click(figures, browser):
    drawn(browser, figures)
    title = browser.find_element("tag name", "h1")
    for number, names in ((1, ["one", "two"]), (3, [NAME, "one"])):
        first, second, _ = thumbnails(browser, number)
        assert shown_head(browser, number) == names[0]
        hover(browser, second)
        assert shown_head(browser, number) == names[1]
        hover(browser, title)
        assert shown_head(browser, number) == names[0]
        second.click()
        hover(browser, title)
        assert shown_head(browser, number) == names[1]
        first.click()


def test_cells_and_tokens_tell_their_values_on_hover(figures, browser):
    drawn(browser, figures)
    for number in (1, 2, 3):
        canvas = browser.find_elements("css selector", f"#figure-{number} canvas")[-1]
        hover(browser, browser.find_element("tag name", "h1"))
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        before = canvas.screenshot_as_png
        hover(browser, canvas)
        wait(browser, lambda before=before, canvas=canvas: canvas.screenshot_as_png != before)
    figure = browser.find_element("id", "figure-4")
    assert "-0.667" not in figure.text
    hover(browser, figure.find_elements("css selector", ".colored-tokens > span")[1])
    wait(browser, lambda: "-0.667" in figure.text)  # of -1 to 2 in nine steps


def test_heads_are_reached_and_kept_by_keyboard(figures, browser):
    drawn(browser, figures)
    seen = []
    for _ in range(9):
        browser.switch_to.active_element.send_keys("\t")
        label = browser.execute_script("return document.activeElement.ariaLabel")
        number = len(seen) // 3 + 1
        assert shown_head(browser, number) == label
        seen.append(label)
    assert seen == ["one", "two", NAME] * 2 + [NAME, "one", "two"]
    browser.switch_to.active_element.send_keys("\n")
    browser.execute_script("document.activeElement.blur()")
    assert shown_head(browser, 3) == "two"


def test_the_largest_page_is_light_and_drawn(browser, tmp_path):
    """16 heads of 64 tokens; more are refused, with advice (`test_heat_maps_refuse...`).

    Drawing takes the browser about 3 seconds of one core; how long that is depends on the machine.
    """
    tokens = [f" token{number}" for number in range(64)]
    moved = causal(16, 64) * torch.randn(64)
    page = save(tmp_path / "large.html", z_pattern_view(moved, tokens))
    assert page.stat().st_size < 3_000_000
    console(browser)
    opened(browser, page)
    wait(browser, lambda: len(thumbnails(browser, 1)) == 16)
    assert len(browser.find_elements("css selector", "#figure-1 canvas")) == 17
    assert console(browser) == []


def test_a_plot_is_the_same_every_time():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = plot_fvu_by_k({"Lorsa": {8: 0.5, 16: 0.25}})
    page = Plot(axes, legend="<FVU>").to_html()
    assert Plot(axes, legend="<FVU>").to_html() == page
    assert "&lt;FVU&gt;</figcaption>" in page
    with pytest.raises(ValueError, match="legend must say"):
        Plot(axes, legend=" ")
    axes.figure.clear()


# --- hostile strings on every kind of page ------------------------------------------------------


@pytest.fixture(scope="module")
def pages(figures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    prompt = Prompt(WORDS, [[(1, 3, 0.5, 4)]] * len(WORDS))
    write_site(folder / "site", [some_facts(3), some_facts(4)], title=NAME, prompts=[prompt])
    model = zoo.KINDS[0].build(torch.float32)
    rows = evaluate(model, [Lorsa.from_attention(model, 1)], zoo.tokens(2, 8))
    _, report = save_evaluation(folder, rows, {"model": NAME, "tokens": NAME})
    found = {path.name: path for path in (folder / "site").rglob("*.html")}
    return {**found, "figures": figures, "evaluation": report}


@pytest.mark.parametrize(
    "page",
    ["figures", "evaluation", "index.html", "L1.3.html", "layer-1.html", "prompts.html"],
)
def test_hostile_strings_never_become_markup(pages, browser, page):
    source = pages[page].read_text(encoding="utf-8")
    assert "<script>document.title" not in source
    shown = re.sub("<script>.*?</script>", "", source, flags=re.DOTALL)
    assert "\u202e" not in shown
    console(browser)
    opened(browser, pages[page])
    wait(browser, lambda: browser.execute_script("return document.readyState") == "complete")
    if page == "index.html":
        wait(browser, lambda: browser.find_elements("css selector", "#heads tbody tr"))
    if page == "figures":
        drawn(browser, pages[page])
    assert browser.title != "pwned"
    assert browser.execute_script("return document.querySelectorAll('svg[onload]').length") == 0
    images = browser.execute_script("return [...document.images].map(made => made.src.slice(0, 5))")
    assert set(images) <= {"data:"}
    scripts = browser.execute_script("return document.scripts.length")
    assert scripts == {"figures": 3, "index.html": 1}.get(page, 0)
    assert console(browser) == []
