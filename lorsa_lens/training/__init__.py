"""Training Lorsas on what attention layers receive and return."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorsa_lens.training.loop import train

__all__ = ["train"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.loop"), name)
