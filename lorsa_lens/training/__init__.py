"""Training Lorsas on what attention layers receive and return."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

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

__getattr__, __dir__ = lazy(__name__, _HOMES)
