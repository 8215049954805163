"""Automated interpretation: a chat model explains heads, and is asked what it would predict."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.analysis.interpretation.endpoint import ChatEndpoint, EndpointError
    from lorsa_lens.analysis.interpretation.interpret import Cost, estimate_cost, interpret_heads

_HOMES = {
    "ChatEndpoint": "endpoint",
    "Cost": "interpret",
    "EndpointError": "endpoint",
    "estimate_cost": "interpret",
    "interpret_heads": "interpret",
}

__all__ = ["ChatEndpoint", "Cost", "EndpointError", "estimate_cost", "interpret_heads"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
