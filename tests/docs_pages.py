"""What the documentation says, read from its Markdown: links, anchors, code, commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"!?\[(?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *(?:\{[^}]*\})?$", re.MULTILINE)
TARGET = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    """A page as it is."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of a language, without the indentation of its fence."""
    found = [m for m in FENCE.finditer(text_of(page)) if m[2] == language]
    return [re.sub(f"^{m[1]}", "", m[3], flags=re.MULTILINE) for m in found]


def prose(page: Path) -> str:
    """A page without fenced code."""
    return FENCE.sub("", text_of(page))


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead, pictures within links too."""
    text = CODE.sub("code", prose(page))
    inner = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    return [m[1] for m in LINK.finditer(text)] + inner


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown and GitHub make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    return {slug(heading) for heading in HEADING.findall(prose(page))}


def documented() -> list[str]:
    """Modules and packages that the reference renders."""
    return [name for page in sorted((DOCS / "reference").glob("*.md")) for name in
            TARGET.findall(text_of(page))]  # fmt: skip


def commands(page: Path) -> Iterator[list[str]]:
    """Lines of shell on a page, in fences and in the text, as words."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    inline = [code.strip("`") for code in CODE.findall(prose(page))]
    for line in [*shell.splitlines(), *inline]:
        if re.match(r"(lorsa-lens|make|python|torchrun|accelerate) ", line):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an ellipsis with a quote, in the text
                words = line.split()
            yield words
