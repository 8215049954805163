"""What example scripts share: options, and results that are printed and saved as a page."""

import argparse
import sys
from pathlib import Path

from lorsa_lens.views import Heading, Table, Text, save
from lorsa_lens.views.page import Section


def example_options(doc: str | None, page: str) -> argparse.ArgumentParser:
    """A parser that explains the example with its own docstring, and asks where the page goes.

    Args:
        doc: the module's docstring.
        page: the page's name, without `.html`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("lorsa_demo") / f"{page}.html"
    parser.add_argument("--out", type=Path, default=default, help=f"the page (default {default})")
    return parser


def show(path: Path, title: str, *sections: Section) -> Path:
    """Print headings, texts and tables, and save all sections as one page.

    Args:
        path: where the page goes.
        title: of the page.
        *sections: as `lorsa_lens.views.save` takes them; figures are on the page only.
    """
    for section in sections:
        if isinstance(section, Heading | Text):
            sys.stdout.write(f"\n{section.text}\n")
        elif isinstance(section, Table):
            sys.stdout.write(f"\n{section}\n")
    saved = save(path, *sections, title=title)
    sys.stdout.write(f"\nThe page: {saved}\n")
    return saved
