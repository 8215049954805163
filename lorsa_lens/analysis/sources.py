"""How much of what a head writes comes from a given source token.

The z pattern `A[q, k] v[k]` of a rank-1 head says which tokens it fetched from; its share on a
known source is what these scores measure, weighed by the energy `(z ||w_O||)^2` of the head at
each query, so that queries at which the head does not stay do not count.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.functional.attention import mix_values
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

MIN_SHARE = 0.5
"""A head is named after a relation if at least this share of its z pattern lies on the source..."""

MIN_ENERGY = 0.5
"""... and at least this share of its energy falls on queries that have such a source..."""

MIN_QUERIES = 10
"""... and it stays at no fewer such queries than this."""


@dataclass(frozen=True)
class SourceScores:
    """How every head of a Lorsa relates to one kind of source."""

    share: Float[Tensor, " ov_head"]
    """Share of the absolute z pattern on the source, averaged over queries by energy."""

    energy: Float[Tensor, " ov_head"]
    """Share of the head's energy at queries that have a source; 0 for a dead head."""

    strength: Float[Tensor, " ov_head"]
    """The head's energy at queries that have a source, per such query."""

    n_queries: Int[Tensor, " ov_head"]
    """Queries that have a source and at which the head stays."""

    def heads(
        self,
        min_share: float = MIN_SHARE,
        min_energy: float = MIN_ENERGY,
        min_queries: int = MIN_QUERIES,
    ) -> list[int]:
        """Heads that do little else than fetch from this source, strongest first."""
        named = (self.share >= min_share) & (self.energy >= min_energy)
        named &= self.n_queries >= min_queries
        order = self.strength.argsort(descending=True, stable=True).tolist()
        return [head for head in order if named[head]]

    def mean_share(self, heads: Sequence[int]) -> float:
        """Share of the z pattern on the source over some heads, by their energy there.

        Not a number if none of them stays at a query that has a source.
        """
        chosen = list(heads)
        weights = self.strength[chosen]
        return float((self.share[chosen] * weights).sum() / weights.sum())


@torch.no_grad()
def source_scores(
    lorsa: Lorsa,
    record: AttentionRecord,
    sources: Mapping[str, Int[Tensor, "batch pos"]],
    *,
    batch_size: int = 16,
) -> dict[str, SourceScores]:
    """Score every head against several kinds of source in one pass.

    Args:
        lorsa: whose heads.
        record: what the layer received, from `record_attention`.
        sources: by name, the position of each token's source, -1 where it has none.
        batch_size: sequences at a time.

    Raises:
        ValueError: if the positions of a source are not those of the record's sequences.
    """
    for name, positions in sources.items():
        _check_shape(f"sources[{name!r}]", positions, record)
    n_heads, device = lorsa.cfg.n_ov_heads, lorsa.W_O.device
    total = torch.zeros(n_heads, dtype=torch.float64, device=device)
    on_queries = {name: torch.zeros_like(total) for name in sources}
    on_source = {name: torch.zeros_like(total) for name in sources}
    n_queries = {name: torch.zeros_like(total, dtype=torch.long) for name in sources}
    for rows, part in _batches(lorsa, record, batch_size):
        energy = _energy(lorsa, part)
        total += energy.sum((0, 1))
        pattern, values = _pattern_and_values(lorsa, part)
        magnitude = mix_values(pattern, values)
        for name, positions in sources.items():
            batch, query = torch.nonzero(positions[rows] >= 0, as_tuple=True)
            source = positions[rows][batch, query]
            weight = repeat(
                pattern[batch, :, query, source], "n c -> n (c g)", g=lorsa.cfg.group_size
            )
            share = weight * values[batch, source] / magnitude[batch, query].clamp(min=1e-30)
            on_queries[name] += energy[batch, query].sum(0)
            n_queries[name] += (energy[batch, query] > 0).sum(0)
            on_source[name] += (energy[batch, query] * share).sum(0)
    return {
        name: SourceScores(
            share=(on_source[name] / on_queries[name].clamp(min=1e-30)).float(),
            energy=(on_queries[name] / total.clamp(min=1e-30)).float(),
            strength=(on_queries[name] / max(1, int((positions >= 0).sum()))).float(),
            n_queries=n_queries[name],
        )
        for name, positions in sources.items()
    }


@torch.no_grad()
def activity_f1(
    lorsa: Lorsa,
    record: AttentionRecord,
    heads: Sequence[int],
    queries: Bool[Tensor, "batch pos"],
    *,
    batch_size: int = 16,
) -> float:
    """F1 of "one of the heads stays at this token" as a detector of some queries.

    Args:
        lorsa: whose heads.
        record: what the layer received.
        heads: which heads, taken together.
        queries: the tokens to detect.
        batch_size: sequences at a time.

    Raises:
        ValueError: if `queries` are not the tokens of the record's sequences.
    """
    _check_shape("queries", queries, record)
    hits = guesses = 0
    for rows, part in _batches(lorsa, record, batch_size):
        active = (_energy(lorsa, part)[..., list(heads)] > 0).any(-1)
        hits += int((active & queries[rows].to(active.device)).sum())
        guesses += int(active.sum())
    return 2 * hits / max(1, guesses + int(queries.sum()))


def _batches(
    lorsa: Lorsa, record: AttentionRecord, size: int
) -> Iterator[tuple[slice, AttentionRecord]]:
    for start in range(0, record.x.shape[0], size):
        rows = slice(start, start + size)
        yield rows, record.batch(rows).seen_by(lorsa)


def _check_shape(name: str, tensor: Tensor, record: AttentionRecord) -> None:
    if tensor.shape != record.x.shape[:2]:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but the record has [batch, pos] = "
            f"{list(record.x.shape[:2])}"
        )


def _energy(lorsa: Lorsa, part: AttentionRecord) -> Float[Tensor, "batch pos ov_head"]:
    code = lorsa.encode(part.x, **part.context)
    acts = to_dense(code, lorsa.cfg.n_ov_heads).double()
    return (acts * writing_norms(lorsa.W_O)).square()


def _pattern_and_values(
    lorsa: Lorsa, part: AttentionRecord
) -> tuple[Float[Tensor, "batch circuit query key"], Float[Tensor, "batch key ov_head"]]:
    """Patterns of all circuits, and the absolute values of all heads."""
    pattern = lorsa.pattern(part.x, range(lorsa.cfg.n_qk_heads), **part.context)
    values = torch.nn.functional.linear(part.x, lorsa.W_V, lorsa.b_V)
    return pattern.to(values.dtype), values.abs()


def head_name(layer: int | None, head: int) -> str:
    """`L1.42`: head 42 of layer 1."""
    return f"L{layer}.{head}" if layer is not None else str(head)
