"""A circuit as a picture: tokens along x, layers along y, and pages that hold it."""

from pathlib import Path
from typing import NamedTuple

from lorsa_lens.singular.graph import Circuit, Edge, Node
from lorsa_lens.views import Drawing, Heading, Table, Text, display_token, save
from lorsa_lens.views.spec import escape

ROW, LANE, GAP, MARGIN = 84, 54, 24, 60
"""Pixels from row to row, from node to node, between tokens, and around."""

COLOURS = {
    "root": "#b3261e",
    "head": "#0b57d0",
    "mlp": "#7b3fa0",
    "bias": "#6b6b6b",
    "offset": "#6b6b6b",
}
EMBEDDING_COLOUR = "#146c2e"
SIDE_STYLE = {"dest": ("#c2570c", ""), "src": ("#0f7b8a", "6 4")}
"""Colour and dashes of edges, by their side."""

LEGEND = (
    "Tokens along x, layers along y. Orange, solid: through the query, at its destination token. "
    "Teal, dashed: through the key, at its source token. The stronger an edge, the thicker. Point "
    "at a node for its attention weight, at an edge for its weight and singular vectors."
)

MAX_WIDTH = 5.0


def circuit_view(circuit: Circuit) -> Drawing:
    """Draw a circuit.

    Raises:
        ValueError: if it has no nodes.
    """
    if not circuit.nodes:
        raise ValueError("circuit is empty: nothing to draw")
    layout = _layout(circuit)
    size = f"{layout.width} {layout.height}"
    strongest = max((abs(edge.weight) for edge in circuit.edges), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{layout.width}" height="{layout.height}" '
        f'viewBox="0 0 {size}" font-family="system-ui, sans-serif" font-size="11">',
        f"<style>{STYLE}</style>",
        *_axes_svg(circuit, layout),
        *(_edge_svg(circuit, edge, layout, strongest) for edge in circuit.edges),
        *(_node_svg(circuit, node, layout) for node in circuit.nodes),
        "</svg>",
    ]
    return Drawing("\n".join(parts), LEGEND)


def save_page(circuit: Circuit, path: str | Path, *, title: str = "Circuit") -> Path:
    """Write a self-contained HTML page with the drawing and a table of the edges.

    Raises:
        ValueError: if the circuit is empty, or the name does not end in `.html`.
    """
    view = circuit_view(circuit)
    prompt = " ".join(display_token(token) for token in circuit.tokens)
    return save(
        path,
        Text(f"Prompt: {prompt}" if circuit.tokens else "Merged circuit."),
        view,
        Heading("Edges"),
        edge_table(circuit),
        title=title,
    )


def edge_table(circuit: Circuit) -> Table:
    """Every edge, strongest first."""
    ordered = sorted(circuit.edges, key=lambda edge: -abs(edge.weight))
    rows = [
        [
            _name(circuit, edge.up),
            _name(circuit, edge.down),
            "query" if edge.side == "dest" else "key",
            edge.weight,
            " ".join(map(str, edge.vectors)) or "-",
            edge.n_prompts,
        ]
        for edge in ordered
    ]
    return Table(["from", "to", "through", "weight", "singular vectors", "prompts"], rows)


STYLE = (
    ".e{fill:none;stroke-opacity:.55}.e:hover{stroke-opacity:1;stroke:#000}"
    ".n rect{fill:#fff;stroke-width:1.4}.n:hover rect{fill:#ffef9f}.n text,.t{text-anchor:middle}"
    ".p{fill:#5c5c5c}"
)


def _row(node: Node) -> float:
    """Embeddings lie below layer 0, MLPs above the heads of their layer."""
    if node.kind in ("embedding", "token", "position", "offset"):
        return -1.0
    return node.layer + (0.5 if node.kind == "mlp" else 0.0)


class _Layout(NamedTuple):
    """Where everything stands."""

    width: int
    height: int
    columns: dict[int, int]
    """The middle of every token that has nodes."""
    rows: dict[float, int]
    nodes: dict[Node, tuple[int, int]]


def _layout(circuit: Circuit) -> _Layout:
    """Nodes of one token and layer stand side by side; a token is as wide as its widest layer."""
    cells: dict[tuple[int, float], list[Node]] = {}
    for node in circuit.nodes:
        cells.setdefault((node.dest, _row(node)), []).append(node)
    ordered = sorted({row for _, row in cells}, reverse=True)
    rows = {row: MARGIN // 2 + ROW * number for number, row in enumerate(ordered)}
    left, columns = MARGIN, {}
    for column in sorted({dest for dest, _ in cells}):
        n_lanes = max(len(nodes) for (dest, _), nodes in cells.items() if dest == column)
        width = GAP + LANE * n_lanes
        columns[column] = left + width // 2
        left += width
    nodes = {}
    for (dest, row), members in cells.items():
        for number, node in enumerate(members):
            offset = int((number - (len(members) - 1) / 2) * LANE)
            nodes[node] = (columns[dest] + offset, rows[row])
    return _Layout(left + MARGIN // 2, rows[ordered[-1]] + MARGIN, columns, rows, nodes)


def _axes_svg(circuit: Circuit, layout: _Layout) -> list[str]:
    """Tokens below, layers to the left."""
    texts = []
    for column, x in layout.columns.items():
        token = display_token(circuit.tokens[column]) if circuit.tokens else ""
        texts.append(
            f'<text class="t" x="{x}" y="{layout.height - 20}">{escape(token)}</text>'
            f'<text class="t p" x="{x}" y="{layout.height - 6}">{column}</text>'
        )
    outputs = {_row(node) for node in circuit.nodes if node.kind == "root"}
    for row, y in layout.rows.items():
        name = "embed" if row < 0 else f"{'mlp' if row % 1 else 'L'}{int(row)}"
        name = "output" if row in outputs else name
        texts.append(f'<text class="p" x="4" y="{y + 4}">{name}</text>')
    return texts


def _edge_svg(circuit: Circuit, edge: Edge, layout: _Layout, strongest: float) -> str:
    (x0, y0), (x1, y1) = layout.nodes[edge.up], layout.nodes[edge.down]
    colour, dashes = SIDE_STYLE[edge.side]
    colour = COLOURS["root"] if edge.down.kind == "root" else colour
    middle = (y0 + y1) // 2
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    through = "query" if edge.side == "dest" else "key"
    vectors = ", ".join(map(str, edge.vectors)) or "none"
    tip = (
        f"{_name(circuit, edge.up)} to {_name(circuit, edge.down)}, through the {through}: weight "
        f"{edge.weight:.3f}, singular vectors {vectors}"
    )
    width = 0.8 + (MAX_WIDTH - 0.8) * abs(edge.weight) / strongest
    return (
        f'<path class="e" data-side="{edge.side}" d="M{x0} {y0 - 9}C{x0} {middle} '
        f'{x1} {middle} {x1} {y1 + 9}" stroke="{colour}" '
        f'stroke-width="{width:.1f}"{dash}><title>{escape(tip)}</title></path>'
    )


def _node_svg(circuit: Circuit, node: Node, layout: _Layout) -> str:
    x, y = layout.nodes[node]
    attention = circuit.attention.get(node)
    tip = _name(circuit, node)
    if attention is not None:
        tip += f", attention weight {attention:.3f}"
    colour = COLOURS.get(node.kind, EMBEDDING_COLOUR)
    short = {"embedding": "emb", "position": "pos", "token": "tok"}.get(node.kind, node.label)
    return (
        f'<g class="n"><title>{escape(tip)}</title>'
        f'<rect x="{x - 23}" y="{y - 9}" width="46" height="18" rx="4" stroke="{colour}"/>'
        f'<text x="{x}" y="{y + 4}" fill="{colour}">{escape(short)}</text></g>'
    )


def _name(circuit: Circuit, node: Node) -> str:
    """A node with its tokens, as `L1.2 at 'that' (5) from 'this' (3)`."""

    def token(position: int) -> str:
        if not circuit.tokens:
            return f"token {position}"
        return f"{display_token(circuit.tokens[position])!r} ({position})"

    name = f"{node.label} at {token(node.dest)}"
    if node.kind == "head":
        name += f" from {token(node.src)}" if node.src is not None else " from all"
    return name
