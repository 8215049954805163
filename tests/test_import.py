"""`import lorsa_lens` costs next to nothing, and every public name is there when it is asked for."""

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


def test_the_heavy_modules_would_be_seen():
    _, modules = json.loads(run(IMPORT.format(module="lorsa_lens.lorsa")))
    assert "transformer_lens" in modules


NAMES = """
import inspect, json, lorsa_lens
names = {order}
kinds = {{}}
for name in names:
    value = getattr(lorsa_lens, name)
    kinds[name] = "class" if inspect.isclass(value) else type(value).__name__
print(json.dumps(kinds))
"""


@pytest.mark.parametrize(
    "order",
    ["lorsa_lens.__all__", "lorsa_lens.__all__[::-1]", "sorted(lorsa_lens.__all__, key=len)"],
)
def test_every_public_name_resolves_in_any_order(order):
    kinds = json.loads(run(NAMES.format(order=order)))
    assert {"Lorsa", "LorsaConfig", "splice", "zero_heads"} <= set(kinds)
    for name, kind in kinds.items():
        assert kind == ("class" if name[0].isupper() else "function"), name


SUBMODULES_FIRST = """
import importlib, json, pkgutil, warnings
import lorsa_lens
modules = [m.name for m in pkgutil.walk_packages(lorsa_lens.__path__, "lorsa_lens.")]
for module in modules:
    if not module.endswith("__main__"):
        importlib.import_module(module)
from lorsa_lens import *
print(json.dumps([name for name in lorsa_lens.__all__ if not callable(globals()[name])]))
"""


def test_no_public_name_is_hidden_by_a_module_of_that_name():
    assert json.loads(run(SUBMODULES_FIRST)) == []


def test_dir_lists_the_public_names_before_and_after_they_are_used():
    code = """
import json, lorsa_lens
before = dir(lorsa_lens)
for name in lorsa_lens.__all__:
    getattr(lorsa_lens, name)
print(json.dumps([lorsa_lens.__all__, before, dir(lorsa_lens)]))
"""
    public, before, after = json.loads(run(code))
    assert set(public) <= set(before)
    assert "__version__" in before
    assert after == sorted(set(after))  # none of them twice
    assert set(before) <= set(after)
    assert public == sorted(set(public))


def test_an_unknown_name_is_an_attribute_error():
    import lorsa_lens

    with pytest.raises(AttributeError, match=r"^module 'lorsa_lens' has no attribute 'Losra'$"):
        lorsa_lens.Losra  # noqa: B018
    assert not hasattr(lorsa_lens, "HookedTransformer")
    with pytest.raises(ImportError, match="Losra"):
        from lorsa_lens import Losra  # noqa: F401
