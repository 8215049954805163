"""A chat model behind an OpenAI-compatible endpoint: cached, rate-limited, patient with errors."""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorsa_lens.io.atomic import atomic_write

Message = dict[str, str]

CHARACTERS_PER_TOKEN = 4
"""For estimates of length before anything is sent."""

RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""HTTP codes after which a request is sent again."""


class EndpointError(RuntimeError):
    """The endpoint did not answer as it should; the message says how."""


@dataclass
class ChatEndpoint:
    """A chat model that `POST {base_url}/chat/completions` reaches.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        model: its name there.
        cache: folder for answers: the same request is never sent twice. None: no cache.
        api_key_variable: environment variable with the key, if the endpoint wants one.
        requests_per_minute: no more than so many.
        max_tokens: longest answer.
        timeout: seconds to wait for an answer.
        n_tries: how often a request is sent before it is given up.
        backoff: seconds to wait before the second try; twice as many before each further one.
    """

    base_url: str
    model: str
    cache: Path | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float = 60.0
    max_tokens: int = 300
    timeout: float = 60.0
    n_tries: int = 5
    backoff: float = 1.0
    n_sent: int = field(default=0, init=False)
    """Requests that went out."""
    usage: dict[str, int] = field(default_factory=dict, init=False)
    """Tokens that the endpoint says it counted."""
    _last: float = field(default=float("-inf"), init=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url = {self.base_url!r} must begin with http:// or https://")
        if self.requests_per_minute <= 0 or self.n_tries < 1:
            raise ValueError("requests_per_minute and n_tries must be positive")

    def complete(self, messages: list[Message]) -> str:
        """The answer to a conversation.

        Raises:
            EndpointError: if there is none after `n_tries`, or it has another form.
        """
        request = self._request(messages)
        file = self._cache_file(request)
        if file is not None and file.exists():
            answer: str = json.loads(file.read_text(encoding="utf-8"))["answer"]
            return answer
        response = self._send(json.dumps(request).encode())
        try:
            answer = str(response["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self.base_url} answered in another form than a chat completion: "
                f"{json.dumps(response)[:200]}"
            ) from None
        for name, count in (response.get("usage") or {}).items():
            if isinstance(count, int):
                self.usage[name] = self.usage.get(name, 0) + count
        if file is not None:
            with atomic_write(file) as temporary:
                text = json.dumps({"request": request, "answer": answer}, indent=1)
                temporary.write_text(text, encoding="utf-8")
        return answer

    def is_cached(self, messages: list[Message]) -> bool:
        """Whether the answer is there already."""
        file = self._cache_file(self._request(messages))
        return file is not None and file.exists()

    def _request(self, messages: list[Message]) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _cache_file(self, request: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        key = json.dumps({"base_url": self.base_url, **request}, sort_keys=True)
        return Path(self.cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _send(self, body: bytes) -> Any:
        """Send a request until it is answered."""
        reason = ""
        for attempt in range(self.n_tries):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            self._wait_for_turn()
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read().decode(errors='replace')[:200]}"
                error.close()
                if error.code not in RETRIED:
                    break
            except (OSError, ValueError) as error:
                reason = str(error) or type(error).__name__
        raise EndpointError(f"{self.base_url} did not answer: {reason}")

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        self.n_sent += 1
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def _wait_for_turn(self) -> None:
        wait = self._last + 60.0 / self.requests_per_minute - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._last = time.monotonic()
