"""The plain layout: each process has whole Lorsas, and its share of every batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.parts import Part
from lorsa_lens.training.ranks import Ranks

Numbers = TypeVar("Numbers")
"""A named tuple."""


class Layout:
    """How the Lorsas of a run lie over its processes. This one: `parallel = "data"`.

    All methods but the properties are called by all processes together.
    """

    def __init__(self) -> None:
        self.world = Ranks()
        """All processes of the run."""
        self.members = self.world
        """Those that train a Lorsa together."""
        self.batch = self.world
        """Those of them among which its batch is divided."""

    # ------------------------------------------------------------------------------- placing

    def trained(self, layers: Sequence[int]) -> list[int]:
        """Which layers of a run this process trains.

        Raises:
            ConfigError: if the layers cannot be laid out over the processes.
        """
        return list(layers)

    def place(self, lorsa: Lorsa) -> Lorsa:
        """What this process trains of a Lorsa, which must not be used otherwise any more.

        Raises:
            ConfigError: if the Lorsa cannot be laid out over the processes.
        """
        self.members.of_first(parameter.data for parameter in lorsa.parameters())
        return lorsa

    def own_heads(self, lorsa: Lorsa) -> slice:
        """Which of the rank-1 heads this process computes."""
        del lorsa
        return slice(None)

    def deliver(
        self,
        batches: Sequence[tuple[Mapping[int, AttentionRecord], Tensor]],
        layers: Sequence[int],
    ) -> Iterator[tuple[int, list[Part]]]:
        """For each layer that this process trains: what it is to see of a step's batch.

        Args:
            batches: the parts of this process's share: for each layer a record, and the tokens
                that count, Bool[Tensor, "batch pos"].
            layers: those of the run.
        """
        for layer in layers:
            yield layer, [Part(records[layer], counted) for records, counted in batches]

    # ------------------------------------------------------------------------------- a step

    def settle(self, lorsa: Lorsa) -> None:
        """Parameters are as they were before a forward pass that no backward pass follows."""

    def sum_gradients(self, lorsa: Lorsa) -> None:
        """Make the gradients those of the whole batch, in place."""
        self.batch.sum_gradients(lorsa.parameters())

    def grad_norm(self, lorsa: Lorsa) -> Tensor:
        """The norm of the gradient of the whole Lorsa."""
        return torch.nn.utils.get_total_norm(gradients(lorsa), foreach=True)

    def agree(self, lorsa: Lorsa) -> None:
        """Make buffers, which follow each process's share of the batch, their mean, in place."""
        for buffer in lorsa.buffers():
            self.batch.sum(buffer).div_(self.batch.n)

    def of_all(self, numbers: Mapping[int, Numbers], layers: Sequence[int]) -> dict[int, Numbers]:
        """By layer, the named tuple of numbers of the process that trains it.

        Args:
            numbers: those of the layers that this process trains.
            layers: those of the run.
        """
        return {layer: numbers[layer] for layer in layers}

    # ------------------------------------------------------------------------------- files

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the layers that it trains."""
        return self.members.is_first

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, or something of its shape, of the whole Lorsa.

        Args:
            name: the parameter's.
            tensor: what this process has of it.
        """
        del name
        return tensor

    def share(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """What this process has of a whole tensor: the reverse of `whole`.

        Args:
            name: the parameter's.
            whole: the tensor.
            like: the parameter.
        """
        del name, like
        return whole

    def collected(self, lorsa: Lorsa) -> Lorsa | None:
        """The whole Lorsa; None in processes that do not get it."""
        return lorsa


def gradients(lorsa: Lorsa) -> list[Tensor]:
    """Those of the parameters that have one."""
    return [parameter.grad for parameter in lorsa.parameters() if parameter.grad is not None]


def rebuilt(layout: Layout, lorsa: Lorsa) -> Lorsa | None:
    """A divided Lorsa as a whole one, in the memory of the first process; None in the others."""
    tensors = {name: layout.whole(name, t) for name, t in lorsa.state_dict().items()}
    if not layout.writes:
        return None
    whole = Lorsa(lorsa.cfg, device="meta")
    whole.to_empty(device="cpu")
    whole.load_state_dict(tensors)
    return whole
