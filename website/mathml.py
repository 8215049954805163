"""Formulas of the documentation as MathML, so that pages need neither scripts nor a network.

Written as GitHub reads them: a fenced block named `math`, and $`x`$ within a line.
"""

import re
from html import escape
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
INLINE = r"\$`([^`]+)`\$"

BEFORE_FENCES = 28  # white space is normalized at 30, code in fences taken out at 25
BEFORE_BACKTICKS = 200  # 190


class _Blocks(Preprocessor):
    """Takes fenced formulas out of the text and puts their MathML aside."""

    def run(self, lines: list[str]) -> list[str]:
        def stored(match: re.Match[str]) -> str:
            formula = match[1].strip()
            shown = convert(formula, display="block")
            stash = self.md.htmlStash.store(
                f'<div class="formula" role="math" tabindex="0" aria-label="{escape(formula)}">'
                f"{shown}</div>"
            )
            return f"\n{stash}\n"

        return BLOCK.sub(stored, "\n".join(lines)).split("\n")


class _Inline(InlineProcessor):
    """Formulas within a line."""

    def handleMatch(  # type: ignore[override]
        self, match: re.Match[str], _: str
    ) -> tuple[str | Element, int, int]:
        return self.md.htmlStash.store(convert(match[1])), match.start(0), match.end(0)


class MathML(Extension):
    """Registers both."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Python-Markdown."""
        md.preprocessors.register(_Blocks(md), "mathml_blocks", BEFORE_FENCES)
        md.inlinePatterns.register(_Inline(INLINE, md), "mathml_inline", BEFORE_BACKTICKS)


def makeExtension(**options: Any) -> MathML:
    """What Python-Markdown looks for in a module."""
    return MathML(**options)
