"""Weights, gradients and optimizer state divided among processes: PyTorch's FSDP2."""

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from typing_extensions import override

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.parallel.divided import DividedLayout
from lorsa_lens.training.parallel.layout import gradients
from lorsa_lens.validation import ConfigError


class ShardedLayout(DividedLayout):
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
        # Losses read the weights, too, so they stay put together until the backward pass.
        fully_shard(lorsa, mesh=self.mesh(lorsa), reshard_after_forward=False)
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
