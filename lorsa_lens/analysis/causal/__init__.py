"""Causal checks: switch heads off, follow paths, and test a reading against random heads."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.analysis.causal.effects import HeadEffects, head_effects
    from lorsa_lens.analysis.causal.paths import PathEffect, path_patch
    from lorsa_lens.analysis.causal.validation import Validation, validate

_HOMES = {
    "HeadEffects": "effects",
    "PathEffect": "paths",
    "Validation": "validation",
    "head_effects": "effects",
    "path_patch": "paths",
    "validate": "validation",
}

__all__ = ["HeadEffects", "PathEffect", "Validation", "head_effects", "path_patch", "validate"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
