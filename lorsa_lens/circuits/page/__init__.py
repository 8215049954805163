"""Attribution graphs as HTML pages: positions across, layers up; one file, no network."""

from importlib.resources import files
from pathlib import Path

from lorsa_lens.circuits.details import Details
from lorsa_lens.circuits.graph import AttributionGraph
from lorsa_lens.circuits.page.body import body_html, template_html
from lorsa_lens.circuits.page.values import KIND_NAMES, page_values
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.views.page import document
from lorsa_lens.views.spec import escape, script_json

SCRIPTS = ("layout.js", "drawing.js", "panel.js", "page.js")
"""In the order in which they run."""

NOTHING = Details()


def render_graph(
    graph: AttributionGraph, *, details: Details = NOTHING, title: str = "Attribution graph"
) -> str:
    """A page on which a graph is looked at: zoomed, pruned, followed from node to node.

    The page holds all it shows and makes no request: its content security policy lets only its own
    script run. Tokens and labels enter as text, whatever they hold.

    Args:
        graph: at most `MAX_NODES` nodes and `MAX_EDGES` edges.
        details: z patterns, contexts and QK tracing of its heads.
        title: plain text.

    Returns:
        The HTML document.

    Raises:
        ValueError: if the graph is empty or too large, or the details are not of its nodes.
    """
    details.check(graph)
    values = page_values(graph, details)
    kinds = {kind: KIND_NAMES[kind] for kind in dict.fromkeys(node.kind for node in graph.nodes)}
    here = files("lorsa_lens.circuits.page")
    parts = [here.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS]
    data = [
        '"use strict";',
        f"const GRAPH = {script_json(values)};",
        f"const KINDS = {script_json(kinds)};",
    ]
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    body = [
        f"<style>{style}</style>",
        body_html(graph, kinds, attends=bool(values["attends"])),
        *template_html(graph, details),
    ]
    return document(title, body, ["\n".join([*data, *parts])])


class GraphView:
    """A graph as notebooks show it: its page in a frame, which needs no network.

    Args:
        graph: as for `render_graph`.
        details: as there.
        title: plain text.
        height: of the frame, in pixels.

    Raises:
        ValueError: as `render_graph` does.
    """

    def __init__(
        self,
        graph: AttributionGraph,
        *,
        details: Details = NOTHING,
        title: str = "Attribution graph",
        height: int = 900,
    ) -> None:
        self.page = render_graph(graph, details=details, title=title)
        self._frame = f'title="{escape(title)}" style="width:100%;height:{height}px;border:0"'
        self._name = f"GraphView({graph!r})"

    def __repr__(self) -> str:
        return self._name

    def _repr_html_(self) -> str:
        page = escape(self.page)
        return f'<iframe {self._frame} sandbox="allow-scripts" srcdoc="{page}"></iframe>'


def save_graph_page(
    graph: AttributionGraph,
    path: str | Path,
    *,
    details: Details = NOTHING,
    title: str = "Attribution graph",
) -> Path:
    """Write `render_graph` as a file, atomically.

    Raises:
        ValueError: if the name does not end in `.html`, and as `render_graph` does.
    """
    target = Path(path)
    if target.suffix != ".html":
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    page = render_graph(graph, details=details, title=title)
    with atomic_write(target) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return target
