"""Low-Rank Sparse Attention for TransformerLens: see what an attention layer really does.

The names below are imported when they are first used, so that `import lorsa_lens` stays light.

    >>> from lorsa_lens import Lorsa, splice
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorsa_lens.config import AttentionSpec, LorsaConfig
    from lorsa_lens.functional.code import Code
    from lorsa_lens.hosts import UnsupportedAttentionError
    from lorsa_lens.interventions import scale_heads, set_heads, steer_heads, zero_heads
    from lorsa_lens.io.sources import LoadError
    from lorsa_lens.lorsa import Lorsa
    from lorsa_lens.splicing import (
        Splice,
        run_with_cache_with_lorsas,
        run_with_hooks_with_lorsas,
        run_with_lorsas,
        splice,
        spliced_lorsas,
    )
    from lorsa_lens.validation import ConfigError

_HOMES = {
    "AttentionSpec": "config",
    "ConfigError": "validation",
    "LorsaConfig": "config",
    "Code": "functional.code",
    "UnsupportedAttentionError": "hosts",
    "scale_heads": "interventions",
    "set_heads": "interventions",
    "steer_heads": "interventions",
    "zero_heads": "interventions",
    "LoadError": "io.sources",
    "Lorsa": "lorsa",
    "Splice": "splicing",
    "run_with_cache_with_lorsas": "splicing",
    "run_with_hooks_with_lorsas": "splicing",
    "run_with_lorsas": "splicing",
    "splice": "splicing",
    "spliced_lorsas": "splicing",
}

__all__ = [
    "AttentionSpec",
    "Code",
    "ConfigError",
    "LoadError",
    "Lorsa",
    "LorsaConfig",
    "Splice",
    "UnsupportedAttentionError",
    "run_with_cache_with_lorsas",
    "run_with_hooks_with_lorsas",
    "run_with_lorsas",
    "scale_heads",
    "set_heads",
    "splice",
    "spliced_lorsas",
    "steer_heads",
    "zero_heads",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
