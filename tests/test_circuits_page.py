# ruff: noqa: RUF001 (the characters that stand for others are the subject here)
"""The page of a graph, in a browser without a network: drawn, pruned, followed, zoomed."""

import re
from collections import Counter

import pytest
from browser import chromium, console, opened
from circuits_graphs import (
    EDGES,
    INDUCTION,
    LOGIT,
    MLP,
    PREVIOUS,
    SINK,
    T,
    made_graph,
    small_details,
    small_graph,
)

from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.page import render_graph, save_graph_page
from lorsa_lens.circuits.page.values import page_values
from lorsa_lens.views import Excerpt

TITLE = "<b onclick=alert(1)>Lily</b>"

# --- what the page holds -------------------------------------------------------------------------


def test_values_are_those_of_the_graph():
    graph = small_graph()
    values = page_values(graph)
    assert [node["id"] for node in values["nodes"]] == [node.id for node in graph.nodes]
    edges = {(e["source"], e["target"]): e for e in values["edges"]}
    assert {(graph.nodes[s], graph.nodes[t]): edge["weight"] for (s, t), edge in edges.items()} == {
        (s, t): weight for s, t, weight in EDGES
    }
    at = {node: graph.index(node) for node in graph.nodes}
    logit = values["nodes"][at[LOGIT]]
    assert (logit["influence"], logit["before"], logit["row"]) == (1.0, 0.0, 4)
    gross = graph.gross[at[LOGIT]].item()
    assert edges[at[INDUCTION], at[LOGIT]]["flow"] == pytest.approx(3.0 / gross, rel=1e-4)
    assert edges[at[MLP], at[LOGIT]]["flow"] == pytest.approx(-0.4 / gross, rel=1e-4)
    assert edges[at[INDUCTION], at[LOGIT]]["before"] == pytest.approx(0.0, abs=1e-12)
    rows = {node: values["nodes"][i]["row"] for node, i in at.items()}
    assert (rows[T[0]], rows[PREVIOUS], rows[MLP], rows[INDUCTION]) == (-1, 0, 1, 2)
    assert values["supernodes"][1] == ["induction", [at[INDUCTION], at[INDUCTION] + 1]]


def test_a_difference_of_tokens_is_named_by_both():
    graph = small_graph(probabilities={}, labels={LOGIT: " Lily -  Tim"})
    assert page_values(graph)["nodes"][graph.index(LOGIT)]["name"] == "·Lily - ·Tim"


def test_targets_share_the_influence():
    """Weights are shares of what is explained, whatever they sum to."""
    other = Node("logit", 2, 7, 318)
    graph = made_graph([*EDGES, (SINK, other, 1.0)])
    graph.target_weights[graph.index(LOGIT)] = 0.6
    graph.target_weights[graph.index(other)] = 0.2
    nodes = {node["id"]: node for node in page_values(graph)["nodes"]}
    assert (nodes[LOGIT.id]["influence"], nodes[other.id]["influence"]) == (0.75, 0.25)


def test_what_is_too_large_is_refused_with_advice(monkeypatch):
    graph = small_graph()
    with pytest.raises(ValueError, match="the graph has no nodes"):
        render_graph(graph.keeping(graph.of_kind()))
    monkeypatch.setattr("lorsa_lens.circuits.page.values.MAX_NODES", 19)
    with pytest.raises(ValueError, match=r"has 20 nodes and 28 edges; a page holds at most 19 and"):
        render_graph(graph)
    monkeypatch.setattr("lorsa_lens.circuits.page.values.MAX_NODES", 20)
    monkeypatch.setattr("lorsa_lens.circuits.page.values.MAX_EDGES", 27)
    with pytest.raises(ValueError, match=r"Prune it first: prune\(graph, node_threshold=0.8\)"):
        render_graph(graph)


def test_the_file_is_a_page(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .html, got"):
        save_graph_page(small_graph(), tmp_path / "page.txt")
    with pytest.raises(ValueError, match=r"z pattern of head.L1.42@7 has 1 values"):
        save_graph_page(
            small_graph(), tmp_path / "p.html", details=Details(z_patterns={INDUCTION: [1.0]})
        )
    assert not list(tmp_path.iterdir())


def test_nothing_is_asked_for_and_hostile_text_stays_text():
    graph = small_graph()
    page = render_graph(graph, details=small_details(graph), title=TITLE)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<i>" not in page
    assert "<b onclick" not in page
    assert "</script><b>x" not in page.replace("</script>\n", "")


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    graph = small_graph()
    path = tmp_path_factory.mktemp("graph") / "graph.html"
    return save_graph_page(graph, path, details=small_details(graph), title=TITLE)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Forty heads at each of six tokens, of falling weight, and a long prompt."""
    tokens = tuple(f" word{pos}" for pos in range(60))
    logit = Node("logit", 1, 59, 7)
    edges = [
        (Node("head", 0, pos, head), logit, 1.0 / (1 + head)) for pos in range(54, 60)
        for head in range(40)
    ]  # fmt: skip
    edges += [(Node("token", -1, source.pos, 1), source, 1.0) for source, _, _ in edges]
    graph = made_graph(edges, tokens=tokens, n_layers=1)
    return save_graph_page(graph, tmp_path_factory.mktemp("large") / "large.html")


def shown(browser):
    texts = "return [...document.querySelectorAll('.node text')].map(t => t.textContent)"
    return browser.execute_script(texts)


def text_of(browser, selector):
    return browser.find_element("css selector", selector).text


def view_box(browser):
    box = browser.find_element("id", "graph").get_dom_attribute("viewBox")
    return [float(number) for number in box.split()]


def node(browser, text):
    inside = f"*[name()='text' and .='{text}']"
    return browser.find_element("xpath", f"//*[name()='g' and @role='button'][{inside}]")


FREE_POINT = """
const path = arguments[0], all = path.getTotalLength();
for (let at = 0; at <= all; at += 3) {
  const { x, y } = path.getPointAtLength(at).matrixTransform(path.getScreenCTM());
  if (document.elementFromPoint(x, y) === path) return [x, y];
}
"""
"""A point of a path that nothing covers."""


def hover(browser, element):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def press(browser, *keys):
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        browser.switch_to.active_element.send_keys(getattr(Keys, key, key))


def slide(browser, name, value):
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    browser.execute_script(script, name, value)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_without_errors_and_fits(page, browser, width):
    console(browser)
    opened(browser, page, width)
    assert console(browser) == []
    assert text_of(browser, "h1") == TITLE
    assert "‹/script›‹b›x" in text_of(browser, ".prompt")
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0
    assert not browser.execute_script("return document.querySelectorAll('#graph b, i').length")
    stage, panel = (browser.find_element("id", name).rect for name in ("stage", "panel"))
    beside = panel["x"] >= stage["x"] + stage["width"]
    assert beside if width == 1280 else panel["y"] >= stage["y"] + stage["height"]
    assert min(stage["height"], stage["width"]) > 250
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.node text')].map(t => t.getBoundingClientRect())"
        ".map(r => r.height)"
    )
    assert min(sizes) > 9


def test_every_node_and_edge_is_there(page, browser):
    opened(browser, page)
    assert text_of(browser, "#count") == "20 of 20 nodes, 28 of 28 edges"
    assert {"induction", "previous <b>", "L0.3 same <token>", "MLP 0", "L1H2←3"} <= set(
        shown(browser)
    )
    assert 's"aw·93%' not in shown(browser)  # the percentage is no part of the token
    assert '·s"aw 93%' in shown(browser)
    assert len(browser.find_elements("css selector", "#graph .link.lowers")) == 2
    legend = text_of(browser, "#legend")
    for name in ("Lorsa head", "original attention head", "MLP feature", "bias", "lowers it"):
        assert name in legend
    browser.find_element("id", "grouped").click()
    assert {"L1.42 induction", "L1.43 induction"} <= set(shown(browser))
    assert "induction" not in shown(browser)


def test_positions_go_across_and_layers_up(page, browser):
    opened(browser, page)
    places = {
        text: node(browser, text).rect for text in ("·saw", "previous <b>", "induction", "MLP 0")
    }
    centre = {text: rect["x"] + rect["width"] / 2 for text, rect in places.items()}
    assert abs(centre["·saw"] - centre["previous <b>"]) < 1
    assert centre["induction"] > centre["previous <b>"]
    assert places["induction"]["y"] < places["MLP 0"]["y"] < places["previous <b>"]["y"]
    assert places["previous <b>"]["y"] < places["·saw"]["y"]


def test_hovering_tells_what_a_node_and_an_edge_are(page, browser):
    opened(browser, page)
    browser.find_element("id", "grouped").click()
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    hover(browser, node(browser, "L1.42 induction"))
    assert tip.text.startswith("L1.42 (induction) at ·Lily (7)\nLorsa head\ninfluence 45%")
    assert "activation z 4.03" in tip.text
    # its z pattern on this prompt, and its strongest context
    assert len(tip.find_elements("css selector", "figure")) == 2
    assert "‹/script›" in tip.text
    link = browser.find_element("css selector", ".link.raises:last-child .hit")
    x, y = browser.execute_script(FREE_POINT, link)
    event = {"type": "mouseMoved", "x": x, "y": y}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    assert tip.text.startswith('L1.42 (induction) at ·Lily (7) → logit of ·s"aw at ·Lily (7)\n+3,')
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 5, "y": 5})
    assert not tip.is_displayed()


def test_clicking_follows_edges(page, browser):
    opened(browser, page)
    overview = text_of(browser, "#panel")
    assert "How to read it" in overview
    assert "<i>hand-made</i>" in overview
    node(browser, "induction").click()
    assert text_of(browser, "#panel h2") == "induction"
    browser.find_element("css selector", "#panel [data-node]").click()
    assert text_of(browser, "#panel h2") == "L1.42 (induction) at ·Lily (7)"
    panel = text_of(browser, "#panel")
    assert "L0.12 (previous token) at ·saw (2)\n+2.1\n52%" in panel
    assert "edges +4, constant +0.05, outside the graph −0.02; together +4.03" in panel
    chosen = browser.find_elements("css selector", ".node.chosen")
    assert [one.text for one in chosen] == ["L1.42 induction"]
    near = browser.find_elements("css selector", "#graph .link.near")
    kinds = Counter(one.get_attribute("class").split()[1] for one in near)
    assert kinds == {"attends": 2, "raises": 5 + 2}  # with what reaches the deciding head
    browser.find_element(
        "xpath", "//*[@id='panel']//button[.='L0.12 (previous token) at ·saw (2)']"
    ).click()
    assert text_of(browser, "#panel h2") == "L0.12 (previous token) at ·saw (2)"
    assert browser.current_url.endswith("node=head.L0.12%402")
    opened(browser, "about:blank")
    opened(browser, page.as_uri() + "#nodes=100&edges=100&node=head.L0.12%402")
    assert text_of(browser, "#panel h2") == "L0.12 (previous token) at ·saw (2)"
    browser.find_element("css selector", "#panel [data-action=clear]").click()
    assert text_of(browser, "#panel") == overview
    assert not browser.find_elements("css selector", ".far")


def test_the_panel_shows_why_a_head_attends(page, browser):
    opened(browser, page.as_uri() + "#node=head.L1.42%407")
    panel = browser.find_element("id", "panel")
    assert "Why it attends" in panel.text
    rows = panel.find_elements("css selector", "table:first-of-type tbody tr")
    cells = [[cell.text for cell in row.find_elements("tag name", "td")] for row in rows]
    assert cells[0] == [
        "L0.3 (same <token>) at ·Lily (7)", "L0.12 (previous token) at ·saw (2)", "+4.2",
    ]  # fmt: skip
    assert ["<i>other</i>", "token ·saw (2)", "-0.4"] in cells
    rows[0].find_elements("css selector", "button")[1].click()
    assert text_of(browser, "#panel h2") == "L0.12 (previous token) at ·saw (2)"


def test_links_say_why_heads_attend(browser, tmp_path):
    """What has no influence but decides where a head attends comes with its strongest sources."""
    deciding = Node("head", 0, 5, 8)
    edges = [(T[4], deciding, 0.1), (T[1], deciding, 0.8), (T[2], deciding, -0.9)]
    graph = made_graph([*EDGES, *edges])
    traced = {"pair_wise": [], "top_q_marginal": [], "top_k_marginal": [[deciding.id, 4.0]]}
    page = save_graph_page(graph, tmp_path / "g.html", details=Details(qk={INDUCTION: traced}))
    opened(browser, page)
    slide(browser, "nodes", 60)
    assert "L0.8" in shown(browser)
    (link,) = browser.find_elements("css selector", "#graph .link.attends .hit")
    x, y = browser.execute_script(FREE_POINT, link)
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    assert text_of(browser, "#tip") == (
        "Why a head attends\nL0.8 at ·Tim (5) gives +4 to the score of L1.42 at ·Lily (7), on the "
        "key's side"
    )
    into = "return [...document.querySelectorAll('#graph .link')].map(g => g.link)"
    into += ".filter(l => l.target === arguments[0]).map(l => l.source)"
    found = browser.execute_script(into, graph.index(deciding))
    assert set(found) == {graph.index(T[1]), graph.index(T[2])}
    browser.find_element("id", "attends").click()
    assert "L0.8" not in shown(browser)
    assert not browser.find_elements("css selector", "#graph .link.attends")


def test_sliders_prune(page, large, browser):
    opened(browser, page)
    slide(browser, "nodes", 40)
    names = set(shown(browser))
    assert {'·s"aw 93%', "induction"} <= names
    assert "MLP 0" not in names
    assert text_of(browser, "#nodes-value") == "40%"
    n_edges = len(browser.find_elements("css selector", "#graph .link"))
    slide(browser, "nodes", 100)
    slide(browser, "edges", 20)
    assert len(browser.find_elements("css selector", "#graph .link")) < n_edges + 3
    assert "nodes=100&edges=20" in browser.current_url
    # nodes that nothing leads on from are left out
    assert "bias MLP 1" not in shown(browser)
    opened(browser, large)
    count = text_of(browser, "#count")
    assert int(count.split()[0]) <= 40 < 247 == int(count.split()[2])
    slide(browser, "edges", 100)
    slide(browser, "nodes", 100)
    assert text_of(browser, "#count") == "247 of 247 nodes, 480 of 480 edges"
    assert console(browser) == []


def test_zoom_and_pan(page, browser):
    opened(browser, page)
    start = view_box(browser)
    browser.find_element("css selector", "[data-action=in]").click()
    near = view_box(browser)
    assert near[2] == pytest.approx(start[2] / 1.25)
    assert near[0] + near[2] / 2 == pytest.approx(start[0] + start[2] / 2)
    browser.find_element("css selector", "[data-action=out]").click()
    assert view_box(browser) == pytest.approx(start)
    stage = browser.find_element("id", "stage").rect
    scroll = browser.execute_script("return scrollY")
    at = {"x": stage["x"] + 200 - 0, "y": stage["y"] + 100 - scroll}
    wheel = {"type": "mouseWheel", **at, "deltaX": 0, "deltaY": -60}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {**wheel, "modifiers": 2})
    closer = view_box(browser)
    assert closer[2] < start[2]
    point = [box[0] + 199 * box[2] / (stage["width"] - 2) for box in (start, closer)]
    assert point[0] == pytest.approx(point[1], abs=2)  # what is under the pointer stays there
    for kind, dx in (
        ("mousePressed", 0),
        ("mouseMoved", 30),
        ("mouseMoved", 60),
        ("mouseReleased", 60),
    ):
        event = {"type": kind, "x": at["x"] + dx, "y": at["y"], "button": "left", "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {**event, "buttons": 1})
    moved = view_box(browser)
    assert moved[0] == pytest.approx(closer[0] - 60 * closer[2] / (stage["width"] - 2), abs=2)
    assert text_of(browser, "#panel h2") == "How to read it"  # a drag chooses nothing
    browser.find_element("css selector", "[data-action=fit]").click()
    assert view_box(browser)[2] >= start[2] - 1


def test_the_graph_is_walked_by_keyboard(page, browser):
    opened(browser, page)
    focus = "return document.activeElement.id || document.activeElement.dataset.key"
    reached = []
    for _ in range(12):
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", **key})
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **key})
        reached.append(browser.execute_script(focus))
        if reached[-1] == "19":
            break
    assert [name for name in reached if name] == [
        "nodes",
        "edges",
        "grouped",
        "attends",
        "query",
        "19",
    ]
    press(browser, "ARROW_DOWN")
    assert browser.switch_to.active_element.text == "induction"
    assert browser.find_element("id", "tip").is_displayed()
    press(browser, "ARROW_DOWN")
    assert browser.switch_to.active_element.text == "previous <b>"
    press(browser, "ARROW_UP", "ARROW_RIGHT")
    assert browser.switch_to.active_element.text == "L1.7"
    press(browser, "ENTER")
    assert text_of(browser, "#panel h2") == "L1.7 at ·Lily (7)"
    width = view_box(browser)[2]
    press(browser, "+")
    assert view_box(browser)[2] < width
    press(browser, "ESCAPE")
    assert text_of(browser, "#panel h2") == "How to read it"


def test_nodes_are_found(page, browser):
    opened(browser, page)
    browser.find_element("id", "query").send_keys("previous saw")
    assert [one.text for one in browser.find_elements("css selector", ".found")] == ["previous <b>"]
    press(browser, "ENTER")
    assert text_of(browser, "#panel h2") == "previous <b>"


def test_both_colour_schemes(page, browser):
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        opened(browser, page)
        style = "return [getComputedStyle(document.querySelector('#stage')).backgroundColor,"
        style += "getComputedStyle(document.querySelector('.node text')).fill]"
        seen[scheme] = browser.execute_script(style)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"] == ["rgb(252, 252, 252)", "rgb(28, 28, 28)"]
    assert seen["dark"] == ["rgb(23, 23, 23)", "rgb(228, 228, 228)"]


def test_long_contexts_and_many_heads_stay_small():
    graph = small_graph()
    long = Excerpt([" about"] * 512, 500, 3.25, [0.001] * 512)
    details = Details(contexts={(1, 42): [long] * 20})
    sizes = [len(render_graph(graph, details=one)) for one in (Details(), details)]
    assert sizes[1] - sizes[0] < 30_000  # six contexts are kept, tokens near sources drawn
