"""Dead heads start again, at tokens that the others explain badly.

After "Towards Monosemanticity" (Bricken et al., 2023, appendix on resampling), for heads that have
a source: a head is given the mean input that its circuit fetches at a token, and writes towards the
error there.
"""

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

MAX_SHARE = 0.05
"""At most this share of all heads starts again at once: more of them would upset the others."""

WRITTEN = 0.5
"""Share of the error that a head writes at the token that it is made from."""


@torch.no_grad()
def resample(
    lorsa: Lorsa,
    record: AttentionRecord,
    counted: Bool[Tensor, "batch pos"],
    dead: Bool[Tensor, " ov_head"],
    generator: torch.Generator,
) -> Int[Tensor, " resampled"]:
    """Give some dead heads new vectors, in place.

    Each takes a token, drawn in proportion to its squared error. With s what its circuit fetches
    there (`sum_k A[q, k] x_k`), m the mean input and e the error, the head gets
    `w_O = e / |e|` at the other heads' mean writing norm, and `w_V`, `b_V` such that it writes half
    of e there and nothing at an average token.

    Args:
        lorsa: what to change.
        record: what the layer received and returned, on the Lorsa's scale.
        counted: tokens that count.
        dead: which heads are dead.
        generator: for the draw.

    Returns:
        The heads that were changed.
    """
    heads = dead.nonzero().flatten().cpu()
    n_most = max(1, int(MAX_SHARE * len(dead)))
    heads = heads[torch.randperm(len(heads), generator=generator)[:n_most]].sort().values
    error = (record.out - lorsa(record.x, **record.context)) * counted[..., None]
    weights = error.double().square().sum(-1).flatten().cpu()
    if not len(heads) or not bool((weights > 0).any()):
        return heads[:0]
    tokens = torch.multinomial(weights, len(heads), replacement=True, generator=generator)
    rows, queries = tokens // record.x.shape[1], tokens % record.x.shape[1]
    fetched = _fetched(lorsa, record, heads // lorsa.cfg.group_size, rows, queries)
    mean = record.x[counted].mean(0)
    source, wanted = fetched - mean, error[rows, queries]
    norm = torch.linalg.vector_norm(lorsa.W_O[~dead], dim=-1).mean() if not dead.all() else 1.0
    lengths = torch.linalg.vector_norm(wanted, dim=-1, keepdim=True)
    lorsa.W_O[heads] = wanted / lengths * norm
    z = WRITTEN * lengths / norm
    reading = z * source / source.square().sum(-1, keepdim=True).clamp(min=1e-12)
    lorsa.W_V[heads] = reading
    lorsa.b_V[heads] = -(reading @ mean)
    return heads


def _fetched(
    lorsa: Lorsa, record: AttentionRecord, circuits: Tensor, rows: Tensor, queries: Tensor
) -> Float[Tensor, "resampled d_model"]:
    """What a circuit fetches at a query: the mean input, weighed by its pattern."""
    fetched = record.x.new_zeros(len(circuits), record.x.shape[-1])
    for circuit in sorted(set(circuits.tolist())):
        own = (circuits == circuit).nonzero().flatten()
        part = record.batch(rows[own])
        pattern = lorsa.pattern(part.x, [circuit], **part.context)[:, 0]
        at_query = pattern[torch.arange(len(own)), queries[own]]
        fetched[own] = einsum(at_query, part.x, "head key, head key d_model -> head d_model")
    return fetched


def forget(optimizer: torch.optim.Optimizer, lorsa: Lorsa, heads: Bool[Tensor, " ov_head"]) -> None:
    """Forget what the optimizer knows of some heads, in place."""
    for parameter in (lorsa.W_V, lorsa.b_V, lorsa.W_O):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                optimizer.state[parameter][name][heads] = 0
