"""The same Lorsa at another site of the same model: exact wherever the sites differ by weights.

The norm before attention is `x = normalized * gain + bias`. A Lorsa that reads `x` (`attn_in` of an
unfolded model) and one that reads `normalized` (`ln1_normalized`, or `attn_in` of a folded model)
differ by its gain and bias only, which fold into `W_Q`, `W_K`, `W_V` and their biases.
"""

from typing import cast

import torch
from einops import einsum
from torch import Tensor, nn

from lorsa_lens.config import InputSite, OutputSite
from lorsa_lens.hosts import InputNorm, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.site import reads_normalized
from lorsa_lens.splicing import splice


@torch.no_grad()
def to_site(
    lorsa: Lorsa,
    model: nn.Module,
    *,
    input_site: InputSite | None = None,
    output_site: OutputSite | None = None,
) -> Lorsa:
    """A Lorsa that computes the same at other sites of a model; the given one stays as it is.

    Args:
        lorsa: made or trained for this model, folded or not; its layer must be set.
        model: a HookedTransformer or a TransformerBridge.
        input_site: `attn_in` (what attention receives in this model) or `ln1_normalized` (the
            normalized stream before the norm's gain and bias). None: as it is.
        output_site: `attn_out` (what attention returns) or `hook_attn_out` (what is added to the
            stream). None: as it is.

    Raises:
        ValueError: if the Lorsa does not fit the model, a gain is zero, the model has no such
            site, or a norm stands between the output sites: what it does is not linear.
    """
    splice(model, lorsa).remove()  # refuses what does not fit
    host, cfg, layer = host_of(model), lorsa.cfg, cast(int, lorsa.cfg.layer)
    input_site, output_site = input_site or cfg.input_site, output_site or cfg.output_site
    if output_site != cfg.output_site and host.post_norm(layer) is not None:
        raise ValueError(
            f"a norm follows the attention of layer {layer}, so {output_site} is no linear map of "
            f"{cfg.output_site}: train a Lorsa for {output_site}"
        )
    if input_site == "ln1_normalized" and not host.shows_normalized(layer):
        raise ValueError(
            f"ln1.hook_normalized of layer {layer} does not show what attention reads, before the "
            "norm's gain and bias, in this model and release of TransformerLens"
        )
    norm = host.input_norm(layer)
    fields = {"input_site": input_site, "output_site": output_site}
    new = Lorsa(cfg.replace(**fields, fold_ln=host.is_folded(layer)), device="meta")
    new.load_state_dict({n: t.clone() for n, t in lorsa.state_dict().items()}, assign=True)
    wants_normalized = input_site == "ln1_normalized" or norm is None
    if norm is not None and wants_normalized and not reads_normalized(lorsa):
        _fold(new, InputNorm(norm.gain, norm.bias))
    elif norm is not None and not wants_normalized and reads_normalized(lorsa):
        _fold(new, _inverse(norm, layer))
    return new


def _fold(lorsa: Lorsa, norm: InputNorm) -> None:
    """Make `f(x)` into `f(x * gain + bias)`, in place."""
    gain, bias = norm.gain.to(lorsa.W_V), norm.bias.to(lorsa.W_V)
    for weights, biases in ((lorsa.W_Q, lorsa.b_Q), (lorsa.W_K, lorsa.b_K)):
        biases.add_(einsum(bias, weights, "m, h m d -> h d"))
        weights.mul_(gain[:, None])
    lorsa.b_V.add_(einsum(bias, lorsa.W_V, "m, h m -> h"))
    lorsa.W_V.mul_(gain)


def _inverse(norm: InputNorm, layer: int) -> InputNorm:
    gain: Tensor = norm.gain
    if not bool((gain.abs() > 1e-6).all()):
        raise ValueError(
            f"the norm before layer {layer} has a gain of zero, so what the Lorsa reads cannot be "
            "recovered from what attention receives"
        )
    return InputNorm(1 / gain, -norm.bias / gain)
