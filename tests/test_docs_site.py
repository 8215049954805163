"""The documentation site: built strictly, without a network, and looked at in Chromium."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from browser import chromium, console, opened, overflow
from docs_names import packages
from docs_pages import DOCS, ROOT, text_of

pytestmark = pytest.mark.skipif(
    not all(
        importlib.util.find_spec(name) for name in ("zensical", "mkdocstrings", "latex2mathml")
    ),
    reason="needs the extra docs: pip install 'lorsa-lens[docs]'",
)


def build(folder):
    """Build the site strictly in a copy of what it is made from."""
    code = [sys.executable, "-m", "zensical", "build", "--strict"]
    env = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1"}
    return subprocess.run(code, cwd=folder, env=env, capture_output=True, text=True)


def copy_sources(folder):
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for name in ("docs", "website", "lorsa_lens"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def local_links(page):
    """Links and pictures of a built page that lead to this site or this repository."""
    found = re.findall(r'<(?:a|img|link|script)\b[^>]*?(?:href|src)="([^"]+)"', page)
    return {unquote(unescape(link)) for link in found if not re.match(r"[a-z]+:|#$", link)}


def leads_somewhere(path, link, ids):
    """Whether a link of a page ends at a file and, if it has one, at an anchor."""
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    if not target.exists():  # what lies beside the documentation was not copied
        copied = next(folder for folder in path.parents if (folder / "mkdocs.yml").exists())
        return (ROOT / os.path.relpath(target, copied)).exists()
    return not anchor or target not in ids or anchor in ids[target]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, its pages' HTML, and the anchors of each."""
    folder = tmp_path_factory.mktemp("docs")
    copy_sources(folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = {page: text_of(page) for page in (folder / "site").rglob("*.html")}
    ids = {page: set(re.findall(r'id="([^"]+)"', html)) for page, html in pages.items()}
    return SimpleNamespace(folder=folder / "site", pages=pages, ids=ids)


def test_nothing_comes_from_a_network(site):
    for page, html in site.pages.items():
        outside = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//', html)
        assert not outside, page


def test_links_of_built_pages_lead_somewhere(site):
    assert len(site.pages) > 30
    for page, html in site.pages.items():
        broken = [link for link in local_links(html) if not leads_somewhere(page, link, site.ids)]
        assert page.name == "404.html" or not broken, (page, broken)


def test_every_public_name_has_an_anchor_in_the_reference(site):
    reference = site.folder / "reference"
    anchored = set().union(*(ids for page, ids in site.ids.items() if page.parent == reference))
    names = {f"{package}.{name}" for package, public in packages().items() for name in public}
    assert names - anchored == set()


def test_formulas_are_mathml(site):
    written, shown = text_of(DOCS / "maths.md"), site.pages[site.folder / "maths.html"]
    assert shown.count("<math") == written.count("```math") + written.count("$`") > 40
    assert "$`" not in shown
    assert not [page for page, html in site.pages.items() if "wzxhzdk" in html]  # a lost stash


def test_examples_of_docstrings_are_code(site):
    assert not [page for page, html in site.pages.items() if "<p>&gt;&gt;&gt;" in html]


def test_pages_open_as_files_and_fit_the_screen(site):
    with chromium() as browser:
        for name in ("index", "concepts", "maths", "comparison", "reference/lorsa_lens"):
            for width in (1280, 390):
                opened(browser, site.folder / f"{name}.html", width)
                assert overflow(browser, width) <= 0, (name, width)
                assert browser.find_element("tag name", "h1").is_displayed()
        assert console(browser) == []


@pytest.mark.parametrize(
    "broken",
    ["[x](nowhere.md)", "[x](lorsa.md#nowhere)", "::: lorsa_lens.nothing"],
)
def test_a_strict_build_fails_where_something_is_missing(tmp_path, broken):
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "lorsa.md", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{broken}\n")
    (tmp_path / "lorsa_lens").mkdir()
    (tmp_path / "lorsa_lens" / "__init__.py").write_text('"""Empty."""\n')
    config = text_of(ROOT / "mkdocs.yml").replace("extra_css: [style.css]\n", "")
    config = re.sub(r"^nav:\n(?: .*\n|\n)+?(?=\S)", "", config, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(config)
    shutil.copytree(ROOT / "website", tmp_path / "website")
    assert build(tmp_path).returncode != 0
