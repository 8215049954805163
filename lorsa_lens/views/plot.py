"""A plot of matplotlib as a section of a page."""

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lorsa_lens.views.spec import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Plot:
    """The figure of some axes, as a picture that the page holds. It needs no script.

    Attributes:
        axes: What the functions `plot_...` return, or any axes of matplotlib.
        legend: Plain text below it; screen readers read it in place of the picture.

    Raises:
        ValueError: If the legend is empty.
    """

    axes: "Axes"
    legend: str

    def __post_init__(self) -> None:
        if not self.legend.strip():
            raise ValueError("legend must say what the plot shows; got an empty string")

    def to_html(self) -> str:
        """Return the picture and its legend as HTML."""
        from matplotlib import rc_context

        picture = BytesIO()
        figure: Any = self.axes.figure
        with rc_context({"svg.hashsalt": "lorsa_lens"}):  # equal plots give equal pictures
            figure.savefig(picture, format="svg", metadata={"Date": None}, facecolor="white")
        data = b64encode(picture.getvalue()).decode()
        legend = escape(self.legend)
        return (
            f'<figure>\n<div class="card"><img style="width:100%;height:auto" alt="{legend}" '
            f'src="data:image/svg+xml;base64,{data}"></div>\n'
            f"<figcaption>{legend}</figcaption>\n</figure>"
        )
