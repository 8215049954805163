"""The two ends of a host: tokens into the residual stream, and the stream out into logits.

All of it is found by calling the host's own modules, so that no version's weight names matter.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.hosts.base import Host

PROBE = 1e4
"""Size of the vectors that probe a norm: far above what it adds to the mean square."""

TOLERANCE = 1e-3
"""Relative rounding allowed in a probe."""


class FinalNorm(NamedTuple):
    """The norm before the unembedding: `gain * centre(x) / scale(x) + bias`."""

    gain: Float[Tensor, " d_model"]
    centres: bool
    scales: bool
    """False where there is no norm: then `scale` is 1."""


@torch.no_grad()
def final_norm(host: Host) -> FinalNorm:
    """What the host does to the residual stream before it unembeds it.

    Raises:
        ValueError: if a transformation stands between them that is no norm (BERT).
    """
    if hasattr(host.model, "mlm_head"):
        raise ValueError("the model transforms the residual stream before it unembeds it (BERT)")
    width, like = host.d_model, _like(host)
    module = getattr(host.model, "ln_final", None)
    ones = torch.ones(width, device=like.device, dtype=torch.float64)
    if module is None:
        return FinalNorm(ones, centres=False, scales=False)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(width, generator=generator, dtype=torch.float64)
    probe = ((probe - probe.mean()) * PROBE).to(ones)

    def out(x: Tensor) -> Tensor:
        normed: Tensor = module(x.to(like)[None, None])[0, 0]
        return normed.double()

    bias = out(torch.zeros_like(probe))
    once, twice, shifted = (out(x) - bias for x in (probe, 2 * probe, probe + PROBE))
    scales = bool((twice - once).norm() < TOLERANCE * once.norm())
    unit = probe / probe.square().mean().sqrt() if scales else probe
    centres = bool((shifted - once).norm() < TOLERANCE * once.norm())
    return FinalNorm(once / unit, centres, scales)


@torch.no_grad()
def logit_directions(
    host: Host, vectors: Float[Tensor, "head d_model"]
) -> Float[Tensor, "head d_vocab"]:
    """What vectors in the residual stream add to the logits, per unit of the final norm's scale.

    Exact where the model has no final norm; else, with its scale held fixed, in proportion.
    """
    norm, like = final_norm(host), _like(host)
    aimed = vectors.double()
    if norm.centres:
        aimed = aimed - aimed.mean(-1, keepdim=True)
    aimed = (aimed * norm.gain).to(like)
    unembed = host.model.unembed
    zero: Tensor = unembed(torch.zeros_like(aimed[None, :1]))
    logits: Tensor = unembed(aimed[None])[0] - zero[0]
    return logits.to(vectors.dtype)


@torch.no_grad()
def token_embeddings(host: Host) -> Float[Tensor, "d_vocab d_model"]:
    """What every token adds to the residual stream, positions not included."""
    tokens = torch.arange(int(host.model.cfg.d_vocab), device=_like(host).device)
    embedded: Tensor = host.model.embed(tokens[:, None])[:, 0]
    return embedded


@torch.no_grad()
def attention_input(
    host: Host, layer: int, resid: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What a layer's attention receives where this is the residual stream before it."""
    norm: Any = _norm_before(host, layer)
    received: Tensor = resid if norm is None else norm(resid)
    return received


def _norm_before(host: Host, layer: int) -> nn.Module | None:
    """The norm before attention; None where attention reads the stream itself."""
    block = host.block(layer)
    norm: nn.Module | None = getattr(block, "ln1", None)
    after = host.post_norm(layer) is norm or hasattr(block, "hook_normalized_resid_post")
    return None if after else norm


def _like(host: Host) -> Tensor:
    like: Tensor = next(host.model.parameters()).detach()
    return like


@torch.no_grad()
def position_embeddings(host: Host, n_pos: int) -> Float[Tensor, "pos d_model"]:
    """What learned positions add to the residual stream; zeros where positions enter elsewhere."""
    tokens = torch.zeros((1, n_pos), dtype=torch.long, device=_like(host).device)
    name = "blocks.0.hook_resid_pre"
    _, cache = host.model.run_with_cache(tokens, names_filter=name)
    added: Tensor = cache[name][0] - host.model.embed(tokens)[0]
    return added
