"""A static site: a table of all heads, a page for each, prompts. It opens from any folder."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorsa_lens.dashboard.gallery import Prompt
from lorsa_lens.dashboard.pages import TRY_PAGE, gallery_html, index_html
from lorsa_lens.views.card import Card
from lorsa_lens.views.facts import HeadFacts, Weighted
from lorsa_lens.views.heads import head_card, layer_overview
from lorsa_lens.views.page import document
from lorsa_lens.views.spec import escape, script_json
from lorsa_lens.views.tokens import display_token

MARKER = "lorsa-dashboard.json"
"""The file by which a folder is known to hold a site that may be replaced."""

N_TOKENS = 5
"""Tokens written and read that the table shows, and searches."""


def write_site(
    out: str | Path,
    heads: Iterable[HeadFacts],
    *,
    title: str = "Lorsa heads",
    prompts: Sequence[Prompt] = (),
    served: bool = False,
) -> Path:
    """Write the site. It needs no server and no network.

    The folder is complete or not there: it is written beside its place and then moved.

    Args:
        out: the folder; if it is there, it must be empty or hold such a site, which is replaced.
        heads: any number of heads of any layers; they are taken one at a time.
        title: plain text, for example the model's name.
        prompts: for the gallery.
        served: link to the page on which `lorsa-lens serve` lets one try prompts.

    Returns:
        The page to open, `index.html`.

    Raises:
        ValueError: if there are no heads, or the folder holds something else.
    """
    target = Path(out)
    if target.exists() and not _may_be_replaced(target):
        raise ValueError(f"out = {str(out)!r} holds something else: give a new or empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write(folder, heads, title, prompts, served)
        folder.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target / "index.html"


def _may_be_replaced(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MARKER).is_file() or not any(folder.iterdir()))


def _write(
    folder: Path, heads: Iterable[HeadFacts], title: str, prompts: Sequence[Prompt], served: bool
) -> None:
    rows: list[list[Any]] = []
    layers: dict[int, list[HeadFacts]] = {}
    (folder / "heads").mkdir()
    for facts in heads:
        rows.append(_row(facts))
        layers.setdefault(facts.layer, []).append(_light(facts))
        _save(folder / "heads" / f"{facts.name}.html", _head_html(facts, title, served))
    if not rows:
        raise ValueError("heads is empty: a site needs at least one head")
    script = files("lorsa_lens.dashboard").joinpath("table.js").read_text(encoding="utf-8")
    data = f"const HEADS = {script_json(rows)};\n"
    body = index_html(sorted(layers), bool(prompts), served)
    _save(folder / "index.html", document(title, [body], [data + script]))
    for layer, some in layers.items():
        _save(folder / f"layer-{layer}.html", _page(title, layer_overview(some)))
    if prompts:
        _save(folder / "prompts.html", document(title, [gallery_html(prompts)], []))
    _save(folder / MARKER, json.dumps({"n_heads": len(rows), "layers": sorted(layers)}) + "\n")


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _row(facts: HeadFacts) -> list[Any]:
    """A row of the table; its columns are named in `table.js`."""
    best = sorted(facts.behaviours, key=lambda name: -facts.behaviours[name])
    origin = max(facts.origins, key=lambda head: abs(facts.origins[head]), default=None)
    return [
        facts.layer,
        facts.head,
        best,
        _json_number(facts.density),
        _json_number(facts.max_activation),
        _json_number(facts.mean_offset),
        "" if origin is None else f"{facts.layer}.{origin}",
        _json_number(facts.effective_heads),
        _strings(facts.raises),
        _strings(facts.reads_most),
    ]


def _json_number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _strings(tokens: Sequence[Weighted]) -> list[str]:
    return [display_token(token) for token, _ in tokens[:N_TOKENS]]


def _light(facts: HeadFacts) -> HeadFacts:
    """What the overview of a layer needs."""
    return HeadFacts(
        layer=facts.layer,
        head=facts.head,
        behaviours=facts.behaviours,
        density=facts.density,
        effective_heads=facts.effective_heads,
    )


def _head_html(facts: HeadFacts, title: str, served: bool) -> str:
    targets = {"all heads": "index.html", f"layer {facts.layer}": f"layer-{facts.layer}.html"}
    if served:
        targets["steer it on a prompt"] = f"{TRY_PAGE}#head={facts.name}"
    links = " · ".join(f'<a href="../{target}">{text}</a>' for text, target in targets.items())
    contexts = [
        f"<details><summary>whole text of context {number}</summary><p>"
        f"{escape(' '.join(map(display_token, excerpt.tokens)))}</p></details>"
        for number, excerpt in enumerate(facts.excerpts, start=1)
    ]
    return document(
        f"{facts.name} · {title}",
        [f"<nav>{links}</nav>", head_card(facts).to_html(), *contexts],
        [],
    )


def _page(title: str, card: Card) -> str:
    links = '<nav><a href="index.html">all heads</a></nav>'
    return document(title, [links, card.to_html()], [])
