"""The pages of the site that are not cards."""

from collections.abc import Sequence

from lorsa_lens.dashboard.gallery import ActiveHead, Prompt
from lorsa_lens.views.spec import escape
from lorsa_lens.views.tokens import display_token

TRY_PAGE = "try.html"
"""Where prompts are tried, on a site that is served."""

COLUMNS = {
    "head": "Head",
    "behaviours": "Behaviours",
    "density": "Density",
    "size": "Largest |z|",
    "distance": "Distance",
    "origin": "From",
    "effective": "Eff. heads",
    "writes": "Writes",
    "reads": "Reads",
}
"""The columns of the table, in the order of `table.js`."""

NUMBERS = frozenset({"density", "size", "distance", "effective"})
"""Columns of numbers, there too."""


def index_html(layers: Sequence[int], has_prompts: bool, served: bool) -> str:
    """Return the table's controls and its empty body, which `table.js` fills.

    Args:
        layers: those that have an overview.
        has_prompts: whether there is a gallery.
        served: whether there is a page to try prompts on.
    """
    options = "".join(f'<option value="{layer}">layer {layer}</option>' for layer in layers)
    links = [f'<a href="layer-{layer}.html">layer {layer}</a>' for layer in layers]
    links += ['<a href="prompts.html">prompts</a>'] if has_prompts else []
    own = f'<nav><a href="{TRY_PAGE}">Try a prompt of your own, steer heads</a></nav>\n'
    titles = "".join(
        f'<th aria-sort="none"{" class=number" if name in NUMBERS else ""}>'
        f'<button type="button" data-column="{name}">{title}</button></th>'
        for name, title in COLUMNS.items()
    )
    return f"""{own if served else ""}<nav>Overviews: {" · ".join(links)}</nav>
<form id="controls" role="search">
<label>Search <input id="query" type="search" placeholder="head, behaviour or token"></label>
<label>Layer <select id="layer"><option value="">all</option>{options}</select></label>
<label>Behaviour <select id="behaviour"><option value="">all</option></select></label>
<label><input id="alive" type="checkbox"> active heads only</label>
</form>
<p id="count" role="status"></p>
<div class="table"><table id="heads"><thead><tr>{titles}</tr></thead><tbody></tbody></table></div>
<p><button type="button" id="previous">previous</button> <span id="place"></span>
<button type="button" id="next">next</button></p>
<noscript><p>The table needs JavaScript. The overviews and the page of each head do not.</p>
</noscript>"""


def gallery_html(prompts: Sequence[Prompt]) -> str:
    """Return each prompt as a table: a row for each token, with the heads that write most there."""
    parts = ['<nav><a href="index.html">all heads</a></nav>']
    for number, prompt in enumerate(prompts, start=1):
        shown = [display_token(token) for token in prompt.tokens]
        rows = "\n".join(
            f'<tr><td class="number">{at}</td><td>{escape(token)}</td>'
            f"<td>{', '.join(_active(head, shown) for head in active)}</td></tr>"
            for at, (token, active) in enumerate(zip(shown, prompt.active, strict=True))
        )
        parts.append(
            f'<h2 id="prompt-{number}">Prompt {number}</h2>\n<p>{escape(" ".join(shown))}</p>\n'
            '<div class="table"><table><thead><tr><th class="number">position</th><th>token</th>'
            "<th>heads that write most, and the token they fetched most from</th></tr></thead>\n"
            f"<tbody>\n{rows}\n</tbody></table></div>"
        )
    return "\n".join(parts)


def _active(active: ActiveHead, shown: Sequence[str]) -> str:
    layer, head, activation, source = active
    name = f"L{layer}.{head}"
    tip = escape(f"z = {activation:+.3g}, most from position {source}")
    return f'<a href="heads/{name}.html" title="{tip}">{name}</a> ← {escape(shown[source])}'
