"""The dashboard and the playground on a port of this machine.

Only this machine is served: the port is bound to the loopback address, requests must name it (a
site on the internet whose name leads to 127.0.0.1 is turned away), and questions must come from
the served page. Requests choose among pages that were there at the start and three questions in
JSON; nothing in them becomes a path, code or HTML.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        "serving needs starlette and uvicorn: pip install 'lorsa-lens[serve]'", name=error.name
    ) from error

from lorsa_lens.dashboard.answers import ANSWERS, Fields, read_fields
from lorsa_lens.dashboard.pages import TRY_PAGE
from lorsa_lens.dashboard.playground import Playground
from lorsa_lens.dashboard.try_page import try_page

ADDRESS = "127.0.0.1"
"""The only address that is bound."""

MAX_BODY = 64 * 1024
"""Bytes of a request's body."""

BODY_SECONDS = 10.0
"""How long a body may take to come in."""

MAX_WAITING = 8
"""Questions at once; the model works on one, the others wait."""

ANSWER_SECONDS = 60.0
"""After so long, waiting included, a question is answered with an error."""

HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "object-src 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer. Pages bear a stricter policy on top, each for its own scripts."""

_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
_log = logging.getLogger(__name__)


def bind(port: int) -> socket.socket:
    """A socket on the loopback address.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: if the port cannot be had.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((ADDRESS, port))
    except OSError as error:
        bound.close()
        raise OSError(f"port {port} of {ADDRESS} cannot be had: {error.strerror}") from error
    return bound


def make_server(app: Starlette) -> uvicorn.Server:
    """What answers requests: `make_server(app).run(sockets=[bind(port)])`.

    Args:
        app: from `make_app`.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return uvicorn.Server(config)


def make_app(
    playground: Playground, site: Path | None, *, title: str, answer_seconds: float = ANSWER_SECONDS
) -> Starlette:
    """The application: the pages of a site, a page to try prompts on, and answers to it.

    Args:
        playground: answers.
        site: from `write_site`; pages that come later are not seen. None: there are no others.
        title: plain text.
        answer_seconds: see `ANSWER_SECONDS`.
    """
    pages = {} if site is None else _pages(site)
    own = try_page(playground, title, has_site=bool(pages))
    service = _Service(playground, pages, own, answer_seconds)
    return Starlette(
        routes=[
            Route("/api/{question}", service.answer, methods=["POST"]),
            Route("/{page:path}", service.page, methods=["GET"]),
        ],
        middleware=[Middleware(_Guard)],
        exception_handlers={HTTPException: _refused},
    )


def _pages(site: Path) -> dict[str, Path]:
    """The HTML files of a folder by their addresses, links left out."""
    found = (path for path in site.rglob("*.html") if path.is_file() and not path.is_symlink())
    return {path.relative_to(site).as_posix(): path for path in found}


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class _Service:
    """Pages by their names, and answers one at a time."""

    def __init__(
        self, playground: Playground, pages: dict[str, Path], own: str, answer_seconds: float
    ) -> None:
        self._playground, self._pages, self._own = playground, pages, own
        self._seconds = answer_seconds
        self._places = BoundedSemaphore(MAX_WAITING)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="playground")

    async def page(self, request: Request) -> Response:
        """A page, looked up by its name."""
        first = "index.html" if "index.html" in self._pages else TRY_PAGE
        name = request.path_params["page"] or first
        if name == TRY_PAGE:
            return HTMLResponse(self._own)
        if name not in self._pages:
            raise HTTPException(404, "there is no such page")
        return HTMLResponse(self._pages[name].read_bytes())

    async def answer(self, request: Request) -> Response:
        """The answer to a question, or why there is none."""
        answer = ANSWERS.get(request.path_params["question"])
        if answer is None:
            raise HTTPException(404, "there is no such question")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "send JSON, with the content type application/json")
        body = await _body(request)
        try:
            return JSONResponse(await self._run(answer, read_fields(body)))
        except (ValueError, OverflowError) as error:
            raise HTTPException(400, str(error)[:500]) from error
        except HTTPException:
            raise
        except Exception as error:
            _log.exception("a question could not be answered")
            raise HTTPException(500, "this failed; the terminal of the server says why") from error

    async def _run(self, answer: Callable[[Playground, Fields], Fields], fields: Fields) -> Any:
        """Ask in the one thread that runs the model."""
        if not self._places.acquire(blocking=False):
            raise HTTPException(503, "the model is busy with other questions: try again")
        future = self._thread.submit(answer, self._playground, fields)
        future.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"no answer within {self._seconds:g} seconds") from error


async def _body(request: Request) -> bytes:
    """The body, if it is short and comes soon."""
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, "the request took too long to come in") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request is not whole") from error
    return bytes(body)


class _Guard:
    """Turns away what does not come from this machine's own pages; adds headers to answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self._app
        if not _is_own(scope["method"], Headers(scope=scope)):
            app = JSONResponse({"error": "only this machine's own pages are answered"}, 403)
        await app(scope, receive, send_with_headers)


def _is_own(method: str, headers: Headers) -> bool:
    """Whether a request names this machine, and a question comes from one of its pages."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
        return False
    if method in ("GET", "HEAD"):
        return True
    same = f"http://{hosts[0]}"
    site = headers.get("sec-fetch-site", "same-origin")
    return headers.get("origin", same) == same and site == "same-origin"
