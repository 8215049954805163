"""Weights, gradients and optimizer state divided among processes: PyTorch's FSDP2."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.parallel.layout import Layout, gradients, rebuilt
from lorsa_lens.validation import ConfigError


class ShardedLayout(Layout):
    """Each process has a share of the rows of every parameter, and its share of every batch.

    The whole weights of one Lorsa at a time are put together for its forward and backward pass.
    """

    @override
    def place(self, lorsa: Lorsa) -> Lorsa:
        kind = lorsa.W_O.device.type
        if kind == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ConfigError(
                f"parallel = 'sharded': PyTorch {torch.__version__} can do that on GPUs only; "
                "upgrade it, or use 'data', 'heads' or 'layers'"
            )
        lorsa = super().place(lorsa)
        mesh = init_device_mesh(kind, (self.members.n,))
        # Losses read the weights, too, so they stay put together until the backward pass.
        fully_shard(lorsa, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(lorsa, "outputs")
        return lorsa

    @override
    def settle(self, lorsa: Lorsa) -> None:
        assert isinstance(lorsa, FSDPModule)
        lorsa.reshard()

    @override
    def sum_gradients(self, lorsa: Lorsa) -> None:
        for gradient in gradients(lorsa):  # FSDP took the mean
            gradient.mul_(self.batch.n)

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
        chunks = whole.chunk(self.members.n)  # so FSDP divides rows
        rank = self.members.rank
        rows = chunks[rank] if rank < len(chunks) else whole[:0]
        return DTensor.from_local(
            rows.to(like.device),
            like.device_mesh,
            [Shard(0)],
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
