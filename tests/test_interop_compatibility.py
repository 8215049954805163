"""The README's table of versions says what the package's metadata and the test matrix say."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def table():
    """Rows of the README's table by their first word: what is supported, and what is run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## What it installs with\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].split(" ")[0]: cells[1:] for cells in rows[2:]}


@pytest.fixture(scope="module")
def metadata():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def matrix():
    """Python versions, and all pins, of the environments that nox makes."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    pythons = [ast.literal_eval(key)[0] for key in values["MATRIX"].keys]
    pins = [
        element.value
        for pinned in values["MATRIX"].values
        for element in pinned.elts
        if isinstance(element, ast.Constant)
    ]
    return pythons, pins


def pinned(pins, package):
    """Versions of a package, each once, in their order."""
    return list(
        dict.fromkeys(pin.partition("==")[2] for pin in pins if pin.startswith(package + "=="))
    )


def test_supported_versions_are_those_of_the_metadata(metadata):
    requirements = [*metadata["dependencies"], *metadata["optional-dependencies"]["saelens"]]
    specifiers = dict(re.fullmatch(r"([\w-]+)(.*)", each).groups() for each in requirements)
    rows = table()
    assert set(rows) == {"Python", "torch", "transformer-lens", "sae-lens"}
    assert rows.pop("Python")[0] == metadata["requires-python"]
    for name, (supported, _) in rows.items():
        assert supported == specifiers[name], name


def test_versions_that_are_run_are_those_of_the_matrix():
    pythons, pins = matrix()
    rows = table()
    assert rows["Python"][1].split(", ") == pythons
    for package in ("torch", "transformer-lens"):
        assert rows[package][1].split(", ") == pinned(pins, package)
    assert f"sae-lens{rows['sae-lens'][0]}" in pins
