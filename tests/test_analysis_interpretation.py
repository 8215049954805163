"""Automated interpretation against a server of our own that answers by rules."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from lorsa_lens.analysis.contexts.store import HeadContexts, KeptContext
from lorsa_lens.analysis.interpretation import (
    ChatEndpoint,
    EndpointError,
    estimate_cost,
    interpret_heads,
)
from lorsa_lens.analysis.interpretation.wording import read_judgements
from lorsa_lens.analysis.strings import Vocabulary

VOCABULARY = Vocabulary(("<bos>", " cat", " dog", " tree", " sky", " x"))


@contextmanager
def server(answer):
    """A local endpoint; `answer(request)` gives a status and a body."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "headers": dict(self.headers), **body})
            status, reply = answer(requests)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def chat(text, **more):
    return 200, {"choices": [{"message": {"content": text}}], **more}


class Store:
    """Head 3 of layer 1 writes at ' dog' and reads from ' cat', which stands two before."""

    def head(self, layer, head):
        def kept(context, query):
            tokens = torch.full((10,), 5)
            tokens[0], tokens[query - 2], tokens[query] = 0, 1, 2
            z_pattern = torch.zeros(10)
            z_pattern[query - 2], z_pattern[0] = 1.9, 0.1
            return KeptContext(context, tokens, query, 2.0, z_pattern)

        top = [kept(i, 3 + i % 6) for i in range(6)]
        sample = [kept(i, 3 + i % 6) for i in range(4, 14)]
        numbers = dict.fromkeys(
            ("density", "mean_energy", "mean_offset", "first_token", "max_activation"), 0.5
        )
        active = {"top": top, "sample": sample} if head == 3 else {"top": [], "sample": []}
        return HeadContexts(layer=layer, head=head, n_active=5, **numbers, **active)


def judging(requests):
    """A model that knows what the head does."""
    system, user = (message["content"] for message in requests[-1]["messages"])
    if "Say in one short sentence" in system:
        return chat("At dog, it reads the cat.", usage={"prompt_tokens": 7, "note": "x"})
    texts = [line.partition(". ")[2] for line in user.splitlines()]
    if "active at its last token" in system:
        return chat(json.dumps([int(text.endswith("dog")) for text in texts]))
    right = [int("<< dog>>" in text and "[[ cat]]" in text) for text in texts]
    return chat(f"Here you are: {right}")


def test_a_head_is_explained_and_the_explanation_scored(tmp_path):
    with server(judging) as (url, requests):
        endpoint = ChatEndpoint(url, "m", cache=tmp_path, requests_per_minute=6e4)
        cost = estimate_cost(
            Store(), [(1, 3)], VOCABULARY, endpoint, prompt_price=2.0, answer_price=10.0
        )
        assert requests == []
        frame = interpret_heads(Store(), [(1, 3)], VOCABULARY, endpoint, progress=False)
        assert cost.n_requests == len(requests) == 3
        row = frame.iloc[0]
        assert row["name"] == "L1.3"
        assert row["explanation"] == "At dog, it reads the cat."
        assert row["detection"] == row["fuzzing"] == 1.0
        assert row["n_judged"] == 10
        sent = sum(len(m["content"]) for r in requests for m in r["messages"]) / 4
        assert sent <= cost.prompt_tokens <= sent + 2 * 300
        assert cost.answer_tokens == 900
        assert cost.price == pytest.approx((2 * cost.prompt_tokens + 10 * 900) / 1e6)
        assert endpoint.usage == {"prompt_tokens": 7}
        # The second time nothing is sent.
        again = interpret_heads(Store(), [(1, 3)], VOCABULARY, endpoint, progress=False)
        assert again.equals(frame)
        assert len(requests) == endpoint.n_sent == 3
        assert estimate_cost(Store(), [(1, 3)], VOCABULARY, endpoint).n_requests < 3


def test_the_question_names_source_tokens_and_marks_the_query(tmp_path):
    with server(judging) as (url, requests):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=6e4)
        interpret_heads(
            Store(), [(1, 3)], VOCABULARY, endpoint, n_examples=2, n_scored=2, progress=False
        )
    explain, detect, fuzz = requests
    lines = explain["messages"][1]["content"].splitlines()
    assert lines[:2] == [
        "1. <bos> cat x<< dog>> x x x x",
        "   reads from: ' cat' (95%), '<bos>' (5%)",
    ]
    assert len(lines) == 4
    assert explain["path"] == "/v1/chat/completions"
    assert explain["model"] == "m"
    assert "At dog, it reads the cat." in detect["messages"][0]["content"]
    texts = detect["messages"][1]["content"].splitlines()
    assert len(texts) == 4
    assert sum(text.endswith("dog") for text in texts) == 2
    marks = fuzz["messages"][1]["content"].splitlines()
    assert sum("[[ cat]]" in text and "<< dog>>" in text for text in marks) == 2


def test_a_model_that_guesses_scores_by_chance():
    def always_active(requests):
        if "Say in one short sentence" in requests[-1]["messages"][0]["content"]:
            return chat("Anything.")
        return chat("[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]")

    with server(always_active) as (url, _):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=6e4)
        frame = interpret_heads(Store(), [(1, 3)], VOCABULARY, endpoint, progress=False)
    assert frame["detection"].tolist() == frame["fuzzing"].tolist() == [0.5]


def test_unusable_judgements_are_no_score():
    with server(lambda requests: chat("I would rather not.")) as (url, _):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=6e4)
        frame = interpret_heads(Store(), [(1, 3)], VOCABULARY, endpoint, progress=False)
    assert frame["detection"].isna().all()
    assert frame["fuzzing"].isna().all()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Sure:\n```json\n[0,0,1]\n```", [False, False, True]),
        ("[1, 0]", None),
        ("[1, 2, 0]", None),
        ("[yes, no, no]", None),
        ("none", None),
    ],
)
def test_judgements_are_read_from_answers(answer, expected):
    assert read_judgements(answer, 3) == expected


def test_errors_that_pass_are_waited_for_and_others_are_not():
    def busy_twice(requests):
        return chat("yes") if len(requests) == 3 else (429 if len(requests) == 1 else 503, {})

    question = [{"role": "user", "content": "?"}]
    with server(busy_twice) as (url, requests):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=6e4, backoff=0.01)
        assert endpoint.complete(question) == "yes"
        assert len(requests) == 3
    with server(lambda requests: (401, {"error": "no key"})) as (url, requests):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=6e4)
        with pytest.raises(EndpointError, match=r"HTTP 401.*no key"):
            endpoint.complete(question)
        assert len(requests) == 1
    with (
        server(lambda requests: (200, {"other": 1})) as (url, requests),
        pytest.raises(EndpointError, match="another form than a chat completion"),
    ):
        ChatEndpoint(url, "m").complete(question)
    endpoint = ChatEndpoint(url, "m", n_tries=2, backoff=0.01, requests_per_minute=6e4)
    with pytest.raises(EndpointError, match="did not answer"):
        endpoint.complete(question)  # the server has gone
    assert endpoint.n_sent == 2


def test_requests_keep_their_distance(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with server(lambda requests: chat("yes")) as (url, _):
        endpoint = ChatEndpoint(url, "m", requests_per_minute=2.0)
        for number in range(3):
            endpoint.complete([{"role": "user", "content": str(number)}])
    assert len(slept) == 2
    assert all(20 < pause <= 30 for pause in slept)


def test_the_key_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc")
    with server(lambda requests: chat("yes")) as (url, requests):
        endpoint = ChatEndpoint(url, "m", api_key_variable="MY_KEY")
        endpoint.complete([{"role": "user", "content": "?"}])
        assert requests[0]["headers"]["Authorization"] == "Bearer abc"
        monkeypatch.delenv("MY_KEY")
        other = ChatEndpoint(url, "m", api_key_variable="MY_KEY")
        other.complete([{"role": "user", "content": "!"}])
        assert "Authorization" not in requests[1]["headers"]


def test_what_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must begin with http"):
        ChatEndpoint("ftp://x", "m")
    with pytest.raises(ValueError, match="must be positive"):
        ChatEndpoint("http://x", "m", requests_per_minute=0.0)
    endpoint = ChatEndpoint("http://127.0.0.1:9", "m")
    with pytest.raises(ValueError, match=r"head L1\.4 is never active"):
        interpret_heads(Store(), [(1, 4)], VOCABULARY, endpoint, progress=False)
