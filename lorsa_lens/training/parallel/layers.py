"""The layers of a run divided among processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.parallel.exchange import exchanged
from lorsa_lens.training.parallel.layout import Layout, Numbers
from lorsa_lens.training.parts import Part
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.validation import ConfigError


class LayersLayout(Layout):
    """Each process trains some of the layers, and sees every batch of them as a whole.

    The layers go round: the first process has the first of the run, the second one the second, ...
    """

    def __init__(self) -> None:
        super().__init__()
        self.members = self.batch = Ranks.alone()

    @override
    def trained(self, layers: Sequence[int]) -> list[int]:
        if len(layers) < self.world.n:
            raise ConfigError(
                f"parallel = 'layers' with {self.world.n} processes, but {len(layers)} layers: "
                "start at most one process for each layer"
            )
        return list(layers[self.world.rank :: self.world.n])

    @override
    def deliver(
        self,
        batches: Sequence[tuple[Mapping[int, AttentionRecord], Tensor]],
        layers: Sequence[int],
    ) -> Iterator[tuple[int, list[Part]]]:
        rank, n = self.world.rank, self.world.n
        for start in range(0, len(layers), n):
            dealt = layers[start : start + n]
            received = []
            for records, counted in batches:
                sent = [Part(records[layer], counted) for layer in dealt]
                own = sent[rank] if rank < len(dealt) else None
                received.append(exchanged(sent, own, self.world, self.world.deal))
            parts = [part for part in received if part is not None]
            if parts:
                yield dealt[rank], parts

    @override
    def of_all(self, numbers: Mapping[int, Numbers], layers: Sequence[int]) -> dict[int, Numbers]:
        own: Any = next(iter(numbers.values()))
        elsewhere = own._make([0.0] * len(own))
        rows = [numbers.get(layer, elsewhere) for layer in layers]
        table = self.world.sum(torch.tensor(rows, dtype=torch.float64))
        return {layer: own._make(row) for layer, row in zip(layers, table.tolist(), strict=True)}
