"""`import lorsa_lens` costs next to nothing, and every public name is there when asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = [
    "transformer_lens",
    "transformers",
    "datasets",
    "wandb",
    "circuitsvis",
    "plotly",
    "matplotlib",
]

IMPORT = """
import json, sys, time
import torch
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(name for name in sys.modules if "." not in name)]))
"""


def run(code):
    """What a fresh interpreter prints."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize("module", ["lorsa_lens", "lorsa_lens.views", "lorsa_lens.testbed"])
def test_importing_is_light(module):
    """At most 0.3 s on top of torch in the fastest of up to five interpreters."""
    fastest = float("inf")
    for _ in range(5):
        seconds, modules = json.loads(run(IMPORT.format(module=module)))
        assert "lorsa_lens" in modules
        assert set(modules) & set(HEAVY) == set()
        fastest = min(fastest, seconds)
        if fastest < 0.3:
            return
    raise AssertionError(f"import {module} takes {fastest:.2f} s on top of torch")


RESOLVE = """
import importlib, inspect, json, pkgutil, sys

def fresh():
    for name in [name for name in sys.modules if name.split(".")[0] == "lorsa_lens"]:
        del sys.modules[name]
    return importlib.import_module("lorsa_lens")

def kinds(package, names):
    values = {name: getattr(package, name) for name in names}
    return {
        name: "class" if inspect.isclass(value) else type(value).__name__
        for name, value in values.items()
    }

package = fresh()
public, before = package.__all__, dir(package)
in_order, after = kinds(package, public), dir(package)
backwards = kinds(fresh(), public[::-1])

package = fresh()
for module in pkgutil.walk_packages(package.__path__, "lorsa_lens."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:  # it says which extra it needs
            assert "pip install 'lorsa-lens[" in str(error), error
modules_first = kinds(package, public)
heavy = "transformer_lens" in sys.modules
print(json.dumps([public, before, after, heavy, [in_order, backwards, modules_first]]))
"""


@pytest.fixture(scope="module")
def resolved():
    """Public names, `dir()` before and after they are used, and what they turn out to be."""
    return json.loads(run(RESOLVE))


def test_every_public_name_resolves_in_any_order(resolved):
    public, _, _, heavy, orders = resolved
    assert {"Lorsa", "LorsaConfig", "splice", "zero_heads"} <= set(public)
    assert public == sorted(set(public))
    for kinds in orders:  # forwards, backwards, and after every module of the package
        expected = {name: "class" if name[0].isupper() else "function" for name in public}
        assert kinds == expected
    assert heavy  # so importing it would have shown above


def test_dir_lists_each_name_once_before_and_after_it_is_used(resolved):
    public, before, after, _, _ = resolved
    assert set(public) <= set(before) <= set(after)
    assert "__version__" in before
    assert before == sorted(set(before))
    assert after == sorted(set(after))


def test_an_unknown_name_is_an_attribute_error():
    import lorsa_lens

    with pytest.raises(AttributeError, match=r"^module 'lorsa_lens' has no attribute 'Losra'$"):
        lorsa_lens.Losra  # noqa: B018
    assert not hasattr(lorsa_lens, "HookedTransformer")
    with pytest.raises(ImportError, match="Losra"):
        from lorsa_lens import Losra  # noqa: F401
