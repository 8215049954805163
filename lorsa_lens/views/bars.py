"""Bar charts as inline SVG: no script, readable in the light and the dark scheme."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorsa_lens.views.spec import escape

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 34
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
_N_TICKS = 4

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bars:
    """Bars side by side, from 0, in one group for each label.

    Attributes:
        labels: Plain text below each group.
        series: By name, one value per label; what is not a finite number is left out.
        intervals: By name of a series, low and high ends of a whisker on each of its bars.

    Raises:
        ValueError: If there are no labels, no series or too many of them, or one has another
            length.
    """

    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    intervals: Mapping[str, Sequence[Interval]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels or not 1 <= len(self.series) <= len(_COLOURS):
            raise ValueError(
                f"bars need labels and 1 to {len(_COLOURS)} series, got {len(self.labels)} labels "
                f"and {len(self.series)} series"
            )
        for name, values in (*self.series.items(), *self.intervals.items()):
            if len(values) != len(self.labels) or name not in self.series:
                raise ValueError(
                    f"series {name!r} has {len(values)} values for {len(self.labels)} labels, or "
                    "is an interval without a series"
                )

    def to_html(self) -> str:
        """Return the chart and the names of its series as HTML."""
        names = [
            f'<span style="display:inline-block;margin-right:1em"><span style="color:{colour}">■'
            f"</span> {escape(name)}</span>"
            for name, colour in zip(self.series, _COLOURS, strict=False)
        ]
        return (
            f'<figure>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" '
            'fill="currentColor" font-size="11">\n'
            f"{chr(10).join([*self._ticks(), *self._labels(), *self._bars()])}\n</svg>\n"
            f"<figcaption>{''.join(names)}</figcaption>\n</figure>"
        )

    def _range(self) -> Interval:
        ends = [value for values in self.series.values() for value in values]
        ends += [end for pairs in self.intervals.values() for pair in pairs for end in pair]
        known = [end for end in ends if math.isfinite(end)]
        low, high = min([0.0, *known]), max([0.0, *known])
        return (low, high) if high > low else (0.0, 1.0)

    def _y(self, value: float) -> float:
        low, high = self._range()
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    @property
    def _group(self) -> float:
        return (_WIDTH - _LEFT - _RIGHT) / len(self.labels)

    def _ticks(self) -> list[str]:
        low, high = self._range()
        ticks = []
        for index in range(_N_TICKS + 1):
            value = low + (high - low) * index / _N_TICKS
            y = self._y(value)
            ticks.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                'stroke="currentColor" stroke-opacity=".15"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            )
        return ticks

    def _labels(self) -> list[str]:
        return [
            f'<text x="{_LEFT + (index + 0.5) * self._group:.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
            f'text-anchor="middle">{escape(label)}</text>'
            for index, label in enumerate(self.labels)
        ]

    def _bars(self) -> list[str]:
        width = 0.8 * self._group / len(self.series)
        shapes = []
        for place, (name, values) in enumerate(self.series.items()):
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    continue
                x = _LEFT + (index + 0.1) * self._group + place * width
                top, bottom = sorted((self._y(value), self._y(0.0)))
                shapes.append(
                    f'<rect x="{x:.1f}" y="{top:.1f}" width="{0.92 * width:.1f}" '
                    f'height="{bottom - top:.1f}" fill="{_COLOURS[place]}">'
                    f"<title>{escape(f'{self.labels[index]}, {name}: {value:.4g}')}</title></rect>"
                )
                if name in self.intervals:
                    shapes += self._whisker(x + 0.46 * width, self.intervals[name][index])
        return shapes

    def _whisker(self, x: float, interval: Interval) -> list[str]:
        if not all(math.isfinite(end) for end in interval):
            return []
        low, high = (self._y(end) for end in interval)
        return [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
            'stroke="currentColor" stroke-width="1.5"/>'
        ]
