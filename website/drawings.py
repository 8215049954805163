"""The pictures of `docs/concepts.md`, written to `docs/pictures/` as SVG.

Each has its own background and system fonts, and follows the reader's light or dark scheme, so that
it is readable wherever it stands. The numbers in them are made up.

    python -m website.drawings
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH = 480
TIMES = "\u00d7"

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328; }
.small { font-size: 13px; fill: #57606a; }
.strong { font-weight: 600; }
.back { fill: #f6f8fa; stroke: #d0d7de; }
.box { fill: #ffffff; stroke: #57606a; }
.plus { fill: #2f7fc1; } .minus { fill: #d9822b; } .rest { fill: #c3c9d0; }
.edge { stroke: #57606a; fill: none; stroke-width: 1.6; } .tip { fill: #57606a; }
.off { stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #a6b0bb; }
  .back { fill: #161b22; stroke: #3d444d; } .box { fill: #22272e; stroke: #a6b0bb; }
  .plus { fill: #58a6ff; } .minus { fill: #f0a04b; } .rest { fill: #545d68; }
  .edge { stroke: #a6b0bb; } .tip { fill: #a6b0bb; }
}
"""


class Picture:
    """An SVG in the making; (0, 0) is the upper left corner.

    Args:
        height: in the units in which its width is 480.
        title: what it shows, for those who do not see it.
    """

    def __init__(self, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="back" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10"/>',
        ]

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """A line of text whose baseline is at y."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" {place}>{escape(words)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A filled rectangle."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="{kind}" {place} rx="3"/>')

    def box(
        self, x: float, y: float, width: float, height: float, *lines: str, kind: str = "box"
    ) -> None:
        """A box with lines of text: the first strong, the others small."""
        self.rect(x, y, width, height, kind)
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for row, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * row, line, "small" if row else "strong")

    def arrow(self, *points: tuple[float, float], kind: str = "") -> None:
        """A line through points, with a tip at its end."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="edge {kind}" d="{path}" marker-end="url(#tip)"/>')

    def bars(self, x: float, y: float, step: float, height: float, values: Sequence[float]) -> None:
        """Bars on the line y: blue above it, orange below."""
        for place, value in enumerate(values):
            size = abs(value) * height
            kind = "plus" if value > 0 else "minus"
            top = y - size if value > 0 else y
            self.rect(x + place * step - 9, top, 18, size, kind)

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self.parts, "</svg>", ""])


def triangle(picture: Picture, x: float, y: float, cell: float, strong: Sequence[int]) -> None:
    """A causal pattern: row q attends most to the key `strong[q]`."""
    for query, best in enumerate(strong):
        for key in range(query + 1):
            kind = "plus" if key == best else "rest"
            picture.rect(x + key * cell, y + query * cell, cell - 2, cell - 2, kind)


def lorsa() -> Picture:
    """What a Lorsa is made of."""
    picture = Picture(392, "A Lorsa: a query-key circuit gives a pattern that rank-1 heads share")
    picture.box(20, 16, 440, 40, "x: what the attention layer receives")
    picture.arrow((110, 56), (110, 78))
    picture.arrow((345, 56), (345, 78))
    picture.box(20, 80, 180, 64, "query-key circuit", "where to look")
    picture.box(230, 80, 230, 64, "w_V of each head", "one number v per token")
    picture.arrow((110, 144), (110, 164))
    triangle(picture, 65, 168, 18, [0, 0, 1, 1, 3])
    picture.text(172, 205, "pattern", "small", "start")
    picture.text(172, 222, "A", "strong", "start")
    for row, (name, values) in enumerate(
        (("head 0", (0.3, 0.9, 0.1, 0.7, 0.2)), ("head 1", (-0.5, -0.1, -0.8, 0.2, -0.3)))
    ):
        picture.text(262, 189 + 38 * row, name, "small")
        picture.bars(312, 192 + 38 * row, 26, 22, values)
    picture.arrow((345, 144), (345, 164))
    picture.text(345, 270, "… all heads that share A", "small")
    picture.arrow((110, 262), (110, 282), (150, 282), (150, 294))
    picture.arrow((345, 276), (345, 294))
    picture.box(20, 296, 440, 40, "z = select( A v ): one number per head and token")
    picture.arrow((240, 336), (240, 354))
    picture.text(240, 374, "each head kept adds z · w_O to the stream", "strong")
    return picture


def z_pattern() -> Picture:
    """A pattern times values is a z pattern."""
    picture = Picture(330, "Attention times values gives the z pattern, which sums to z")
    words = ["Mary", "gave", "John", "a", "book", "."]
    left, step = 150, 56
    rows = (
        ("A", "attention of", "the query “.”", (0.35, 0.04, 0.42, 0.06, 0.1, 0.03)),
        ("v", "what the head", "reads there", (0.9, -0.1, -0.15, 0.3, 0.1, -0.6)),
        ("A v", "its z pattern", "(times three)", (0.95, -0.02, -0.19, 0.05, 0.03, -0.05)),
    )
    for row, (name, first, second, values) in enumerate(rows):
        base = 62 + 92 * row
        picture.text(22, base - 22, name, "strong", "start")
        picture.text(22, base - 4, first, "small", "start")
        picture.text(22, base + 12, second, "small", "start")
        picture.parts.append(f'<path class="edge" d="M{left - 22} {base}H456"/>')
        picture.bars(left, base, step, 44, values)
    for place, word in enumerate(words):
        picture.text(left + step * place, 284, word)
    picture.text(240, 314, "The sum is z: this head fetched it from “Mary”.", "strong")
    return picture


def top_k() -> Picture:
    """Of many heads a few stay."""
    picture = Picture(230, "Of all heads the K that would write most stay")
    scores = (8, 14, 5, 61, 10, 7, 18, 4, 88, 12, 6, 9, 21, 5, 47, 11, 3, 16)
    kept = sorted(scores)[-3:]
    picture.text(
        22, 32, "|z| · ‖w_O‖: how much each head would write at this token", "small", "start"
    )
    for place, score in enumerate(scores):
        kind = "plus" if score in kept else "rest"
        picture.rect(24 + 24.5 * place, 168 - 1.3 * score, 17, 1.3 * score, kind)
    picture.parts.append('<path class="edge" d="M18 168H462"/>')
    picture.text(240, 192, "heads", "small")
    picture.text(240, 216, "K = 3 stay, the others write nothing", "strong")
    return picture


def splice() -> Picture:
    """A Lorsa in the place of an attention layer."""
    picture = Picture(
        312, "A Lorsa stands in the place of attention, with or without an error term"
    )
    picture.arrow((60, 300), (60, 14))
    picture.text(72, 30, "residual stream", "small", "start")
    picture.arrow((60, 270), (150, 270), (150, 236))
    picture.text(162, 276, "norm, then x", "small", "start")
    picture.rect(110, 96, 350, 138, "box off")
    picture.text(202, 118, "where attention was", "small", "start")
    picture.box(124, 132, 140, 66, "Lorsa", "writes ŷ")
    picture.box(312, 132, 134, 66, "error term", "y - ŷ, if asked for", kind="box off")
    picture.arrow((150, 234), (150, 200))
    picture.arrow((192, 132), (192, 70), (62, 70))
    picture.arrow((378, 132), (378, 70), (196, 70), kind="off")
    picture.text(212, 60, "added to the stream", "small", "start")
    picture.text(270, 222, "the rest stays as it is", "small", "start")
    return picture


def lift() -> Picture:
    """An attention head is a group of rank-1 heads."""
    picture = Picture(292, "An attention head with four dimensions is four rank-1 heads")
    picture.text(110, 34, "one attention head", "strong")
    triangle(picture, 66, 50, 18, [0, 0, 1, 1, 3])
    picture.text(110, 164, "a pattern, and", "small")
    for column in range(4):
        picture.rect(44 + 14 * column, 176, 11, 62, "plus")
        picture.rect(126, 176 + 15 * column, 62, 11, "minus")
    picture.text(70, 258, "W_V", "small")
    picture.text(157, 258, "W_O", "small")
    picture.arrow((204, 140), (252, 140))
    picture.text(228, 128, "=", "strong")
    picture.text(362, 34, "four rank-1 heads", "strong")
    for row in range(4):
        y = 50 + 52 * row
        triangle(picture, 274, y, 8, [0, 0, 1, 1, 3])
        picture.text(324, y + 25, TIMES, "small")
        picture.rect(336, y, 11, 38, "plus")
        picture.text(358, y + 25, TIMES, "small")
        picture.rect(370, y + 14, 62, 11, "minus")
    picture.text(240, 280, "the same pattern, one column and one row each", "small")
    return picture


ALL: dict[str, Callable[[], Picture]] = {
    "lorsa": lorsa,
    "z-pattern": z_pattern,
    "top-k": top_k,
    "splice": splice,
    "lift": lift,
}


def main() -> None:
    """Write them all."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in ALL.items():
        (PICTURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
