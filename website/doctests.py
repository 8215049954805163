"""Examples of docstrings shown as code: a line that starts with `>>>`, to the next empty line."""

from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

BEFORE_FENCES = 28  # white space is normalized at 30, code in fences taken out at 25


class _Doctests(Preprocessor):
    """Puts fences around them."""

    def run(self, lines: list[str]) -> list[str]:
        shown: list[str] = []
        fenced = example = False
        for line in lines:
            if line.startswith("```"):
                fenced = not fenced
            if line.startswith(">>>") and not fenced and not example:
                example = True
                shown.append("```pycon")
            elif example and not line.strip():
                example = False
                shown.append("```")
            shown.append(line.replace("  # doctest: +SKIP", "") if example else line)
        return [*shown, "```"] if example else shown


class Doctests(Extension):
    """Registers it."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Python-Markdown."""
        md.preprocessors.register(_Doctests(md), "doctests", BEFORE_FENCES)


def makeExtension(**options: Any) -> Doctests:
    """What Python-Markdown looks for in a module."""
    return Doctests(**options)
