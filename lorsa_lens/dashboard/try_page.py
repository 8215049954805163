"""The page on which prompts are tried and heads are steered; `try.js` does the work."""

from importlib.resources import files

from lorsa_lens.dashboard.playground import MAX_CHARS, Playground
from lorsa_lens.views.page import document
from lorsa_lens.views.spec import script_json

_BODY = f"""<form id="ask">
<label for="prompt">Prompt</label>
<textarea id="prompt" rows="3" maxlength="{MAX_CHARS}" spellcheck="false" required></textarea>
<button type="submit">Read it</button> <small>or Ctrl + Enter</small>
</form>
<p id="status" role="status"></p>
<div id="result" hidden>
<section aria-labelledby="tokens-title">
<h2 id="tokens-title">Tokens</h2>
<p>Choose one: the heads at work there and the next token after it are shown.</p>
<div id="tokens"></div>
</section>
<div class="columns">
<section aria-labelledby="active-title">
<h2 id="active-title">Heads that write most at <q class="chosen"></q></h2>
<div class="table"><table id="active"><thead><tr><th>head</th><th class="number">z</th>
<th>fetched most from</th><th></th></tr></thead><tbody></tbody></table></div>
</section>
<section aria-labelledby="steer-title">
<h2 id="steer-title">Steer</h2>
<form id="add"><label>Head <input id="head" size="9" placeholder="L0.12" autocomplete="off">
</label> <button type="submit">add</button> <button type="button" id="clear">remove all</button>
</form>
<div id="edits"></div>
<h2>Next token after <q class="chosen"></q></h2>
<div class="table"><table id="predictions"><thead><tr><th>token</th>
<th class="number">before</th><th class="number">after</th><th class="bars"></th>
<th class="number">logit before</th><th class="number">after</th></tr></thead>
<tbody></tbody></table></div>
</section>
</div>
<section aria-labelledby="z-pattern-title" id="z-pattern" hidden>
<h2 id="z-pattern-title">z pattern of <span id="z-pattern-head"></span></h2>
<p>Rows: tokens at which the head stays. Columns: what each token contributes to its activation
there, A·v. Blue raises it, orange lowers it.</p>
<output id="readout">Point at a cell.</output>
<div class="table"><table id="heat"></table></div>
</section>
</div>
<noscript><p>This page needs JavaScript.</p></noscript>"""


def try_page(playground: Playground, title: str, *, has_site: bool) -> str:
    """Return the page.

    Args:
        playground: what it asks.
        title: plain text.
        has_site: whether there is a table of all heads, and a page for each, to link to.
    """
    links = '<nav><a href="index.html">all heads</a></nav>' if has_site else ""
    about = (
        "<p>Without changes, predictions are the model's own. A layer with a steered head has its "
        "Lorsa in place, with the error term, so that only the change counts.</p>"
    )
    data = {
        "n_heads": {str(layer): lorsa.cfg.n_ov_heads for layer, lorsa in playground.lorsas.items()},
        "has_site": has_site,
    }
    script, style = (
        files("lorsa_lens.dashboard").joinpath(name).read_text(encoding="utf-8")
        for name in ("try.js", "try.css")
    )
    code = f"const LORSAS = {script_json(data)};\n{script}"
    body = [links, about, _BODY]
    return document(f"Try a prompt · {title}", body, [code], style=style, asks=True)
