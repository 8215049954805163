"""Memory that is used again, and how much of it at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

ON_ACCELERATORS = 64
"""How many times as much is worked on together there, where work is started with a delay."""


def at_a_time(n_elements: int, device: torch.device) -> int:
    """Elements to work on together: those given, which fit a processor's cache, or more."""
    return n_elements if device.type == "cpu" else ON_ACCELERATORS * n_elements


def blocks(
    n_items: int, elements_each: int, n_elements: int, device: torch.device
) -> Iterator[slice]:
    """Slices of items, of so many elements each, to work on together: `at_a_time` of them."""
    step = max(1, at_a_time(n_elements, device) // max(1, elements_each))
    for start in range(0, n_items, step):
        yield slice(start, min(start + step, n_items))


class Workspace:
    """Memory that parts of a computation use in turn: fresh memory costs more than their work."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        self.buffer = like.new_empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        """A tensor of this shape, with whatever was in it."""
        n = torch.Size(shape).numel()
        if n > self.buffer.numel():
            self.buffer = self.buffer.new_empty(n)
        return self.buffer[:n].view(shape)
