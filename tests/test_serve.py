"""Prompts of one's own, steered heads: numbers against plain hooks, and a server that is shut."""

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from browser import chromium, console, opened, overflow
from typer.testing import CliRunner

from lorsa_lens import Lorsa, splice
from lorsa_lens.cli import app as commands
from lorsa_lens.dashboard import Edit, Playground, Prompt, write_site
from lorsa_lens.views import HeadFacts, display_token, display_tokens

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
from starlette.testclient import TestClient

from lorsa_lens.dashboard import bind, make_app, make_server, server

PROMPT = "w1 w2 w3 w1 w2 w3 w1 w2"
HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"> \u202e '\"`\\ {{7*7}} ${7*7} %s"


def make_playground(kind=Playground):
    """Always the same."""
    model = zoo.KINDS[0].build(torch.float32)
    lorsas = {layer: Lorsa.from_attention(model, layer, n_ov_heads=16, k=4) for layer in (1, 0)}
    return kind(model, lorsas)


@pytest.fixture(scope="module")
def playground():
    return make_playground()


def steered(playground, edits, position=-1, prompt=PROMPT):
    """Logits after plain hooks, all layers spliced with the error term."""
    hooks = []
    for edit in edits:

        def hook(acts, hook, edit=edit):
            acts = acts.clone()
            at = slice(None) if edit.position is None else edit.position
            before = acts[:, at, edit.head]
            after = {"scale": before * edit.value, "set": before * 0 + edit.value,
                     "add": before + edit.value}  # fmt: skip
            acts[:, at, edit.head] = after[edit.kind]
            return acts

        hooks.append((f"blocks.{edit.layer}.attn.lorsa.hook_acts_post", hook))
    model = playground.model
    tokens = model.to_tokens(prompt)
    with torch.no_grad(), splice(model, playground.lorsas.values(), error_term=True):
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, position]


def active_head(playground, layer):
    """A head that stays at the last token of the prompt."""
    here = playground.read(PROMPT, n_heads=8).active[-1]
    return next(head for of, head, _, _ in here if of == layer)


# --- numbers ------------------------------------------------------------------------------------


CHANGES = [("scale", 0.0), ("scale", -3.0), ("set", 2.5), ("add", 4.0)]


@pytest.mark.parametrize(("kind", "value"), CHANGES)
@pytest.mark.parametrize("position", [None, 3])
def test_steering_is_what_plain_hooks_do(playground, kind, value, position):
    edits = [Edit(layer, active_head(playground, layer), kind, value, position) for layer in (0, 1)]
    found = playground.steer(PROMPT, edits)
    clean = playground.model(playground.model.to_tokens(PROMPT))[0, -1]
    changed = steered(playground, edits)
    columns = [clean, changed, clean.softmax(-1), changed.softmax(-1)]
    ids = {string: token for token, string in enumerate(playground.strings.strings)}
    for prediction in found:
        token = ids[prediction.token]
        expected = [column[token].item() for column in columns]
        assert prediction[1:] == pytest.approx(expected, abs=1e-4)
    named = [ids[prediction.token] for prediction in found]
    assert set(named) == {*clean.topk(10).indices.tolist(), *changed.topk(10).indices.tolist()}
    assert named == sorted(named, key=lambda token: -changed[token].item())
    if position is None:
        assert (changed - clean).abs().max() > 0.01  # the change does something


def test_without_changes_predictions_are_the_models_own(playground):
    clean = playground.model(playground.model.to_tokens(PROMPT))[0, 4]
    found = playground.steer(PROMPT, [], position=4)
    assert [row.logit_after for row in found] == clean.topk(10).values.tolist()
    assert all(row.logit_before == row.logit_after for row in found)


def test_heads_at_work_are_those_of_a_spliced_pass(playground):
    model = playground.model
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad(), splice(model, playground.lorsas.values(), error_term=True):
        _, cache = model.run_with_cache(tokens)
    for layer, lorsa in playground.lorsas.items():
        head = active_head(playground, layer)
        at = f"blocks.{layer}.attn.lorsa."
        acts = cache[at + "hook_acts_post"][0, :, head]
        pattern = cache[at + "hook_pattern"][0, head // lorsa.cfg.group_size]
        moved = pattern * cache[at + "hook_values"][0, :, head]
        found = playground.z_pattern(PROMPT, layer, head)
        assert [fetch.query for fetch in found] == torch.nonzero(acts)[:, 0].tolist()
        for fetch in found:
            assert fetch.z == pytest.approx(acts[fetch.query].item(), abs=1e-5)
            assert fetch.z_pattern == pytest.approx(moved[fetch.query].tolist(), abs=1e-5)


# --- what is asked ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.html").write_text("secret")
    heads = [HeadFacts(layer=layer, head=head) for layer in (0, 1) for head in range(16)]
    prompt = Prompt(["a", HOSTILE], [[(0, 1, 0.5, 0)], [(1, 2, -0.5, 1)]])
    write_site(folder / "site", heads, title=HOSTILE, prompts=[prompt], served=True)
    (folder / "site" / "link.html").symlink_to(folder / "secret.html")
    return folder / "site"


@pytest.fixture(scope="module")
def client(playground, site):
    return TestClient(make_app(playground, site, title=HOSTILE), base_url="http://127.0.0.1:8765")


def ask(client, question, **fields):
    return client.post(f"/api/{question}", json=fields)


def test_answers_are_those_of_the_playground(client, playground):
    head = active_head(playground, 1)
    found = ask(client, "read", prompt=PROMPT).json()
    assert found["tokens"] == display_tokens(playground.read(PROMPT).tokens)
    assert [row[:2] for row in found["active"][-1]] == [
        list(row[:2]) for row in playground.read(PROMPT).active[-1]
    ]
    edit = {"layer": 1, "head": head, "kind": "scale", "value": 0}
    found = ask(client, "steer", prompt=PROMPT, position=-1, edits=[edit]).json()["predictions"]
    expected = playground.steer(PROMPT, [Edit(1, head, "scale", 0.0)])
    assert [row[0] for row in found] == display_tokens(row.token for row in expected)
    for row, prediction in zip(found, expected, strict=True):
        assert row[1:] == pytest.approx(list(prediction[1:]), rel=1e-4)
    found = ask(client, "z_pattern", prompt=PROMPT, layer=1, head=head).json()["fetched"]
    expected = playground.z_pattern(PROMPT, 1, head)
    assert [query for query, _, _ in found] == [fetch.query for fetch in expected]
    assert found[0][2] == pytest.approx(expected[0].z_pattern, rel=1e-4)


EDIT = {"layer": 1, "head": 0, "kind": "scale", "value": 1}


@pytest.mark.parametrize(
    ("question", "changes", "message"),
    [
        ("read", {"prompt": ""}, "must have 1 to 4000 characters, not 0"),
        ("read", {"prompt": "x" * 4001}, "must have 1 to 4000 characters, not 4001"),
        ("read", {"prompt": "w1 " * 70}, "the prompt has .* tokens: give 1 to 64"),
        ("read", {"prompt": "\ud800"}, "half of a surrogate pair"),
        ("read", {"prompt": ["w1"]}, "prompt must be of type str, got list"),
        ("read", {}, "prompt must be of type str, got NoneType"),
        ("z_pattern", {"layer": 5, "head": 0}, r"no Lorsa for layer 5: there are \[0, 1\]"),
        ("z_pattern", {"layer": 1, "head": -1}, "layer 1 has heads 0 to 15, not -1"),
        ("z_pattern", {"layer": 1, "head": "0"}, "head must be of type int, got str"),
        ("z_pattern", {"layer": True, "head": 0}, "layer must be of type int, got bool"),
        ("steer", {"position": 99}, "position = 99, the prompt has tokens 0 to"),
        ("steer", {"position": -1, "edits": [EDIT] * 17}, "there are 17 changes: give at most 16"),
        ("steer", {"position": -1, "edits": [{**EDIT, "head": 16}]}, "heads 0 to 15, not 16"),
        ("steer", {"position": -1, "edits": [{**EDIT, "kind": "exec"}]}, "kind must be one of"),
        ("steer", {"position": -1, "edits": [{**EDIT, "value": 1e300}]}, "value must lie within"),
        ("steer", {"position": -1, "edits": [{**EDIT, "value": 10**400}]}, "too large"),
        ("steer", {"position": -1, "edits": [{**EDIT, "position": 99}]}, "position = 99"),
        ("steer", {"position": -1, "edits": ["x"]}, "an edit must be an object"),
        ("steer", {"position": -1, "edits": "x"}, "edits must be of type list"),
    ],
)  # fmt: skip
def test_questions_that_make_no_sense_are_refused(client, question, changes, message):
    defaults = {"steer": {"prompt": PROMPT, "edits": []}, "z_pattern": {"prompt": PROMPT}}
    fields = {**defaults.get(question, {}), **changes}
    if question == "read" and not changes:
        fields = {}
    answer = client.post(
        f"/api/{question}", content=json.dumps(fields), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"])


@pytest.mark.parametrize(
    "body", ["", "{", "[1]", '"x"', "[" * 60_000, '{"prompt": NaN}', b"\xff\xfe", "1" * 5000]
)
def test_what_is_no_json_object_is_refused(client, body):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/read", content=body, headers=headers)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]


def test_prompts_may_hold_anything(client):
    answer = ask(client, "read", prompt=HOSTILE + "\x00\n<bos><eos> w1")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"


# --- who is answered ----------------------------------------------------------------------------


def test_pages_are_served_and_nothing_else(client, site):
    own = client.get("/")
    assert own.content == (site / "index.html").read_bytes()
    assert client.get("/heads/L1.3.html").content == (site / "heads" / "L1.3.html").read_bytes()
    assert "#head=L1.3" in client.get("/heads/L1.3.html").text
    assert "Try a prompt" in client.get("/try.html").text
    for address in (
        "/../secret.html", "/%2e%2e/secret.html", "/heads/..%2f..%2fsecret.html", "/link.html",
        "/..%5csecret.html", "/%2fetc/passwd", "//etc/passwd", "/lorsa-dashboard.json", "/heads/",
        "/index.html%00", "/api/read", "/" + "x" * 5000, "/heads",
    ):  # fmt: skip
        answer = client.get(address)
        assert answer.status_code in (404, 405), address
        assert "secret" not in answer.text


def raw(app, path, method="GET", headers=(), receive=None):
    """An answer's status to a request as it would come in, without a client that mends it."""
    sent = []

    async def nothing():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
             "headers": list(headers), "server": ("127.0.0.1", 1)}  # fmt: skip
    asyncio.run(app(scope, receive or nothing, send))
    return sent[0]["status"]


HOST = (b"host", b"localhost:8765")


@pytest.mark.parametrize("path", ["/../secret.html", "../secret.html", "/heads/../../secret.html"])
def test_paths_do_not_climb(client, path):
    assert raw(client.app, "/index.html", headers=[HOST]) == 200
    assert raw(client.app, path, headers=[HOST]) == 404


@pytest.mark.parametrize(
    "hosts",
    [
        [], [b"evil.test"], [b"127.0.0.1.evil.test"], [b"localhost.evil.test:8765"], [b"0.0.0.0"],
        [b"localhost:8765@evil.test"], [b"evil.test#localhost"], [b"localhost", b"evil.test"],
        [b"localhost:"], [b"[::1]:8765"], [b""],
    ],
)  # fmt: skip
def test_only_this_machine_is_answered(client, hosts):
    for path, method in (("/", "GET"), ("/try.html", "GET"), ("/api/read", "POST")):
        headers = [(b"host", host) for host in hosts]
        assert raw(client.app, path, method, headers) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.test"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:8765"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_pages_cannot_ask(client, headers):
    answer = client.post("/api/read", json={"prompt": PROMPT}, headers=headers)
    assert answer.status_code == 403
    own = {"Origin": "http://127.0.0.1:8765", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/read", json={"prompt": PROMPT}, headers=own).status_code == 200


def test_requests_of_another_form_are_refused(client):
    body = json.dumps({"prompt": PROMPT})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = client.post("/api/read", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415
    large = json.dumps({"prompt": "x" * server.MAX_BODY})
    answer = client.post("/api/read", content=large, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert client.post("/api/__class__", json={}).status_code == 404
    assert client.put("/api/read", json={}).status_code == 405
    assert client.delete("/index.html").status_code == 405


def test_every_answer_is_shut_and_none_opens_to_other_origins(client):
    preflight = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    answers = [
        client.get("/"), client.get("/try.html"), client.get("/missing"),
        ask(client, "read", prompt=PROMPT), ask(client, "read"),
        client.options("/api/read", headers=preflight),
    ]  # fmt: skip
    for answer in answers:
        assert set(server.HEADERS.items()) <= {
            (name.title(), value) for name, value in answer.headers.items()
        } | {(name, answer.headers.get(name)) for name in server.HEADERS}
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert answers[-1].status_code == 403
    policy = (
        answers[1].text.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    )
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "'unsafe-eval'" not in policy
    assert "script-src 'sha256-" in policy
    assert "connect-src" not in answers[0].text


def test_a_body_that_never_ends_is_given_up(client, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)

    async def trickle():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    headers = [HOST, (b"content-type", b"application/json")]
    assert raw(client.app, "/api/read", "POST", headers, trickle) == 408


# --- one at a time ------------------------------------------------------------------------------


class Slow(Playground):
    """Answers when it is let, and counts who is inside."""

    def __init__(self, model, lorsas):
        super().__init__(model, lorsas)
        self.go, self.inside, self.most = threading.Event(), 0, 0

    def read(self, prompt, n_heads=5):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.go.wait(20)
        self.inside -= 1
        if prompt == "fail":
            raise RuntimeError("/home/somebody/secret")
        return Prompt([prompt], [[]])


def test_the_model_runs_once_at_a_time_and_few_may_wait():
    slow = make_playground(Slow)
    client = TestClient(make_app(slow, None, title="slow"), base_url="http://localhost")
    n_asked = server.MAX_WAITING + 4
    with ThreadPoolExecutor(n_asked) as threads:
        asked = [threads.submit(ask, client, "read", prompt=str(i)) for i in range(n_asked)]
        deadline = time.monotonic() + 20
        while sum(future.done() for future in asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        slow.go.set()
        codes = sorted(future.result().status_code for future in asked)
    assert codes == [200] * server.MAX_WAITING + [503] * 4
    assert slow.most == 1
    assert ask(client, "read", prompt="again").status_code == 200


def test_what_takes_too_long_is_given_up_but_not_run_beside():
    slow = make_playground(Slow)
    app = make_app(slow, None, title="slow", answer_seconds=0.05)
    client = TestClient(app, base_url="http://localhost")
    for _ in range(2):
        answer = ask(client, "read", prompt="x")
        assert (answer.status_code, answer.json()) == (
            504, {"error": "no answer within 0.05 seconds"},
        )  # fmt: skip
    assert slow.most == 1
    slow.go.set()


def test_a_failure_tells_nothing_about_this_machine(caplog):
    slow = make_playground(Slow)
    slow.go.set()
    client = TestClient(make_app(slow, None, title="slow"), base_url="http://localhost")
    answer = ask(client, "read", prompt="fail")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_without_a_site_there_is_the_page_to_try_prompts_on(playground):
    client = TestClient(make_app(playground, None, title=HOSTILE), base_url="http://localhost")
    page = client.get("/").text
    assert page == client.get("/try.html").text
    assert "all heads</a>" not in page
    assert "<img" not in page
    assert page.count("</script>") == 1
    assert client.get("/index.html").status_code == 404


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path, playground, monkeypatch):
    monkeypatch.setattr("lorsa_lens.hosts.loading.load_host", lambda name, device: playground.model)
    playground.lorsas[1].save_pretrained(tmp_path / "lorsas" / "blocks.1")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{int(token)}" for token in zoo.tokens(1, 600)[0] - 4))
    config = {"model": "<tiny>", "tokens": str(text), "device": "cpu"}
    (tmp_path / "run_config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_command_serves_a_run(run_dir, monkeypatch):
    seen = []

    class Server:
        def __init__(self, app):
            self.client = TestClient(app, base_url="http://127.0.0.1")

        def run(self, sockets):
            (bound,) = sockets
            assert bound.getsockname()[0] == "127.0.0.1"
            bound.close()
            seen.append([self.client.get(page).status_code for page in ("/", "/index.html")])
            seen.append(ask(self.client, "read", prompt=PROMPT).status_code)

    monkeypatch.setattr("lorsa_lens.dashboard.server.make_server", Server)
    monkeypatch.setattr("lorsa_lens.dashboard.make_server", Server, raising=False)
    runner = CliRunner()
    alone = runner.invoke(commands, ["serve", str(run_dir), "--port", "0"])
    assert alone.exit_code == 0, alone.output
    assert "No table of heads" in alone.output
    made = runner.invoke(
        commands, ["heads", str(run_dir), "--context-size", "12", "--n-prompts", "8",
                   "--n-sequences", "6", "--contexts", "96"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    whole = runner.invoke(commands, ["serve", str(run_dir), "--port", "0"])
    assert whole.exit_code == 0, whole.output
    assert "http://127.0.0.1:" in whole.output
    assert seen == [[200, 404], 200, [200, 200], 200]


def test_a_port_that_is_taken_is_said(run_dir):
    with bind(0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        run = CliRunner().invoke(commands, ["serve", str(run_dir), "--port", str(port)])
    assert run.exit_code == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in " ".join(run.output.split())


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(site):
    bound = bind(0)
    running = make_server(make_app(make_playground(), site, title=HOSTILE))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def table(browser):
    """The predictions shown: token, probabilities and logits, as text."""
    cells = (
        "return [...document.querySelectorAll('#predictions tbody tr')].map(row => "
        "[...row.cells].map(cell => cell.textContent))"
    )
    return browser.execute_script(cells)


def expected_table(playground, edits, position=-1):
    return [
        (display_token(token), 100 * p_before, 100 * p_after, before, after)
        for token, before, after, p_before, p_after in playground.steer(PROMPT, edits, position)
    ]


def shows(browser, expected):
    """Whether the table holds these numbers, to the digits it shows."""
    found = [
        (token, float(before.rstrip(" %")), float(after.rstrip(" %")), float(one), float(two))
        for token, before, after, _, one, two in table(browser)
    ]
    return len(found) == len(expected) and all(
        row[0] == other[0] and row[1:] == pytest.approx(other[1:], rel=5e-3, abs=1e-4)
        for row, other in zip(found, expected, strict=True)
    )


def read_prompt(browser, address, width=1280):
    opened(browser, f"{address}/try.html", width)
    browser.find_element("id", "prompt").send_keys(PROMPT)
    browser.find_element("css selector", "#ask button").click()
    wait(browser, lambda: table(browser))


def test_a_slider_changes_the_numbers_to_those_of_hooks(address, browser, playground):
    console(browser)
    head = active_head(playground, 0)
    read_prompt(browser, address)
    assert wait(browser, lambda: shows(browser, expected_table(playground, [])))
    steer = f"[aria-label='steer L0.{head}']"
    browser.find_element("css selector", f"#active {steer}").click()
    slider = browser.find_element("css selector", ".edit input[type=range]")
    assert slider.get_attribute("value") == "1"
    for _ in range(25):
        slider.send_keys("\ue014")  # the right arrow
    factor = float(slider.get_attribute("value"))
    assert factor == pytest.approx(3.5)
    expected = expected_table(playground, [Edit(0, head, "scale", factor)])
    assert wait(browser, lambda: shows(browser, expected))
    changed = steered(playground, [Edit(0, head, "scale", factor)])
    assert expected[0][4] == pytest.approx(changed.max().item(), abs=1e-4)

    browser.find_element("css selector", f"[aria-label='switch L0.{head} off']").click()
    off = expected_table(playground, [Edit(0, head, "scale", 0.0)])
    assert wait(browser, lambda: shows(browser, off))
    browser.find_element("css selector", ".edit option[value=set]").click()
    typed = browser.find_element("css selector", ".edit input[type=number]")
    typed.clear()
    typed.send_keys("2.5\t")
    assert wait(
        browser, lambda: shows(browser, expected_table(playground, [Edit(0, head, "set", 2.5)]))
    )
    browser.find_element("css selector", ".edit input[type=checkbox]").click()
    browser.find_elements("css selector", "#tokens button")[3].click()
    here = expected_table(playground, [Edit(0, head, "set", 2.5, 3)], 3)
    assert here != expected_table(playground, [Edit(0, head, "set", 2.5)], 3)
    assert wait(browser, lambda: shows(browser, here))
    browser.find_element("id", "clear").click()
    assert wait(browser, lambda: shows(browser, expected_table(playground, [], 3)))
    assert console(browser) == []


def test_z_patterns_are_drawn_and_told_on_hover(address, browser, playground):
    from selenium.webdriver.common.action_chains import ActionChains

    head = active_head(playground, 1)
    read_prompt(browser, address)
    browser.find_element("css selector", f"#active [aria-label='z pattern of L1.{head}']").click()
    fetched = playground.z_pattern(PROMPT, 1, head)
    rows = wait(browser, lambda: browser.find_elements("css selector", "#heat tbody tr"))
    assert len(rows) == len(fetched)
    cells = rows[-1].find_elements("css selector", ".positive, .negative")
    assert len(cells) == len(fetched[-1].z_pattern)
    key = max(range(len(cells)), key=lambda key: abs(fetched[-1].z_pattern[key]))
    ActionChains(browser).move_to_element(cells[key]).perform()
    told = browser.find_element("id", "readout").text
    assert f"({fetched[-1].query}) from" in told
    assert f"({key}): {fetched[-1].z_pattern[key]:.4g}"[:12] in told


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_worked_by_keyboard(address, browser, playground, width):
    console(browser)
    read_prompt(browser, address, width)
    head = active_head(playground, 1)
    browser.find_element("css selector", f"#active [aria-label='steer L1.{head}']").click()
    browser.find_element("css selector", f"#active [aria-label='z pattern of L1.{head}']").click()
    wait(browser, lambda: browser.find_elements("css selector", "#heat tbody tr"))
    assert overflow(browser, width) <= 0
    browser.execute_script("document.getElementById('prompt').focus()")
    named = {f"steer L1.{head}", f"how much to change L1.{head}", f"number for L1.{head}",
             f"how to change L1.{head}", "head", "clear", "checkbox"}  # fmt: skip
    reached = set()
    for _ in range(60):
        if any(name.startswith("query ") for name in reached):
            break
        browser.switch_to.active_element.send_keys("\t")
        reached.add(
            browser.execute_script(
                "const e = document.activeElement; "
                "return e.getAttribute('aria-label') || e.id || e.type || e.textContent"
            )
        )
    assert named <= reached
    assert any(name.startswith("token 0") for name in reached)
    assert any(name.startswith("query ") for name in reached)
    assert console(browser) == []


def test_hostile_text_stays_text_in_the_browser(address, browser):
    console(browser)
    opened(browser, f"{address}/try.html")
    browser.execute_script("arguments[0].value = arguments[1]",
                           browser.find_element("id", "prompt"), HOSTILE)  # fmt: skip
    browser.find_element("css selector", "#ask button").click()
    wait(browser, lambda: table(browser))
    assert browser.title.startswith("Try a prompt · </script>")
    assert browser.execute_script("return document.images.length") == 0
    assert console(browser) == []
    browser.find_element("id", "head").send_keys("L9.9<img src=x>\n")
    assert "There is no such head" in browser.find_element("id", "status").text


def test_a_heads_page_leads_to_its_slider(address, browser):
    opened(browser, f"{address}/heads/L1.3.html")
    browser.find_element("link text", "steer it on a prompt").click()
    browser.find_element("id", "prompt").send_keys(PROMPT)
    browser.find_element("css selector", "#ask button").click()
    wait(browser, lambda: table(browser))
    assert browser.find_element("css selector", ".edit b").text == "L1.3"
    browser.find_element("css selector", ".edit a").click()
    assert browser.current_url == f"{address}/heads/L1.3.html"
