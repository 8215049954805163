"""The text of a page: headings, paragraphs and tables. Everything in them is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorsa_lens.views.spec import escape

Cell = str | int | float
"""What a table cell may hold."""


@dataclass(frozen=True)
class Heading:
    """A heading.

    Attributes:
        text: Plain text.
        level: 2 for a part of the page, 3 for a part of a part.

    Raises:
        ValueError: If the level is not 2 or 3.
    """

    text: str
    level: int = 2

    def __post_init__(self) -> None:
        if self.level not in (2, 3):
            raise ValueError(f"level must be 2 or 3 (1 is the page title), got {self.level}")

    def to_html(self) -> str:
        """Return the heading as HTML."""
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text, separated by blank lines.

    Attributes:
        text: Plain text: HTML and Markdown are shown as they are written.
    """

    text: str

    def to_html(self) -> str:
        """Return the paragraphs as HTML."""
        paragraphs = [part.strip() for part in self.text.split("\n\n")]
        return "\n".join(f"<p>{escape(part)}</p>" for part in paragraphs if part)


@dataclass(frozen=True)
class Table:
    """A table. Numbers are set right-aligned, floats with four significant digits.

    `print` shows it in a terminal, notebooks show it as HTML.

    Attributes:
        header: The column titles.
        rows: One sequence of cells per row, as long as the header.

    Raises:
        ValueError: If the header is empty or a row has another length.
        TypeError: If a cell is neither a string nor a number.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        if isinstance(self.header, str) or not self.header:
            raise ValueError(f"header must be the column titles, at least one; got {self.header!r}")
        for number, row in enumerate(self.rows):
            if isinstance(row, str) or len(row) != len(self.header):
                raise ValueError(
                    f"rows[{number}] must have {len(self.header)} cells, one per column title; "
                    f"got {row!r}"
                )
            for cell in row:
                if not isinstance(cell, str | int | float):
                    raise TypeError(
                        f"rows[{number}] must hold strings and numbers, got a "
                        f"{type(cell).__name__} (of a tensor take .item())"
                    )

    def to_html(self) -> str:
        """Return the table as HTML."""
        head = "".join(map(_title_html, self.header, self._numeric))
        body = "\n".join("<tr>" + "".join(map(_cell_html, row)) + "</tr>" for row in self.rows)
        return (
            f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        """The table as aligned plain text."""
        lines = [list(self.header), *([_text(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        columns = list(zip(self._numeric, widths, strict=True))
        return "\n".join(
            "  ".join(
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, (numeric, width) in zip(cells, columns, strict=True)
            ).rstrip()
            for cells in lines
        )

    @property
    def _numeric(self) -> list[bool]:
        """By column, whether it holds numbers only."""
        return [
            bool(self.rows) and not any(isinstance(row[column], str) for row in self.rows)
            for column in range(len(self.header))
        ]


def _title_html(title: str, numeric: bool) -> str:
    return f'<th class="number">{escape(title)}</th>' if numeric else f"<th>{escape(title)}</th>"


def _cell_html(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    return f'<td class="number">{_text(cell)}</td>'


def _text(cell: Cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
