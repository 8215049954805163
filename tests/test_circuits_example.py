"""The example and the notebook about the circuit of recall find it, and a notebook shows it."""

import html
import json
import re

import pytest
from browser import chromium, console, opened
from circuits_graphs import small_details, small_graph
from circuits_models import replaced
from test_examples import check_page, run
from test_notebooks import NOTEBOOKS, execute

from lorsa_lens.circuits.page import GraphView
from lorsa_lens.demo import recall_circuit

PAIR = 13, 14  # where the key and the value of the prompt stand


def check_circuit(head, labels, chain, words, traced):
    """An induction head takes the value from where a previous-token head has marked the key."""
    assert (head.layer, head.pos) == (1, len(words) - 1)
    assert labels[head.layer, head.index] == "induction"
    assert traced["key"] == PAIR[1]
    (query, key, value), *_ = traced["pair_wise"]
    assert query == f"token@{len(words) - 1}"
    assert value > 0.5 * traced["total"]
    first, second, target = chain
    assert (first.layer, first.pos, first.id) == (0, PAIR[1], key)
    assert labels[0, first.index] == "previous token"
    assert (second, target.kind) == (head, "logit")


@pytest.fixture
def trained_once(monkeypatch):
    _, lorsas = replaced("recall")
    monkeypatch.setattr(recall_circuit, "trained_lorsas", lambda model, n_steps: lorsas)


def test_the_example_finds_the_circuit(trained_once, tmp_path, capsys):
    found = run("circuit_of_recall", "--steps", 150, "--out", tmp_path / "recall.html")
    graph, details = found.explanation.graph, found.explanation.details
    head = next(iter(details.qk))
    check_circuit(head, found.labels, found.chain, graph.tokens, details.qk[head])
    assert found.loss_recovered > 0.99
    assert found.chain[0] in graph.nodes  # it has no influence there, but decides
    moved, marked = found.changes.values()
    assert moved[0] == pytest.approx(moved[1], rel=0.5)
    assert moved[1] < -5 < -3 < marked[0]
    assert marked[1] < -5
    out = capsys.readouterr().out
    value = graph.tokens[PAIR[1]]
    assert f"token {value} ({PAIR[1]}) → L1.{head.index} (induction)" in out
    assert f"the strongest chain: {found.chain[0].id} → {head.id}" in out
    check_page(tmp_path / "recall.html", "L1." + str(head.index), "why heads attend")


def test_the_notebook_runs(trained_once, tmp_path, monkeypatch, capsys):
    names = execute("circuits", tmp_path, monkeypatch, N_STEPS=150)
    head, chain = names["head"], names["chain"]
    check_circuit(head, names["labels"], chain.nodes, names["words"], names["traced"])
    assert chain.via == ("pattern", "values")
    assert names["traced"]["effective_rank"] < 2
    assert (names["parts"] - names["graph"].pre_activations).abs().max() < 1e-4
    for predicted, frozen, _ in names["changes"].values():
        assert predicted == pytest.approx(frozen, rel=1e-4, abs=1e-4)
    assert names["changes"]["the previous-token head"][2] < -5
    assert "recall/circuit-tracer/recall.json" in capsys.readouterr().out
    assert (tmp_path / "recall" / "graph.graphml").is_file()


def test_the_committed_notebook_holds_the_page():
    notebook = json.loads((NOTEBOOKS / "circuits.ipynb").read_text(encoding="utf-8"))
    shown = [
        "".join(output["data"]["text/html"])
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    (frame,) = [text for text in shown if text.startswith("<iframe")]
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', frame).group(1))
    assert page.startswith("<!doctype html>")
    assert "const GRAPH = {" in page
    assert "L0.84 (previous token)" in page


def test_a_notebook_shows_the_graph_in_a_frame(tmp_path):
    graph = small_graph()
    view = GraphView(graph, details=small_details(graph), title='a "b"')
    assert repr(view) == "GraphView(AttributionGraph(n_nodes=20, n_edges=28))"
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><p>before</p>{view._repr_html_()}", encoding="utf-8")
    with chromium() as browser:
        from selenium.webdriver.support.ui import WebDriverWait

        opened(browser, page)
        browser.switch_to.frame(0)
        assert browser.find_element("css selector", "h1").text == 'a "b"'
        texts = "return [...document.querySelectorAll('.node text')].map(t => t.textContent)"
        assert "induction" in browser.execute_script(texts)
        logit = browser.find_element("css selector", ".node.logit")
        WebDriverWait(browser, 30).until(lambda _: logit.is_displayed())
        logit.click()
        assert browser.find_element("css selector", "#panel h2").text.startswith("logit of")
        assert console(browser) == []
