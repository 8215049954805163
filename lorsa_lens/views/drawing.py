"""A drawing on a page: SVG that the package made itself, with what it means below it."""

from dataclasses import dataclass

from lorsa_lens.views.spec import escape


@dataclass(frozen=True)
class Drawing:
    """An SVG element and its legend. It needs no script: tooltips are SVG `title`s.

    Attributes:
        svg: The element. It goes into the page as it is, so text in it must be escaped.
        legend: Plain text.

    Raises:
        ValueError: If it is not one SVG element.
    """

    svg: str
    legend: str

    def __post_init__(self) -> None:
        if not (self.svg.startswith("<svg") and self.svg.rstrip().endswith("</svg>")):
            raise ValueError(f"svg must be one <svg> element, got {self.svg[:40]!r}")

    def to_html(self) -> str:
        """Return the drawing as HTML."""
        return (
            f'<figure>\n<div class="card" style="overflow-x:auto">{self.svg}</div>\n'
            f"<figcaption>{escape(self.legend)}</figcaption>\n</figure>"
        )
