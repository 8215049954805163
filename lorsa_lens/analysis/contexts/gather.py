"""One layer's part in a pass over a corpus: statistics of its heads, and the contexts they keep."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lorsa_lens.analysis.contexts.kept import Kept
from lorsa_lens.analysis.reading import Reading, read
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

SITES_AT_A_TIME = 2**13
"""Activations whose z patterns are held at once."""


class Sizes(NamedTuple):
    """How much is kept."""

    n_top: int
    n_sampled: int
    n_pos: int


@dataclass
class LayerHeads:
    """Sums over a corpus for every head of a layer, and its kept contexts."""

    n_active: Float[Tensor, " head"]
    """Tokens at which the head stays."""
    size: Float[Tensor, " head"]
    """Sum over keys and tokens of `|A v|`: the weight of the two sums below."""
    offset: Float[Tensor, " head"]
    """Sum of `|A v|` times the distance from key to query."""
    first: Float[Tensor, " head"]
    """Sum of `|A v|` at the first token."""
    energy: Float[Tensor, " head"]
    """Sum of `(z ||w_O||)^2`."""
    top: Kept
    """Contexts with the largest `|z|`."""
    sample: Kept
    """Contexts drawn alike from all in which the head stays."""

    SUMS = ("n_active", "size", "offset", "first", "energy")

    @classmethod
    def empty(cls, n_heads: int, sizes: Sizes) -> "LayerHeads":
        """Nothing yet."""
        sums = {name: torch.zeros(n_heads, dtype=torch.float64) for name in cls.SUMS}
        top = Kept.empty(n_heads, sizes.n_top, sizes.n_pos)
        return cls(**sums, top=top, sample=Kept.empty(n_heads, sizes.n_sampled, sizes.n_pos))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        sums = {f"{prefix}.{name}": getattr(self, name) for name in self.SUMS}
        return sums | self.top.tensors(f"{prefix}.top") | self.sample.tensors(f"{prefix}.sample")

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "LayerHeads":
        """What `tensors` gave."""
        sums = {name: tensors[f"{prefix}.{name}"] for name in cls.SUMS}
        top, sample = (Kept.from_tensors(tensors, f"{prefix}.{k}") for k in ("top", "sample"))
        return cls(**sums, top=top, sample=sample)

    @torch.no_grad()
    def add(
        self,
        lorsa: Lorsa,
        record: AttentionRecord,
        counted: Bool[Tensor, "batch pos"],
        first_context: int,
        seed: int,
    ) -> None:
        """Take in some contexts.

        Args:
            lorsa: the layer's.
            record: what the layer received.
            counted: queries that count.
            first_context: number of the first context in the corpus.
            seed: for the sample.
        """
        reading = read(lorsa, record.seen_by(lorsa))
        values, heads = reading.code
        stays = (values != 0) & counted[..., None].to(values.device)
        rows_of = _Rows(reading, lorsa.cfg.group_size)
        self._add_sums(lorsa, reading, rows_of, stays)
        code = reading.code._replace(values=values.masked_fill(~stays, 0.0), indices=heads)
        acts = to_dense(code, lorsa.cfg.n_ov_heads).cpu()
        size, query = acts.abs().max(dim=1)
        activation = acts.gather(1, query[:, None]).squeeze(1)
        nothing = size == 0
        layer = lorsa.cfg.layer or 0
        for kept, rank in (
            (self.top, size),
            (self.sample, _random_ranks(size, first_context, seed, layer)),
        ):
            rank = rank.masked_fill(nothing, -torch.inf)
            new = kept.offer(rank, first_context, query, activation)
            _fill_z_patterns(kept, new, rows_of, first_context)

    def _add_sums(self, lorsa: Lorsa, reading: Reading, rows_of: "_Rows", stays: Tensor) -> None:
        batch, query, slot = torch.nonzero(stays, as_tuple=True)
        heads = reading.code.indices[batch, query, slot]
        acts = reading.code.values[batch, query, slot].double()
        energy = (acts * writing_norms(lorsa.W_O).double()[heads]).square()
        keys = torch.arange(reading.pattern.shape[-1], device=heads.device).to(acts.dtype)
        weights = torch.stack((torch.ones_like(keys), keys, (keys == 0).to(keys)), dim=1)
        for sites in torch.split(torch.arange(len(heads), device=heads.device), SITES_AT_A_TIME):
            rows, at, which = batch[sites], query[sites], heads[sites]
            sizes = rows_of.z_patterns(rows, at, which).abs()
            size, key, first = (sizes @ weights.to(sizes)).double().unbind(1)
            columns = {
                "n_active": torch.ones_like(size),
                "size": size,
                "offset": size * at - key,
                "first": first,
                "energy": energy[sites],
            }
            for name, column in columns.items():
                getattr(self, name).index_add_(0, which.cpu(), column.cpu())


class _Rows:
    """Z patterns of chosen heads, each at one position of one context."""

    def __init__(self, reading: Reading, group_size: int) -> None:
        self.pattern, self.group_size = reading.pattern, group_size
        self.values = rearrange(reading.values, "b k head -> b head k").contiguous()

    def z_patterns(self, batch: Tensor, query: Tensor, heads: Tensor) -> Float[Tensor, "site key"]:
        """A row for each of some sites."""
        pattern = self.pattern[batch, heads // self.group_size, query]
        return pattern.mul_(self.values[batch, heads])


def _fill_z_patterns(kept: Kept, new: Tensor, rows_of: _Rows, first_context: int) -> None:
    """Fill in the z patterns of slots that are new."""
    head, slot = torch.nonzero(new, as_tuple=True)
    device = rows_of.pattern.device
    for sites in torch.split(torch.arange(len(head)), SITES_AT_A_TIME):
        which, where = head[sites], slot[sites]
        batch = kept.context[which, where] - first_context
        query = kept.query[which, where]
        rows = rows_of.z_patterns(*(index.to(device) for index in (batch, query, which)))
        kept.z_pattern[which, where] = rows.cpu().to(torch.float16)


def _random_ranks(
    like: Float[Tensor, "context head"], first_context: int, seed: int, layer: int
) -> Float[Tensor, "context head"]:
    """Random numbers that depend on seed, layer, context and head only."""
    n_contexts, n_heads = like.shape
    rows = [
        np.random.default_rng([seed, layer, context]).random(n_heads, dtype=np.float32)
        for context in range(first_context, first_context + n_contexts)
    ]
    return torch.from_numpy(np.stack(rows))
