"""Several sections under one title, as one figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorsa_lens.views.bars import Bars
from lorsa_lens.views.drawing import Drawing
from lorsa_lens.views.sections import Heading, Table, Text
from lorsa_lens.views.spec import escape


@dataclass(frozen=True)
class Card:
    """Text, tables and drawings that belong together. It needs no script; notebooks show it.

    Attributes:
        title: Plain text.
        parts: What stands below it, in order.

    Raises:
        ValueError: If there are no parts.
    """

    title: str
    parts: Sequence[Heading | Text | Table | Bars | Drawing]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"the card {self.title!r} has no parts")

    def to_html(self) -> str:
        """Return the card as HTML."""
        body = "\n".join(part.to_html() for part in self.parts)
        return f"<h2>{escape(self.title)}</h2>\n{body}"

    def _repr_html_(self) -> str:
        return f"<main>{self.to_html()}</main>"
