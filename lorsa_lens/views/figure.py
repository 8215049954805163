"""The object a view returns: circuitsvis' own, without its look-ups on the network."""

from collections.abc import Mapping
from uuid import uuid4

from circuitsvis.utils.render import RenderedHTML

from lorsa_lens.views.bundle import bundle
from lorsa_lens.views.spec import FigureSpec, Scale


class Figure(RenderedHTML):
    """A circuitsvis figure that notebooks show without a network.

    circuitsvis' `RenderedHTML` asks a web site on every display whether the network is up and, if
    it is, loads its JavaScript from a CDN; `str()` of it always does. A `Figure` always holds the
    JavaScript itself (1.3 MB per display). `lorsa_lens.views.save` writes many figures to one page
    that holds it once.

    Args:
        component: The name of a circuitsvis component, see `lorsa_lens.views.spec.COMPONENTS`.
        props: Its properties, made of JSON types; see `FigureSpec` about tokens.
        legend: One line that says what colour means.
        scale: The colour scale, if there is one.

    Raises:
        ValueError: If circuitsvis has no such component, or the legend is empty.
    """

    def __init__(
        self,
        component: str,
        props: Mapping[str, object],
        *,
        legend: str,
        scale: Scale | None = None,
    ) -> None:
        self.spec = FigureSpec(component, props, legend, scale)

    @property
    def local_src(self) -> str:
        """The figure as HTML that holds the JavaScript it needs, with an id of its own."""
        element_id = f"lorsa-lens-{uuid4().hex[:12]}"
        card = "background:#fff;color:#1c1c1c;padding:12px;border-radius:6px"
        return (
            f'<div style="{card}"><div id="{element_id}"></div>'
            f'<p style="margin:8px 0 0;font-size:small">{self.spec.legend_html()}</p></div>\n'
            f'<script type="module">\n{bundle()}\n{self.spec.call(element_id)}\n</script>'
        )

    @property
    def cdn_src(self) -> str:
        """The same as `local_src`: nothing is loaded from a CDN."""
        return self.local_src

    def _repr_html_(self) -> str:
        return self.local_src

    def __repr__(self) -> str:
        return f"Figure({self.spec.component}: {self.spec.legend})"
