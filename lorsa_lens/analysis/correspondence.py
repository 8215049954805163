"""Lorsa heads beside the attention heads they came from, and beside an SAE's features.

A layer's output splits exactly into what its attention heads write. Along the writing vector of a
Lorsa head, each attention head has its share of it (arXiv 2504.20938 asks how many attention heads
a Lorsa head spans).
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.reading import read
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.analysis.tables import table
from lorsa_lens.functional.code import to_dense
from lorsa_lens.hosts import host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord

if TYPE_CHECKING:
    from pandas import DataFrame

SPANNED = 0.9
"""A Lorsa head spans the fewest attention heads that carry this much of its shares in size."""


@torch.no_grad()
def head_shares(
    model: nn.Module, lorsa: Lorsa, record: AttentionRecord, *, batch_size: int = 16
) -> Float[Tensor, "ov_head attention_head"]:
    """Share of each attention head in what a layer writes where each Lorsa head is active.

    With `y_h` what attention head h writes, its share in Lorsa head i is `sum_t z_i y_h . w_O^i`
    over all tokens, divided by the sum over h. A row sums to 1; shares can be negative, where a
    head writes against the others. Value biases are constants and belong to no head.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: of a layer of the model.
        record: what that layer received, from `record_attention`.
        batch_size: sequences at a time.

    Returns:
        Shares; not numbers for a head that is never active.

    Raises:
        ValueError: if a norm stands between attention heads and what the Lorsa writes.
    """
    layer = _layer_of(lorsa)
    if lorsa.cfg.output_site == "hook_attn_out" and host_of(model).post_norm(layer) is not None:
        raise ValueError(
            f"the Lorsa of layer {layer} writes after a norm, which does not split into attention "
            "heads: make one with output_site='attn_out'"
        )
    exact = Lorsa.from_attention(model, layer)
    moments = torch.zeros(lorsa.cfg.n_ov_heads, exact.cfg.n_ov_heads, dtype=torch.float64)
    for start in range(0, record.x.shape[0], batch_size):
        part = record.batch(slice(start, start + batch_size))
        seen, own = part.seen_by(lorsa), part.seen_by(exact)
        acts = to_dense(lorsa.encode(seen.x, **seen.context), lorsa.cfg.n_ov_heads).double()
        dims = exact.outputs(own.x, **own.context).acts_pre.double()
        moments += einsum(acts, dims, "b s i, b s d -> i d").cpu()
    aligned = lorsa.W_O.double().cpu() @ exact.W_O.double().cpu().T
    carried = reduce(moments * aligned, "i (head d) -> i head", "sum", head=exact.cfg.n_qk_heads)
    return carried / carried.sum(1, keepdim=True)


def effective_heads(
    shares: Float[Tensor, "ov_head attention_head"],
) -> Float[Tensor, " ov_head"]:
    """Effective number of attention heads behind each Lorsa head: `1 / sum_h p_h^2`.

    `p` are the sizes of its shares, made to sum to 1.
    """
    sizes = shares.abs() / shares.abs().sum(1, keepdim=True)
    return 1 / sizes.square().sum(1)


def spanned_heads(
    shares: Float[Tensor, "ov_head attention_head"], mass: float = SPANNED
) -> Int[Tensor, " ov_head"]:
    """How many attention heads each Lorsa head spans, 0 for one that is never active.

    Args:
        shares: from `head_shares`.
        mass: the heads counted are the fewest that carry this much of the shares in size.
    """
    sizes = shares.abs() / shares.abs().sum(1, keepdim=True)
    before = sizes.sort(dim=1, descending=True).values.cumsum(1).roll(1, dims=1)
    before[:, 0] = 0.0
    return (before < mass - 1e-12).sum(1).masked_fill(shares.isnan().any(1), 0)


def correspondence(
    model: nn.Module, lorsa: Lorsa, record: AttentionRecord, *, batch_size: int = 16
) -> "DataFrame":
    """A row for each Lorsa head: where it came from in the attention heads.

    Args:
        model: as for `head_shares`.
        lorsa: as for `head_shares`.
        record: as for `head_shares`.
        batch_size: as for `head_shares`.

    Returns:
        `top_head` and `top_share`: the attention head with the largest share; `effective_heads`,
        `spanned_heads`; `share_0`, `share_1`, ...: all shares. Heads that are never active have
        no numbers.
    """
    shares = head_shares(model, lorsa, record, batch_size=batch_size)
    known = shares.nan_to_num(0.0)
    layer, n_heads = _layer_of(lorsa), shares.shape[0]
    columns: dict[str, Any] = {
        "layer": [layer] * n_heads,
        "head": list(range(n_heads)),
        "name": [head_name(layer, head) for head in range(n_heads)],
        "top_head": known.argmax(1).tolist(),
        "top_share": shares.gather(1, known.argmax(1, keepdim=True))[:, 0].tolist(),
        "effective_heads": effective_heads(shares).tolist(),
        "spanned_heads": spanned_heads(shares).tolist(),
    }
    columns |= {f"share_{head}": shares[:, head].tolist() for head in range(shares.shape[1])}
    return table(columns)


def span_histogram(frame: "DataFrame") -> "DataFrame":
    """How many active Lorsa heads span one attention head, two, three, ..., and which share of all.

    Args:
        frame: from `correspondence`, of one layer or of several.
    """
    spanned = frame["spanned_heads"][frame["spanned_heads"] > 0]
    counts = spanned.value_counts().sort_index()
    return table(
        {
            "spanned_heads": counts.index.tolist(),
            "n_heads": counts.tolist(),
            "share": (counts / max(1, len(spanned))).tolist(),
        }
    )


@torch.no_grad()
def circuit_overlap(
    model: nn.Module, lorsa: Lorsa, record: AttentionRecord, *, batch_size: int = 16
) -> "DataFrame":
    """Query-key circuits beside attention heads: a row for each pair.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: of a layer of the model.
        record: what that layer received.
        batch_size: sequences at a time.

    Returns:
        `pattern_distance`: total variation distance of their patterns, half the sum of absolute
        differences, averaged over queries: 0 for the same pattern, 1 for none in common.
        `weight_cosine`: cosine of the two forms `W_Q W_K^T`, positions and biases left aside.
    """
    layer = _layer_of(lorsa)
    exact = Lorsa.from_attention(model, layer)
    n_circuits, n_heads = lorsa.cfg.n_qk_heads, exact.cfg.n_qk_heads
    distances, n_queries = torch.zeros(n_circuits, n_heads, dtype=torch.float64), 0
    for start in range(0, record.x.shape[0], batch_size):
        part = record.batch(slice(start, start + batch_size))
        seen, own = part.seen_by(lorsa), part.seen_by(exact)
        circuits = read(lorsa, seen).pattern
        heads = exact.pattern(own.x, range(n_heads), **own.context).to(circuits)
        for head in range(n_heads):
            gaps = (circuits - heads[:, head : head + 1]).abs().sum((0, 2, 3)) / 2
            distances[:, head] += gaps.double().cpu()
        n_queries += circuits.shape[0] * circuits.shape[2]
    distances /= n_queries
    cosines = _form_cosines(lorsa, exact)
    pairs = [(circuit, head) for circuit in range(n_circuits) for head in range(n_heads)]
    return table(
        {
            "layer": [layer] * len(pairs),
            "circuit": [circuit for circuit, _ in pairs],
            "attention_head": [head for _, head in pairs],
            "pattern_distance": distances.flatten().tolist(),
            "weight_cosine": cosines.flatten().tolist(),
        }
    )


def _form_cosines(lorsa: Lorsa, exact: Lorsa) -> Float[Tensor, "circuit head"]:
    """Cosines of `W_Q W_K^T`, by way of the small products of factors."""

    def products(one: Lorsa, other: Lorsa) -> Tensor:
        sides = [
            einsum(a.double(), b.double(), "i m d, j m e -> i j d e")
            for a, b in ((one.W_Q, other.W_Q), (one.W_K, other.W_K))
        ]
        return (sides[0] * sides[1]).sum((2, 3)).cpu()

    norms = (products(one, one).diagonal().sqrt() for one in (lorsa, exact))
    own, others = norms
    return products(lorsa, exact) / (own[:, None] * others[None, :])


@runtime_checkable
class FeatureDictionary(Protocol):
    """What is needed of an SAE on the layer's output: SAELens's have it."""

    W_dec: Any
    """Decoder [feature, d_model]."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., feature] of the output."""
        ...


@torch.no_grad()
def match_features(
    lorsa: Lorsa, record: AttentionRecord, sae: FeatureDictionary, *, batch_size: int = 16
) -> "DataFrame":
    """For each Lorsa head the features of an attention-output SAE that are most like it.

    Args:
        lorsa: of the layer whose output the SAE reads.
        record: what that layer received and returned.
        sae: an SAE of SAELens, or anything with `W_dec` and `encode`.
        batch_size: sequences at a time.

    Returns:
        `decoder_feature` and `decoder_cosine`: the feature whose decoder vector is nearest to
        `w_O` in direction, either way; `active_feature` and `correlation`: the one whose
        activations correlate most with z over tokens.

    Raises:
        ValueError: if the SAE's width is not that of the model.
    """
    decoder = torch.as_tensor(sae.W_dec).detach().double().cpu()
    if decoder.ndim != 2 or decoder.shape[1] != lorsa.cfg.d_model:
        raise ValueError(
            f"sae.W_dec has shape {list(decoder.shape)}, but the model's d_model is "
            f"{lorsa.cfg.d_model}: give an SAE on the output of this attention layer"
        )
    cosines = (
        nn.functional.normalize(lorsa.W_O.double().cpu(), dim=1)
        @ nn.functional.normalize(decoder, dim=1).T
    )
    correlations = _correlations(lorsa, record, sae, len(decoder), batch_size)
    near, alike = cosines.abs().argmax(1), correlations.argmax(1)
    layer, n_heads = lorsa.cfg.layer, lorsa.cfg.n_ov_heads
    return table(
        {
            "layer": [layer] * n_heads,
            "head": list(range(n_heads)),
            "name": [head_name(layer, head) for head in range(n_heads)],
            "decoder_feature": near.tolist(),
            "decoder_cosine": cosines.gather(1, near[:, None])[:, 0].tolist(),
            "active_feature": alike.tolist(),
            "correlation": correlations.gather(1, alike[:, None])[:, 0].tolist(),
        }
    )


def _correlations(
    lorsa: Lorsa, record: AttentionRecord, sae: FeatureDictionary, n_features: int, batch_size: int
) -> Float[Tensor, "ov_head feature"]:
    """Pearson correlations of z with feature activations; 0 where one of them never varies."""
    n_heads, n_tokens = lorsa.cfg.n_ov_heads, 0
    sums = [torch.zeros(n, dtype=torch.float64) for n in (n_heads, n_features)]
    squares = [torch.zeros(n, dtype=torch.float64) for n in (n_heads, n_features)]
    products = torch.zeros(n_heads, n_features, dtype=torch.float64)
    for start in range(0, record.x.shape[0], batch_size):
        part = record.batch(slice(start, start + batch_size)).seen_by(lorsa)
        acts = to_dense(lorsa.encode(part.x, **part.context), n_heads)
        flat = [
            rearrange(tensor, "b s n -> (b s) n").double().cpu()
            for tensor in (acts, sae.encode(part.out).detach())
        ]
        n_tokens += len(flat[0])
        products += flat[0].T @ flat[1]
        for index, values in enumerate(flat):
            sums[index] += values.sum(0)
            squares[index] += values.square().sum(0)
    means = [total / n_tokens for total in sums]
    deviations = [
        (square / n_tokens - mean.square()).clamp(min=0).sqrt()
        for square, mean in zip(squares, means, strict=True)
    ]
    covariance = products / n_tokens - means[0][:, None] * means[1][None, :]
    scale = deviations[0][:, None] * deviations[1][None, :]
    return torch.where(scale > 0, covariance / scale.clamp(min=1e-30), 0.0)


def _layer_of(lorsa: Lorsa) -> int:
    if lorsa.cfg.layer is None:
        raise ValueError("the Lorsa's cfg.layer is None: say which layer it belongs to")
    return lorsa.cfg.layer
