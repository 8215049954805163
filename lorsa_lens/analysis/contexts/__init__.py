"""Contexts of heads: where in a corpus they are active, and from which tokens they fetch there."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.analysis.contexts.collect import collect_contexts
    from lorsa_lens.analysis.contexts.store import ContextStore, HeadContexts, KeptContext

_HOMES = {
    "ContextStore": "store",
    "HeadContexts": "store",
    "KeptContext": "store",
    "collect_contexts": "collect",
}

__all__ = ["ContextStore", "HeadContexts", "KeptContext", "collect_contexts"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
