"""The heads of every Lorsa divided among processes: tensor parallel."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.parallel.divided import DividedLayout
from lorsa_lens.training.parallel.exchange import exchanged
from lorsa_lens.training.parallel.head_shard import OF_NO_HEAD, HeadShard
from lorsa_lens.training.parts import Part
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.validation import ConfigError


class HeadsLayout(DividedLayout):
    """Each process has its heads of every Lorsa, and sees every batch as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = Ranks.alone()

    @override
    def place(self, lorsa: Lorsa) -> Lorsa:
        cfg, n = lorsa.cfg, self.members.n
        if cfg.n_qk_heads % n:
            raise ConfigError(
                f"parallel = 'heads' with {n} processes: n_qk_heads = {cfg.n_qk_heads} must be a "
                f"multiple of {n}, since each process has whole query-key circuits"
            )
        if cfg.qk_norm == "full":
            raise ConfigError(
                f"parallel = 'heads': layer {cfg.layer} normalizes the queries of all heads "
                "together, so they cannot be divided; use 'data', 'sharded' or 'layers'"
            )
        shard = HeadShard(super().place(lorsa), self.members)
        mesh = self.mesh(shard)
        for name, parameter in list(shard.named_parameters()):
            placement = Replicate() if name in OF_NO_HEAD else Shard(0)
            rows = DTensor.from_local(parameter.detach(), mesh, [placement], run_check=False)
            setattr(shard, name, nn.Parameter(rows))
        return shard

    @override
    def own_heads(self, lorsa: Lorsa) -> slice:
        n_own, rank = lorsa.cfg.n_ov_heads // self.members.n, self.members.rank
        return slice(rank * n_own, (rank + 1) * n_own)

    @override
    def deliver(
        self,
        batches: Sequence[tuple[Mapping[int, AttentionRecord], Tensor]],
        layers: Sequence[int],
    ) -> Iterator[tuple[int, list[Part]]]:
        for layer, parts in super().deliver(batches, layers):
            yield layer, [self._gathered(part) for part in parts]

    def _gathered(self, part: Part) -> Part:
        whole = exchanged([part], part, self.world, lambda rows: self.world.gather(rows[0]))
        assert whole is not None
        return whole
