"""Several processes training one Lorsa: each takes its share of every batch (data parallel).

Started by `torchrun` or `accelerate launch`. Without `torch.distributed` there is one process, and
everything here does nothing.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a run."""

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        """This process."""
        self.n = dist.get_world_size() if active else 1
        """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.n > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def any(self, flags: Tensor) -> Tensor:
        """Where any process has true; Bool[Tensor, "..."]."""
        if self.n == 1:
            return flags
        counts = flags.to(torch.int32)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return counts.bool()

    def of_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the tensors of the first one, in place."""
        for tensor in tensors if self.n > 1 else ():
            dist.broadcast(tensor, 0)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place."""
        for parameter in parameters if self.n > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)

    def wait(self) -> None:
        """Go on when all processes have come this far."""
        if self.n > 1:
            dist.barrier()
