"""The documentation is whole: names, links, code and commands are those of the package."""

import ast
import importlib.util
import re
import runpy

import pytest
import torch
import typer
from docs_names import defined, docstring, exists, packages
from docs_pages import DOCS, PAGES, ROOT, anchors, blocks, commands, documented, links, text_of

PACKAGES = packages()


def name_of(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    assert PACKAGES[package]
    assert [name for name in PACKAGES[package] if not docstring(package, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_a_module_of_its_package(package):
    """Importing the module would put it in the place of the name."""
    assert [name for name in PACKAGES[package] if exists(f"{package}.{name}")] == []


def test_every_public_package_stands_in_the_reference():
    """The pages render a package with all names of its `__all__`: no page chooses among them."""
    targets = documented()
    assert PACKAGES.keys() <= set(targets)
    assert len(targets) == len(set(targets))
    assert all(exists(target) for target in targets)
    for page in (DOCS / "reference").glob("*.md"):
        options = set(re.findall(r"^ {4,}(\w+):", text_of(page), re.MULTILINE))
        assert options <= {"options", "heading_level"}, page


@every_page
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_links_and_anchors_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` (c): d-e\n\n[x](y.md#z) [![p](p.png)](q.html) `[no](code)`\n\n"
        "```bash\n[no](fence)\n# no heading\n```\n"
    )
    assert sorted(links(page)) == ["p.png", "q.html", "y.md#z"]
    assert anchors(page) == {"a-b-c-d-e"}


def imported(code):
    """Names of this package that a piece of code imports, as (module, name)."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lorsa_lens"):
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lorsa_lens"):
                    yield alias.name, None


@every_page
def test_code_imports_what_there_is_and_what_is_documented(page):
    targets = documented()
    for code in blocks(page, "python"):
        for module, name in imported(code):
            assert exists(module), module
            if name and not exists(f"{module}.{name}"):
                assert defined(module, name), f"{module}.{name}"
                assert module in targets, f"{module}.{name} is not in the reference"
                assert name in PACKAGES.get(module, [name]), f"{module}.{name} is not public"


@pytest.fixture(scope="module")
def command_line():
    from lorsa_lens.cli import app

    return typer.main.get_command(app).commands


def make_targets():
    return set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))


def check_command(words, command_line):
    """Raise AssertionError for a command, an option, a target or a script that is not there."""
    if words[0] == "make":
        assert words[1] in make_targets(), words
    elif "lorsa_lens.cli" in words or words[0] == "lorsa-lens":
        start = words.index("lorsa_lens.cli") if "lorsa_lens.cli" in words else 0
        given = words[start + 1 :]
        if given[0] == "COMMAND":
            return
        assert given[0] in command_line, words
        known = {name for each in command_line[given[0]].params for name in each.opts}
        known |= {name for each in command_line[given[0]].params for name in each.secondary_opts}
        options = {
            word.strip("[]").split("=")[0] for word in given if word.strip("[").startswith("-")
        }
        assert options <= known | {"--help", "-"}, (words, options - known)
    elif words[0] == "python" and words[1] == "-m":
        assert (
            importlib.util.find_spec(words[2])
            or (ROOT / f"{words[2].replace('.', '/')}.py").exists()
        )
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), words


@every_page
def test_commands_and_options_are_there(page, command_line):
    for words in commands(page):
        check_command(words, command_line)


@pytest.mark.parametrize(
    "line",
    ["make coffee", "lorsa-lens brew", "lorsa-lens train --sugar 2", "python examples/none.py"],
)
def test_commands_that_are_not_there_are_noticed(line, command_line):
    with pytest.raises(AssertionError):
        check_command(line.split(), command_line)


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.no_grad():
        for code in blocks(DOCS / "index.md", "python"):
            exec(compile(code, "docs/index.md", "exec"), names)
    assert (names["lorsa"].cfg.n_qk_heads, names["lorsa"].cfg.n_ov_heads) == (3, 48)
    clean = names["model"](names["tokens"])
    torch.testing.assert_close(names["logits"], clean, rtol=1e-4, atol=1e-4)
    assert (names["ablated"] - clean).abs().max() > 0.01
    assert "<html" in (tmp_path / "tour.html").read_text(encoding="utf-8")


def test_the_pictures_are_those_of_the_script():
    drawings = runpy.run_path(str(ROOT / "website" / "drawings.py"))
    committed = {path.stem: path.read_text("utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert committed == {name: draw().svg() for name, draw in drawings["ALL"].items()}
    for svg in committed.values():
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(r"^ +- [^#\n]*?([\w/-]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    )
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}
