"""Weights, gradients and optimizer state that are divided among processes: PyTorch's DTensors."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.parallel.layout import Layout, rebuilt


class DividedLayout(Layout):
    """Parameters are DTensors: each process has some of their rows, or all of a small one."""

    def mesh(self, lorsa: Lorsa) -> DeviceMesh:
        """The devices of the processes that train a Lorsa together."""
        return init_device_mesh(lorsa.W_O.device.type, (self.members.n,))

    @override
    def grad_norm(self, lorsa: Lorsa) -> Tensor:
        return _full(super().grad_norm(lorsa))

    @override
    def whole(self, name: str, tensor: Tensor) -> Tensor:
        return _full(tensor).cpu() if isinstance(tensor, DTensor) else tensor

    @override
    def share(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or whole.ndim == 0:
            return whole
        own, rank = whole, self.members.rank
        if any(isinstance(placement, Shard) for placement in like.placements):
            chunks = whole.chunk(self.members.n)  # so DTensors divide rows
            own = chunks[rank] if rank < len(chunks) else whole[:0]
        return DTensor.from_local(
            own.to(like.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    @override
    def collected(self, lorsa: Lorsa) -> Lorsa | None:
        return rebuilt(self, lorsa)


def _full(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    full: Tensor = tensor.full_tensor()
    return full
