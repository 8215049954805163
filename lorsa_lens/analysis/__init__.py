"""Reading heads: what they fetch, read, write and do, as numbers with a null beside them."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.analysis.attribution import Attribution, attribute
    from lorsa_lens.analysis.behaviours import (
        Behaviour,
        carrying_heads,
        describe_heads,
        find_heads,
        known_behaviours,
        named_heads,
        operand_profiles,
    )
    from lorsa_lens.analysis.causal import head_effects, path_patch, validate
    from lorsa_lens.analysis.contexts import ContextStore, collect_contexts
    from lorsa_lens.analysis.correspondence import (
        circuit_overlap,
        match_features,
        span_histogram,
    )
    from lorsa_lens.analysis.strings import Vocabulary
    from lorsa_lens.analysis.tables import save_table
    from lorsa_lens.analysis.vocabulary import (
        direct_logit_attribution,
        top_logits,
        top_read_tokens,
        top_token_pairs,
    )

_HOMES = {
    "Attribution": "attribution",
    "Behaviour": "behaviours",
    "ContextStore": "contexts",
    "Vocabulary": "strings",
    "attribute": "attribution",
    "circuit_overlap": "correspondence",
    "collect_contexts": "contexts",
    "carrying_heads": "behaviours",
    "describe_heads": "behaviours",
    "direct_logit_attribution": "vocabulary",
    "find_heads": "behaviours",
    "head_effects": "causal",
    "known_behaviours": "behaviours",
    "match_features": "correspondence",
    "named_heads": "behaviours",
    "operand_profiles": "behaviours",
    "path_patch": "causal",
    "save_table": "tables",
    "span_histogram": "correspondence",
    "top_logits": "vocabulary",
    "top_read_tokens": "vocabulary",
    "top_token_pairs": "vocabulary",
    "validate": "causal",
}

__all__ = [
    "Attribution",
    "Behaviour",
    "ContextStore",
    "Vocabulary",
    "attribute",
    "carrying_heads",
    "circuit_overlap",
    "collect_contexts",
    "describe_heads",
    "direct_logit_attribution",
    "find_heads",
    "head_effects",
    "known_behaviours",
    "match_features",
    "named_heads",
    "operand_profiles",
    "path_patch",
    "save_table",
    "span_histogram",
    "top_logits",
    "top_read_tokens",
    "top_token_pairs",
    "validate",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
