"""Figures of Lorsa heads, and HTML pages that open without a network.

Importing this package imports neither circuitsvis nor transformer_lens; circuitsvis is imported
when a view is first asked for.
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.views.bars import Bars
    from lorsa_lens.views.card import Card
    from lorsa_lens.views.checks import MAX_CELLS, MAX_HEADS, MAX_TEXT_TOKENS, MAX_TOKENS
    from lorsa_lens.views.drawing import Drawing
    from lorsa_lens.views.facts import Excerpt, HeadFacts
    from lorsa_lens.views.figure import Figure
    from lorsa_lens.views.figures import attention_view, token_view, z_pattern_view
    from lorsa_lens.views.heads import compare_view, head_card, layer_overview
    from lorsa_lens.views.page import render, save
    from lorsa_lens.views.plot import Plot
    from lorsa_lens.views.plots import (
        plot_behaviours,
        plot_densities,
        plot_effective_heads,
        plot_fvu_by_k,
        plot_training,
    )
    from lorsa_lens.views.sections import Heading, Table, Text
    from lorsa_lens.views.spec import Scale
    from lorsa_lens.views.tokens import display_token, display_tokens

__all__ = [
    "MAX_CELLS",
    "MAX_HEADS",
    "MAX_TEXT_TOKENS",
    "MAX_TOKENS",
    "Bars",
    "Card",
    "Drawing",
    "Excerpt",
    "Figure",
    "HeadFacts",
    "Heading",
    "Plot",
    "Scale",
    "Table",
    "Text",
    "attention_view",
    "compare_view",
    "display_token",
    "display_tokens",
    "head_card",
    "layer_overview",
    "plot_behaviours",
    "plot_densities",
    "plot_effective_heads",
    "plot_fvu_by_k",
    "plot_training",
    "render",
    "save",
    "token_view",
    "z_pattern_view",
]

_HOME = {
    "MAX_CELLS": "checks",
    "MAX_HEADS": "checks",
    "MAX_TEXT_TOKENS": "checks",
    "MAX_TOKENS": "checks",
    "Bars": "bars",
    "Card": "card",
    "Drawing": "drawing",
    "Excerpt": "facts",
    "Figure": "figure",
    "HeadFacts": "facts",
    "Heading": "sections",
    "Plot": "plot",
    "Scale": "spec",
    "Table": "sections",
    "Text": "sections",
    "attention_view": "figures",
    "compare_view": "heads",
    "display_token": "tokens",
    "display_tokens": "tokens",
    "head_card": "heads",
    "layer_overview": "heads",
    "plot_behaviours": "plots",
    "plot_densities": "plots",
    "plot_effective_heads": "plots",
    "plot_fvu_by_k": "plots",
    "plot_training": "plots",
    "render": "page",
    "save": "page",
    "token_view": "figures",
    "z_pattern_view": "figures",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
