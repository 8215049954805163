# ruff: noqa: RUF001 (the characters that stand for others are the subject here)
"""Facts of heads against naive sums, the site that shows them, and that site in a browser."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import zoo
from browser import chromium, console, opened, overflow
from typer.testing import CliRunner

from lorsa_lens import Lorsa
from lorsa_lens.cli import app
from lorsa_lens.dashboard import Prompt, read_heads, read_prompts, stored_heads, write_site
from lorsa_lens.recording import record_attention
from lorsa_lens.views import Excerpt, HeadFacts, display_token

HOSTILE = ["</script>", "<img src=x onerror=\"document.title='pwned'\">", "\u202e", "'\"`\\", "\n"]


def some_heads(n_layers=2, n_heads=150):
    """Heads whose numbers are known, with tokens that would like to be markup."""
    for layer in range(n_layers):
        for head in range(n_heads):
            words = [*HOSTILE, f"word{head}", "end"]
            yield HeadFacts(
                layer=layer,
                head=head,
                behaviours={"induction": 0.9} if head % 10 == 3 else {},
                density=head / 1000,
                max_activation=2.0,
                mean_offset=math.nan if head == 0 else 1.5,
                excerpts=[Excerpt(words, 6, 1.5, [1.0, -0.5, 0.0, 0.0, 0.0, 0.2, 0.0])],
                raises=[(f"word{head}", 1.0), ("</script>", 0.5)],
                lowers=[(" b", -1.0)],
                reads_most=[("<b>", 2.0)],
                reads_least=[("x", -2.0)],
                origins={0: 0.75, 1: 0.25},
                effective_heads=1.6,
            )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    prompt = Prompt(["a", "</script>"], [[(0, 1, 0.5, 0)], [(1, 2, -0.5, 1)]])
    folder = tmp_path_factory.mktemp("site") / "out"
    write_site(folder, some_heads(), title="<b>model</b>", prompts=[prompt])
    return folder


# --- facts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    return model, lorsa, zoo.tokens(6, 12)


def test_facts_are_those_of_a_naive_reading(subject):
    model, lorsa, tokens = subject
    x = record_attention(model, tokens, [1])[1].x
    with torch.no_grad():
        code = lorsa.encode(x)
        acts = torch.zeros(*tokens.shape, 16).scatter(-1, code.indices, code.values)
        moved = lorsa.z_pattern(x, range(16))
    heads = (acts != 0).any(1).sum(0).topk(3).indices.tolist()  # in no order
    found = read_heads(model, lorsa, tokens, heads, n_excerpts=2, n_tokens=3, batch_size=4)
    assert [(facts.layer, facts.head) for facts in found] == [(1, head) for head in heads]
    for facts in found:
        own = acts[..., facts.head]
        assert facts.density == pytest.approx((own != 0).double().mean().item())
        assert facts.max_activation == pytest.approx(own.abs().max().item())
        rows = own.abs().amax(1).argsort(descending=True)[:2].tolist()
        assert [facts.excerpts[slot].query for slot in (0, 1)] == [
            int(own[row].abs().argmax()) for row in rows
        ]
        for row, excerpt in zip(rows, facts.excerpts, strict=True):
            assert excerpt.activation == pytest.approx(own[row, excerpt.query].item())
            expected = moved[row, facts.head, excerpt.query]
            torch.testing.assert_close(
                torch.tensor(excerpt.z_pattern), expected, atol=2e-3, rtol=2e-3
            )
            assert list(excerpt.tokens) == model.to_str_tokens(tokens[row], prepend_bos=False)
        assert sum(facts.origins.values()) == pytest.approx(1)
        assert len(facts.raises) == len(facts.reads_least) == 3
        assert facts.raises[0][1] >= facts.raises[1][1] > 0 > facts.lowers[0][1]


def test_heads_that_are_not_there_are_refused(subject):
    model, lorsa, tokens = subject
    with pytest.raises(ValueError, match=r"some of 0 to 15, got \[16\]"):
        read_heads(model, lorsa, tokens, [16])
    with pytest.raises(ValueError, match=r"some of 0 to 15, got \[\]"):
        read_heads(model, lorsa, tokens, [])


def test_prompts_show_the_heads_that_write_most(subject):
    model, lorsa, tokens = subject
    prompts = read_prompts(model, {1: lorsa}, tokens[:2], n_heads=2)
    x = record_attention(model, tokens[:2], [1])[1].x
    with torch.no_grad():
        code = lorsa.encode(x)
        acts = torch.zeros(2, 12, 16).scatter(-1, code.indices, code.values)
        sizes = acts.abs() * lorsa.W_O.norm(dim=1)
        moved = lorsa.z_pattern(x, range(16))
    for row, prompt in enumerate(prompts):
        for query, active in enumerate(prompt.active):
            expected = sizes[row, query].topk(2).indices.tolist()
            assert [head for _, head, _, _ in active] == expected
            for _, head, z, source in active:
                assert z == pytest.approx(acts[row, query, head].item())
                assert source == int(moved[row, head, query].abs().argmax())


# --- the site -----------------------------------------------------------------------------------


def test_a_site_has_a_page_for_each_head_and_replaces_only_a_site(site, tmp_path):
    assert len(list((site / "heads").iterdir())) == 300
    names = {path.name for path in site.iterdir()}
    assert names == {
        "heads", "index.html", "layer-0.html", "layer-1.html", "lorsa-dashboard.json",
        "prompts.html",
    }  # fmt: skip
    out = tmp_path / "again"
    write_site(out, some_heads(1, 3))
    write_site(out, some_heads(1, 2))
    assert len(list((out / "heads").iterdir())) == 2
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_site(tmp_path, some_heads(1, 1))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_the_older_site(tmp_path):
    write_site(tmp_path / "site", some_heads(1, 2))

    def failing():
        yield from some_heads(1, 1)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_site(tmp_path / "site", failing())
    with pytest.raises(ValueError, match="heads is empty"):
        write_site(tmp_path / "site", [])
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (tmp_path / "site" / "heads" / "L0.1.html").is_file()


def test_every_link_of_the_site_leads_somewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r'href="([^"]+)"', text)
        assert links
        assert all((page.parent / link).is_file() for link in links)
        assert "http" not in text.replace("http-equiv", "")


def test_six_thousand_heads_stay_below_200_megabytes(tmp_path):
    """A head with six long contexts of four distant sources, and its row of the table."""
    z_pattern = [0.0] * 128
    for key in (5, 30, 60, 90):
        z_pattern[key] = 1.0 + key
    excerpt = Excerpt([" about"] * 128, 120, 3.25, z_pattern)
    (facts,) = some_heads(1, 1)
    tokens = [(" window", 0.123456)] * 8
    large = replace(
        facts, excerpts=[excerpt] * 6, raises=tokens, lowers=tokens, reads_most=tokens,
        reads_least=tokens, origins=dict.fromkeys(range(12), 0.1),
    )  # fmt: skip
    write_site(tmp_path / "one", [large])
    write_site(tmp_path / "two", [large, replace(large, head=1)])
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*.html"))
        for name in ("one", "two")
    ]
    assert 6144 * (sizes[1] - sizes[0]) < 200e6


# --- the command --------------------------------------------------------------------------------


def test_the_command_makes_a_site_of_a_run(tmp_path, monkeypatch):
    model = zoo.KINDS[0].build(torch.float32)
    monkeypatch.setattr("lorsa_lens.hosts.loading.load_host", lambda name, device: model)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    lorsa.save_pretrained(tmp_path / "lorsas" / "blocks.1")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{int(token)}" for token in zoo.tokens(1, 400)[0] - 4))
    config = {"model": "<tiny>", "tokens": str(text), "device": "cpu"}
    (tmp_path / "run_config.json").write_text(json.dumps(config))
    run = CliRunner()
    out = tmp_path / "site"
    command = ["dashboard", str(tmp_path), "--out", str(out), "--context-size", "12"]
    early = run.invoke(app, command)
    assert early.exit_code == 2
    assert "lorsa-lens heads RUN_DIR --contexts" in " ".join(early.output.split()).replace("│ ", "")
    named = run.invoke(
        app, ["heads", str(tmp_path), "--context-size", "12", "--n-prompts", "8",
              "--n-sequences", "6", "--contexts", "96"],
    )  # fmt: skip
    assert named.exit_code == 0, named.output
    made = run.invoke(app, command)
    assert made.exit_code == 0, made.output
    assert len(list((out / "heads").iterdir())) == 16
    assert "Lorsa heads of &lt;tiny&gt;" in (out / "index.html").read_text()
    heads = list(stored_heads(model, {1: lorsa}, tmp_path / "heads"))
    rows = json.loads((tmp_path / "heads" / "correspondence.json").read_text())
    assert [facts.origins[0] for facts in heads if facts.origins] == [
        pytest.approx(row["share_0"]) for row in rows if row["share_0"] is not None
    ]
    page = (out / "heads" / "L1.3.html").read_text()
    assert display_token(heads[3].raises[0][0]) in page
    one = run.invoke(app, [*command, "--n-prompts", "1"])
    assert one.exit_code == 0, one.output
    assert (out / "prompts.html").read_text().count("<h2") == 1
    none = run.invoke(app, [*command, "--n-prompts", "0"])
    assert none.exit_code == 0, none.output
    assert not (out / "prompts.html").exists()


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def names_shown(browser):
    cells = "return [...document.querySelectorAll('#heads tbody a')].map(a => a.textContent)"
    return browser.execute_script(cells)


def count(browser):
    return browser.find_element("id", "count").text


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_drawn_without_errors_and_fit(site, browser, width):
    console(browser)
    for page in ("index.html", "prompts.html", "layer-1.html", "heads/L1.3.html"):
        opened(browser, site / page, width)
        assert browser.find_element("tag name", "h1").text.endswith("<b>model</b>")
        assert overflow(browser, width) <= 0, page
        assert not browser.execute_script("return document.images.length")
    assert console(browser) == []
    assert len(browser.find_elements("css selector", "svg path")) == 2 * 3
    tips = browser.execute_script(
        "return [...document.querySelectorAll('g title')].map(t => t.textContent)"
    )
    assert any("59% of |A·v|, +1, from position 0 (‹/script›) to 6" in tip for tip in tips)


def test_the_table_is_searched_sorted_filtered_and_linked_to(site, browser):
    opened(browser, site / "index.html")
    assert count(browser) == "300 of 300 heads"
    assert names_shown(browser)[:2] == ["L0.0", "L0.1"]
    assert len(names_shown(browser)) == 100

    browser.find_element("css selector", "[data-column=density]").click()
    assert names_shown(browser)[:2] == ["L0.149", "L1.149"]
    browser.find_element("css selector", "[data-column=density]").click()
    assert names_shown(browser)[:3] == ["L0.0", "L1.0", "L0.1"]
    browser.find_element("css selector", "[data-column=distance]").click()
    browser.find_element("id", "next").click()
    browser.find_element("id", "next").click()
    assert set(names_shown(browser)[-2:]) == {"L0.0", "L1.0"}  # what is not known comes last

    browser.find_element("id", "query").send_keys("word14 induction")
    assert names_shown(browser) == ["L0.143", "L1.143"]
    browser.find_element("css selector", "#layer option[value='1']").click()
    assert names_shown(browser) == ["L1.143"]
    address = browser.current_url
    opened(browser, "about:blank")
    opened(browser, address)
    assert names_shown(browser) == ["L1.143"]
    assert browser.find_element("id", "query").get_attribute("value") == "word14 induction"
    browser.find_element("link text", "L1.143").click()
    assert browser.current_url.endswith("heads/L1.143.html")
    assert browser.find_element("css selector", "h2").text == "Head L1.143"


def test_the_table_is_reached_by_keyboard(site, browser):
    opened(browser, site / "index.html")
    reached = []
    for _ in range(20):
        keys = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", **keys})
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **keys})
        reached.append(
            browser.execute_script(
                "const e = document.activeElement; return e.id || e.dataset.column || e.textContent"
            )
        )
    assert [name for name in reached if name in ("query", "layer", "behaviour", "alive")] == [
        "query", "layer", "behaviour", "alive",
    ]  # fmt: skip
    assert {"head", "density", "reads", "L0.0"} <= set(reached)


def test_both_colour_schemes(site, browser):
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        opened(browser, site / "index.html")
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        seen[scheme] = browser.execute_script(style)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"] == ["rgb(252, 252, 252)", "rgb(28, 28, 28)"]
    assert seen["dark"] == ["rgb(23, 23, 23)", "rgb(228, 228, 228)"]
