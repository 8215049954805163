"""What needs an extra says which, and nothing else needs it."""

import importlib
import sys

import pytest


def test_without_saelens_its_names_say_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sae_lens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.delitem(sys.modules, "lorsa_lens.interop.saelens", raising=False)
    interop = importlib.import_module("lorsa_lens.interop")
    monkeypatch.delitem(vars(interop), "as_sae", raising=False)
    with pytest.raises(ImportError, match=r"SAELens.*pip install 'lorsa-lens\[saelens\]'"):
        interop.as_sae  # noqa: B018
    assert callable(interop.save_llamascopium)
