"""How faithful Lorsas are: to their layer's output and patterns, and to the model's predictions."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.evaluation.documents import Estimate
    from lorsa_lens.evaluation.fidelity import Fidelity
    from lorsa_lens.evaluation.loop import evaluate
    from lorsa_lens.evaluation.report import print_evaluation, save_evaluation, to_dict
    from lorsa_lens.evaluation.sinks import sink_positions

_HOMES = {
    "Estimate": "documents",
    "Fidelity": "fidelity",
    "evaluate": "loop",
    "print_evaluation": "report",
    "save_evaluation": "report",
    "sink_positions": "sinks",
    "to_dict": "report",
}

__all__ = [
    "Estimate",
    "Fidelity",
    "evaluate",
    "print_evaluation",
    "save_evaluation",
    "sink_positions",
    "to_dict",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
