"""Behaviours that heads are known for: what they fetch, what they write, and who does so."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.analysis.behaviours.catalogue import Behaviour, known_behaviours
    from lorsa_lens.analysis.behaviours.effects import Effect
    from lorsa_lens.analysis.behaviours.find import (
        carrying_heads,
        describe_heads,
        find_heads,
        named_heads,
    )
    from lorsa_lens.analysis.behaviours.operands import operand_profiles

_HOMES = {
    "Behaviour": "catalogue",
    "Effect": "effects",
    "carrying_heads": "find",
    "describe_heads": "find",
    "find_heads": "find",
    "known_behaviours": "catalogue",
    "named_heads": "find",
    "operand_profiles": "operands",
}

__all__ = [
    "Behaviour",
    "Effect",
    "carrying_heads",
    "describe_heads",
    "find_heads",
    "known_behaviours",
    "named_heads",
    "operand_profiles",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
