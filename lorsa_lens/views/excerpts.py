"""One context of a head as a line of tokens, with arrows from its sources to the query."""

from itertools import pairwise
from unicodedata import east_asian_width

from lorsa_lens.views.drawing import Drawing
from lorsa_lens.views.facts import Excerpt
from lorsa_lens.views.spec import escape
from lorsa_lens.views.style import NEGATIVE, POSITIVE
from lorsa_lens.views.tokens import display_token

MAX_SOURCES = 4
"""Arrows of one context."""

MIN_SHARE = 0.05
"""A source gets an arrow if it gives at least this share of `|A v|`."""

_AROUND = 2  # tokens shown on each side of a source and of the query
_MAX_CHARS = 16
_CHAR, _PAD, _GAP = 7.3, 4, 6
_LINE = 20
_LOOP = 12.0  # height of the mark of a token that fetches from itself
_HIGHEST = 50.0
_GAP_MARK = "…"


def excerpt_drawing(excerpt: Excerpt) -> Drawing:
    """Draw the query, its sources and the tokens around them; what lies between is left out."""
    sources = excerpt.sources(MAX_SOURCES, MIN_SHARE)
    shown = _shown(excerpt, sources)
    labels = [_label(excerpt, position) for position in shown]
    lefts, widths, x = [], [], float(_GAP)
    for label in labels:
        lefts.append(x)
        widths.append(_columns(label) * _CHAR + 2 * _PAD)
        x += widths[-1] + _GAP
    place = {position: index for index, position in enumerate(shown) if position is not None}
    centres = {p: lefts[index] + widths[index] / 2 for p, index in place.items()}

    total = sum(map(abs, excerpt.z_pattern)) or 1.0
    shares = {key: excerpt.z_pattern[key] / total for key in sources}
    shapes = []
    for key in sources:
        left, width = lefts[place[key]], widths[place[key]]
        shapes.append(_box(left, width, f'fill="{_colour(shares[key])}" fill-opacity=".25"'))
    at = place[excerpt.query]
    shapes.append(_box(lefts[at], widths[at], 'fill="none" stroke="currentColor"'))
    line = "".join(_text(*parts) for parts in zip(labels, lefts, widths, strict=True))
    shapes.append(f'<g transform="translate(0,14)">{line}</g>')
    for key in reversed(sources):
        tip = (
            f"{abs(shares[key]):.0%} of |A·v|, {excerpt.z_pattern[key]:+.3g}, from position {key} "
            f"({display_token(excerpt.tokens[key])}) to {excerpt.query}"
        )
        shapes.append(_arrow(centres[key], centres[excerpt.query], shares[key], tip))
    top = 8 + max((_rise(centres[key], centres[excerpt.query]) for key in sources), default=0.0)
    legend = f"z = {excerpt.activation:+.3g} at position {excerpt.query} (framed)"
    svg = (
        f'<svg viewBox="0 {-top:.0f} {x:.0f} {top + _LINE + 2:.0f}" width="{x:.0f}" '
        f'height="{top + _LINE + 2:.0f}" role="img" aria-label="{escape(legend)}" '
        f'font-family="monospace" font-size="12" fill="currentColor">{"".join(shapes)}</svg>'
    )
    return Drawing(svg, legend)


def _shown(excerpt: Excerpt, sources: list[int]) -> list[int | None]:
    """The positions shown, in order; None where some are left out."""
    near = sorted(
        {
            position
            for centre in (*sources, excerpt.query)
            for position in range(centre - _AROUND, centre + _AROUND + 1)
            if 0 <= position < len(excerpt.tokens)
        }
    )
    shown: list[int | None] = [] if near[0] == 0 else [None]
    shown.append(near[0])
    for before, after in pairwise(near):
        shown += [after] if after == before + 1 else [None, after]
    return shown if near[-1] == len(excerpt.tokens) - 1 else [*shown, None]


def _label(excerpt: Excerpt, position: int | None) -> str:
    if position is None:
        return _GAP_MARK
    token = display_token(excerpt.tokens[position])
    return token if len(token) <= _MAX_CHARS else token[: _MAX_CHARS - 1] + "…"


def _columns(label: str) -> int:
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in label)


def _colour(share: float) -> str:
    return POSITIVE if share >= 0 else NEGATIVE


def _box(left: float, width: float, look: str) -> str:
    return f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="{_LINE}" rx="3" {look}/>'


def _text(label: str, left: float, width: float) -> str:
    return f'<text x="{left + _PAD:.0f}" textLength="{width - 2 * _PAD:.0f}">{escape(label)}</text>'


def _rise(start: float, end: float) -> float:
    return _LOOP if start == end else min(_HIGHEST, 16 + abs(end - start) / 8)


def _arrow(start: float, end: float, share: float, tip: str) -> str:
    """An arc above the line; for a token that fetches from itself, an arrow from above."""
    colour, width = _colour(share), 1 + 3 * abs(share)
    if start == end:
        path = f"M{end:.0f} {-_LOOP - 4}V-9"
    else:
        # A quadratic curve reaches half the height of its middle point.
        middle = f"{(start + end) / 2:.0f} {-2 * _rise(start, end):.0f}"
        path = f"M{start:.0f} -2Q{middle} {end:.0f} -9"
    head = f"M{end - 6:.0f} -10h12l-6 9z"
    return (
        f'<g><title>{escape(tip)}</title><path d="{path}" fill="none" stroke="{colour}" '
        f'stroke-width="{width:.1f}"/><path d="{head}" fill="{colour}"/></g>'
    )
