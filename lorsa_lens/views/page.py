"""Self-contained HTML pages: circuitsvis figures between text, opened without a network."""

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.views.bars import Bars
from lorsa_lens.views.bundle import bundle
from lorsa_lens.views.card import Card
from lorsa_lens.views.drawing import Drawing
from lorsa_lens.views.plot import Plot
from lorsa_lens.views.sections import Heading, Table, Text
from lorsa_lens.views.spec import FigureSpec, HasSpec, escape
from lorsa_lens.views.style import STYLE

Static = Heading | Text | Table | Bars | Drawing | Card | Plot
"""Sections that need no script."""

Section = Static | HasSpec
"""What a page is made of."""

DEFAULT_TITLE = "Lorsa heads"
"""The title of a page that is given none."""


def render(*sections: Section, title: str = DEFAULT_TITLE) -> str:
    """Return a page that holds everything it shows.

    The JavaScript of circuitsvis stands in the page once, however many figures there are, and not
    at all if there are none. The page carries a content security policy that lets only its own
    scripts run and forbids every request, so text taken from a corpus cannot do anything. Equal
    sections give equal pages.

    Args:
        *sections: `Heading`, `Text`, `Table`, `Bars`, `Plot`, and the figures that the views
            return, in order.
        title: The title of the page, plain text.

    Returns:
        The HTML document.

    Raises:
        ValueError: If there are no sections.
        TypeError: If a section is something else.
    """
    if not sections:
        raise ValueError("sections is empty; pass figures, Heading, Text, Table or Bars")
    for number, section in enumerate(sections):
        _check_section(number, section)

    figures: list[FigureSpec] = []
    body: list[str] = []
    for section in sections:
        if isinstance(section, Static):
            body.append(section.to_html())
        else:
            figures.append(section.spec)
            body.append(_figure_html(section.spec, _figure_id(len(figures))))

    scripts: list[str] = []
    if figures:
        calls = [spec.call(_figure_id(number)) for number, spec in enumerate(figures, start=1)]
        keyboard = files("lorsa_lens.views").joinpath("keyboard.js").read_text(encoding="utf-8")
        scripts = [bundle(), "\n" + "\n".join(calls) + "\n", keyboard]
    return document(title, body, scripts)


def save(path: str | Path, *sections: Section, title: str = DEFAULT_TITLE) -> Path:
    """Write a page that opens in any browser without a network.

    The file is complete or not there: it is written beside its place and then moved, so a failure
    leaves an older file as it was. Missing folders are made.

    Args:
        path: Where to write; the name must end in ``.html``.
        *sections: As for `render`.
        title: The title of the page, plain text.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the name does not end in ``.html``, or there are no sections.
        IsADirectoryError: If `path` is a folder.
        TypeError: If a section is neither text nor a figure of this package.

    Example:
        >>> save("runs/heads.html", Heading("Induction"), attention_view(pattern, tokens))
    """
    target = Path(path)
    if target.suffix != ".html":
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, {str(path)!r} is a folder")
    page = render(*sections, title=title)
    with atomic_write(target) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return target


def _check_section(number: int, section: object) -> None:
    if isinstance(section, Static):
        return
    if isinstance(getattr(section, "spec", None), FigureSpec):
        return
    given = type(section).__name__
    if isinstance(section, str):
        advice = "wrap it in Text(...) or Heading(...)"
    elif given == "RenderedHTML":
        advice = "make it with lorsa_lens.views.Figure(component, props, legend=...)"
    else:
        advice = "a section is a Heading, a Text, a Table or a figure of lorsa_lens.views"
    raise TypeError(f"section {number} is a {given}; {advice}")


def _figure_id(number: int) -> str:
    return f"figure-{number}"


def _figure_html(spec: FigureSpec, element_id: str) -> str:
    return (
        f'<figure>\n<div class="card"><div id="{element_id}"></div></div>\n'
        f"<figcaption>{spec.legend_html()}</figcaption>\n</figure>"
    )


def document(
    title: str, body: list[str], scripts: list[str], *, style: str = "", asks: bool = False
) -> str:
    """Return a page of HTML parts. Scripts are allowed by their hash, inline handlers stay inert.

    Args:
        title: Plain text.
        body: HTML, in order.
        scripts: JavaScript, fit to stand in a script element.
        style: CSS of this page alone, fit to stand in a style element.
        asks: Whether scripts may send requests to where the page came from.
    """
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    policy += "; connect-src 'self'" if asks else ""
    noscript = "<noscript><p>The figures need JavaScript.</p></noscript>" if scripts else ""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escape(title)}</h1>",
            noscript,
            *body,
            "</main>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _digest(script: str) -> str:
    """Return the hash of a script as content security policies write it."""
    return b64encode(sha256(script.encode()).digest()).decode()
