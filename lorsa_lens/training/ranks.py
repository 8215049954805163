"""Several processes that work together, started by `torchrun` or `accelerate launch`.

Without `torch.distributed` there is one process, and everything here does nothing.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """All processes of a run.

    Tensors may be on any device: what the backend cannot reach goes by way of a device that it can.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        """This process."""
        self.n = dist.get_world_size() if active else 1
        """How many there are."""
        # A backend of NCCL alone does not see the CPU.
        self._device = "cuda" if active and dist.get_backend() == "nccl" else None

    @classmethod
    def alone(cls) -> "Ranks":
        """This process by itself, whatever others there are."""
        ranks = cls()
        ranks.rank, ranks.n = 0, 1
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this process is the first."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return self._reduced(tensor, dist.ReduceOp.SUM) if self.n > 1 else tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of all processes, entry by entry, in place."""
        return self._reduced(tensor, dist.ReduceOp.MAX) if self.n > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return bool(self.max(torch.tensor(int(flag))))

    def of_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the tensors of the first one, in place."""
        for tensor in tensors if self.n > 1 else ():
            reached = self._reached(tensor)
            dist.broadcast(reached, 0)
            tensor.copy_(reached)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place."""
        for parameter in parameters if self.n > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.sum(parameter.grad)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one process after the other; each must have equally many."""
        if self.n == 1:
            return rows
        reached = self._reached(rows).contiguous()
        gathered = reached.new_empty(self.n * reached.shape[0], *reached.shape[1:])
        dist.all_gather(list(gathered.chunk(self.n)), reached)
        return gathered.to(rows.device)

    def deal(self, rows: Sequence[Tensor]) -> Tensor | None:
        """Send a tensor to each of the first processes; what all processes sent to this one.

        Args:
            rows: for each receiver; their shapes are the same, also in the other processes.

        Returns:
            The rows of all processes, one after the other; None if this process receives nothing.
        """
        sent, n_rows = self._reached(torch.cat(tuple(rows))), rows[0].shape[0]
        receives = self.rank < len(rows)
        received = sent.new_empty(n_rows * self.n if receives else 0, *sent.shape[1:])
        dist.all_to_all_single(
            received,
            sent,
            [n_rows if receives else 0] * self.n,
            [n_rows if rank < len(rows) else 0 for rank in range(self.n)],
        )
        return received.to(rows[0].device) if receives else None

    def wait(self) -> None:
        """Go on when all processes have come this far."""
        if self.n > 1:
            dist.barrier()

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reached = self._reached(tensor)
        dist.all_reduce(reached, operation)
        return tensor.copy_(reached)

    def _reached(self, tensor: Tensor) -> Tensor:
        """The tensor where the backend can reach it."""
        return tensor if self._device is None else tensor.to(self._device)
