"""From text or token ids to what attention layers receive and return, batch by batch.

    documents -> contexts of one length -> ActivationStream, or a cache of it on disk

Every step keeps its place: `state_dict()` is a few numbers that JSON can hold, and a run that
loads them goes on with exactly the next context.
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.data.activations import ActivationBatch, ActivationStream
    from lorsa_lens.data.cache import CacheSize, cache_activations, cache_size
    from lorsa_lens.data.cached import CachedActivations
    from lorsa_lens.data.contexts import Context, Contexts, TokenBatch
    from lorsa_lens.data.documents import Document, Documents, IndexedDocuments
    from lorsa_lens.data.for_model import contexts_for_model
    from lorsa_lens.data.in_memory import RecordedActivations
    from lorsa_lens.data.manifest import CacheError
    from lorsa_lens.data.packing import pack
    from lorsa_lens.data.prefetch import prefetched
    from lorsa_lens.data.sources import open_documents
    from lorsa_lens.data.text import special_token_ids
    from lorsa_lens.data.weights import fingerprint

_HOMES = {
    "ActivationBatch": "activations",
    "ActivationStream": "activations",
    "CacheError": "manifest",
    "CacheSize": "cache",
    "CachedActivations": "cached",
    "Context": "contexts",
    "Contexts": "contexts",
    "Document": "documents",
    "Documents": "documents",
    "IndexedDocuments": "documents",
    "RecordedActivations": "in_memory",
    "TokenBatch": "contexts",
    "cache_activations": "cache",
    "cache_size": "cache",
    "contexts_for_model": "for_model",
    "fingerprint": "weights",
    "open_documents": "sources",
    "pack": "packing",
    "prefetched": "prefetch",
    "special_token_ids": "text",
}

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "CacheError",
    "CacheSize",
    "CachedActivations",
    "Context",
    "Contexts",
    "Document",
    "Documents",
    "IndexedDocuments",
    "RecordedActivations",
    "TokenBatch",
    "cache_activations",
    "cache_size",
    "contexts_for_model",
    "fingerprint",
    "open_documents",
    "pack",
    "prefetched",
    "special_token_ids",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
