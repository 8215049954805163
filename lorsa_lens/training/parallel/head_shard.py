"""Some heads of a Lorsa whose other heads are in other processes."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lorsa_lens.functional.code import Code, compact
from lorsa_lens.functional.selection import select_topk
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.ranks import Ranks

OF_NO_HEAD = frozenset({"b_O", "threshold"})
"""Parameters and buffers that every process has whole."""


class HeadShard(Lorsa):
    """An equal share of the query-key circuits of a Lorsa, each with its rank-1 heads.

    All processes see the same input. Each computes its own heads; they exchange the scores of those
    that may be selected, and sum what the selected ones write. Every gradient of an own head is
    exact without more exchange: a head adds to the sum, and the gradient of a sum is the same for
    all terms. `cfg` is that of the whole Lorsa; head numbers, and the shapes of parameters and
    codes, count own heads only.

    Args:
        lorsa: the whole.
        ranks: the processes that share it.
    """

    def __init__(self, lorsa: Lorsa, ranks: Ranks) -> None:
        super().__init__(lorsa.cfg, device="meta")
        self.ranks = ranks
        for name, parameter in lorsa.named_parameters():
            rows = parameter.detach()
            own = rows if name in OF_NO_HEAD else rows.chunk(ranks.n)[ranks.rank]
            setattr(self, name, nn.Parameter(own.clone()))
        for name, buffer in lorsa.named_buffers():
            setattr(self, name, buffer.clone())

    @override
    def __getattr__(self, name: str) -> Any:
        """Parameters may be DTensors: what is computed with is this process's part of them."""
        value = super().__getattr__(name)
        return value.to_local() if isinstance(value, DTensor) else value

    @override
    def top(
        self,
        acts: Float[Tensor, "batch pos ov_head"],
        norms: Float[Tensor, " ov_head"],
        k: int,
        *,
        positive: bool = False,
    ) -> Code:
        own = select_topk(acts, norms, min(k, acts.shape[-1]), positive=positive)
        scores = own.values.detach().abs() * norms[own.indices]
        offered = F.pad(scores, (0, k - scores.shape[-1]), value=-1.0)  # -1: no head
        of_all = rearrange(self.ranks.gather(offered[None]), "rank b s k -> b s (rank k)")
        chosen = of_all.topk(k, dim=-1, sorted=False).indices
        stays = torch.zeros_like(of_all, dtype=torch.bool).scatter_(-1, chosen, True)
        first = self.ranks.rank * k
        values, slots = compact(own.values, stays[..., first : first + scores.shape[-1]])
        return Code(values, own.indices.gather(-1, slots))

    @override
    def batch_threshold(
        self,
        acts: Float[Tensor, "batch pos ov_head"],
        norms: Float[Tensor, " ov_head"],
        k: int,
    ) -> Float[Tensor, ""]:
        scores = (acts.detach().abs() * norms).flatten()
        n_kept = k * acts.shape[0] * acts.shape[1]
        offered = scores.topk(min(n_kept, scores.numel()), sorted=False).values
        return self.ranks.gather(offered).topk(n_kept, sorted=False).values.min()

    @override
    def over_heads(self, part: Tensor) -> Tensor:
        return cast(Tensor, _SumOverProcesses.apply(part, self.ranks))  # type: ignore[no-untyped-call]

    @override
    def _slopes(self) -> Tensor | None:
        slopes = super()._slopes()
        return None if slopes is None else slopes.chunk(self.ranks.n)[self.ranks.rank]


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' terms; each term has the gradient of the sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor, ranks: Ranks) -> Tensor:
        del ctx
        return ranks.sum(part.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None
