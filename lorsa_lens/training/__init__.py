"""Training Lorsas on what attention layers receive and return."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorsa_lens.training.config import TrainingConfig
    from lorsa_lens.training.layer import TrainingError
    from lorsa_lens.training.loops import train, train_on
    from lorsa_lens.training.trainer import Trainer

_HOMES = {
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "TrainingError": "layer",
    "train": "loops",
    "train_on": "loops",
}

__all__ = ["Trainer", "TrainingConfig", "TrainingError", "train", "train_on"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
