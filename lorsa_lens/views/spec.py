"""What a figure is, without circuitsvis: a component, its props, and what its colours mean."""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

COMPONENTS = frozenset(
    {
        "AttentionHeads",
        "AttentionPattern",
        "AttentionPatterns",
        "ColoredTokens",
        "ColoredTokensMulti",
        "TextNeuronActivations",
        "TokenLogProbs",
        "TopkSamples",
        "TopkTokens",
    }
)
"""The figures that circuitsvis 1.43 exports."""

_SCRIPT_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Scale:
    """A colour scale: `negative` at `low`, white at 0, `positive` at `high`.

    Attributes:
        low: The value of full negative colour, at most 0. At 0 there is no negative side.
        high: The value of full positive colour, above 0.
        negative: CSS colour of negative values.
        positive: CSS colour of positive values.
    """

    low: float
    high: float
    negative: str
    positive: str

    def gradient(self) -> str:
        """Return the scale as a CSS background, from `low` on the left to `high` on the right."""
        if self.low == 0:
            return f"linear-gradient(to right, #fff, {self.positive})"
        zero = 100 * -self.low / (self.high - self.low)
        return f"linear-gradient(to right, {self.negative}, #fff {zero:.4g}%, {self.positive})"


@dataclass(frozen=True)
class FigureSpec:
    """One circuitsvis figure.

    Attributes:
        component: The name of the circuitsvis component, one of `COMPONENTS`.
        props: Its properties: JSON values. Tokens in them must have gone through
            `lorsa_lens.views.display_tokens`, since several components write tokens as HTML.
        legend: One line of plain text that says what colour means.
        scale: The colour scale, drawn as a bar beside the legend.

    Raises:
        ValueError: If circuitsvis has no such component, or the legend is empty.
    """

    component: str
    props: Mapping[str, object]
    legend: str
    scale: Scale | None = None

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise ValueError(
                f"component must be one of {', '.join(sorted(COMPONENTS))}; got {self.component!r}"
            )
        if not self.legend.strip():
            raise ValueError("legend must say what colour means; got an empty string")

    def call(self, element_id: str) -> str:
        """Return the JavaScript statement that draws the figure.

        Args:
            element_id: The id of the element to draw into.
        """
        target = script_json(element_id)
        return f"CircuitsVis.render({target}, CircuitsVis.{self.component}, {self.props_json()});"

    def props_json(self) -> str:
        """Return the props as JSON that may stand inside a script element."""
        return script_json(dict(self.props))

    def legend_html(self) -> str:
        """Return the scale and the legend as HTML."""
        text = escape(self.legend)
        if self.scale is None:
            return text
        box = "display:inline-block;width:6em;height:.7em;margin:0 .4em;border:1px solid #8886"
        bar = escape(f"{box};background:border-box {self.scale.gradient()}")
        low, high = (
            f"{value:.3g}".replace("-", "\u2212") for value in (self.scale.low, self.scale.high)
        )
        return (
            f'<span style="white-space:nowrap;margin-right:.8em">{low}'
            f'<span style="{bar}"></span>{high}</span>{text}'
        )


@runtime_checkable
class HasSpec(Protocol):
    """Anything that can be drawn: a `lorsa_lens.views.Figure`."""

    @property
    def spec(self) -> FigureSpec:
        """What to draw."""


def escape(text: str) -> str:
    """Escape text for HTML, in attributes too.

    A lone surrogate becomes U+FFFD. Marks that change the direction of writing become their
    number (`‹U+202E›`): they would reorder what stands around the text.
    """
    shown = _DIRECTION.sub(lambda mark: f"\u2039U+{ord(mark[0]):04X}\u203a", text)
    return html.escape(_SURROGATE.sub("\ufffd", shown), quote=True)


def script_json(value: object) -> str:
    """Return a value as JSON that may stand inside a script element.

    ``<``, ``>``, ``&``, U+2028 and U+2029 are escaped. A lone surrogate becomes U+FFFD: it has no
    form in UTF-8, and browsers stumble over it.

    Raises:
        ValueError: If the value holds a NaN or an infinity, which JSON has no form for.
        TypeError: If the value is not made of JSON types.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return _SURROGATE.sub("\ufffd", text).translate(_SCRIPT_ESCAPES)
