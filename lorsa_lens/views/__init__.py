"""Figures of Lorsa heads, and HTML pages that open without a network.

Importing this package imports neither circuitsvis nor transformer_lens; circuitsvis is imported
when a view is first asked for.
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.views.bars import Bars
    from lorsa_lens.views.checks import MAX_HEADS, MAX_TEXT_TOKENS, MAX_TOKENS
    from lorsa_lens.views.drawing import Drawing
    from lorsa_lens.views.figure import Figure
    from lorsa_lens.views.figures import attention_view, token_view, z_pattern_view
    from lorsa_lens.views.page import render, save
    from lorsa_lens.views.sections import Heading, Table, Text
    from lorsa_lens.views.spec import Scale
    from lorsa_lens.views.tokens import display_token, display_tokens

__all__ = [
    "MAX_HEADS",
    "MAX_TEXT_TOKENS",
    "MAX_TOKENS",
    "Bars",
    "Drawing",
    "Figure",
    "Heading",
    "Scale",
    "Table",
    "Text",
    "attention_view",
    "display_token",
    "display_tokens",
    "render",
    "save",
    "token_view",
    "z_pattern_view",
]

_HOME = {
    "MAX_HEADS": "checks",
    "MAX_TEXT_TOKENS": "checks",
    "MAX_TOKENS": "checks",
    "Bars": "bars",
    "Drawing": "drawing",
    "Figure": "figure",
    "Heading": "sections",
    "Scale": "spec",
    "Table": "sections",
    "Text": "sections",
    "attention_view": "figures",
    "display_token": "tokens",
    "display_tokens": "tokens",
    "render": "page",
    "save": "page",
    "token_view": "figures",
    "z_pattern_view": "figures",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
