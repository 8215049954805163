"""Transcoders of SAELens, or any object with `W_enc`, `b_enc`, `W_dec`, `b_dec`, on a prompt."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.singular.frozen_norm import FrozenNorm

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")

TOLERANCE = 1e-3
"""How far, relative to the largest, activations may be from their pre-activations."""


class TranscoderCode:
    """The active features of a transcoder.

    Only what `x W_enc + b_enc -> acts -> acts W_dec + b_dec` computes can be attributed, where an
    active feature's activation is its pre-activation (ReLU, JumpReLU, TopK).

    Args:
        transcoder: with `W_enc` [d_model, d_sae], `b_enc`, `W_dec` [d_sae, d_model], `b_dec`, and
            an `encode` where its activation is not the ReLU.
        x: what the MLP received.
        norm: from the stream to `x`.
        layer: for messages.

    Raises:
        ValueError: if it has other shapes, reads or writes elsewhere, or computes something else.
    """

    def __init__(
        self, transcoder: object, x: Float[Tensor, "pos d_model"], norm: FrozenNorm, layer: int
    ) -> None:
        weights = _weights(transcoder, x.shape[-1], layer)
        _check_sites(transcoder, norm, layer)
        self.transcoder: Any = transcoder
        self.W_enc, self.b_enc = weights["W_enc"], weights["b_enc"]
        pre, acts = x @ self.W_enc + self.b_enc, self.encode(x)
        pos, feature = acts.nonzero(as_tuple=True)
        kept = pre[pos, feature]
        wrong = (acts[pos, feature] - kept).abs().max() if len(pos) else torch.tensor(0.0)
        if float(wrong) > TOLERANCE * float(pre.abs().max()):
            raise ValueError(
                f"transcoders[{layer}]: its activations are not x W_enc + b_enc where they are not "
                "zero (they differ by "
                f"{float(wrong):.2g}): rescaled or normalized activations must be folded into its "
                "weights first"
            )
        self.active: tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]
        self.active = (pos, feature, kept)
        self.read, self.read_bias = self.W_enc.mT[feature], self.b_enc[feature]
        self.W_dec, self.b_dec = weights["W_dec"], weights["b_dec"]

    def encode(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_sae"]:
        """Activations of all features, as the transcoder computes them."""
        if not hasattr(self.transcoder, "encode"):
            return (x @ self.W_enc + self.b_enc).relu()
        encoded: Tensor = self.transcoder.encode(x.to(self.transcoder.W_enc)[None])[0]
        return (encoded.to_dense() if encoded.is_sparse else encoded).double()


def _weights(transcoder: object, d_model: int, layer: int) -> dict[str, Tensor]:
    """Its weights in float64."""
    lacking = [name for name in WEIGHTS if not isinstance(getattr(transcoder, name, None), Tensor)]
    if lacking:
        raise ValueError(
            f"transcoders[{layer}] is a {type(transcoder).__name__} without {', '.join(lacking)}: "
            "give a transcoder of SAELens, or an object with W_enc, b_enc, W_dec and b_dec"
        )
    if getattr(transcoder, "W_skip", None) is not None:
        raise ValueError(
            f"transcoders[{layer}] has a skip connection (W_skip), which is no feature: give a "
            "transcoder without it"
        )
    weights = {name: getattr(transcoder, name).detach().double() for name in WEIGHTS}
    d_sae = len(weights["b_enc"])
    shapes = ((d_model, d_sae), (d_sae,), (d_sae, d_model), (d_model,))
    for (name, weight), shape in zip(weights.items(), shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"transcoders[{layer}].{name} has shape {list(weight.shape)}: {list(shape)} is "
                "what stands in for an MLP of this model"
            )
    return weights


def _check_sites(transcoder: object, norm: FrozenNorm, layer: int) -> None:
    """Refuse a transcoder that says it reads or writes elsewhere."""
    metadata = getattr(getattr(transcoder, "cfg", None), "metadata", None)
    reads, writes = getattr(metadata, "hook_name", None), getattr(metadata, "hook_name_out", None)
    folded = bool((norm.gain == norm.gain[0]).all()) and not norm.bias.any()
    inputs = ["mlp.hook_in", "ln2.hook_out", *(["ln2.hook_normalized"] if folded else [])]
    for name, given, known in (
        ("hook_name", reads, inputs),
        ("hook_name_out", writes, ["hook_mlp_out", "mlp.hook_out"]),
    ):
        if isinstance(given, str) and given not in [f"blocks.{layer}.{one}" for one in known]:
            raise ValueError(
                f"transcoders[{layer}].cfg.metadata.{name} = {given!r}: it must read what the MLP "
                f"of layer {layer} receives and write what it adds to the stream, "
                f"{' or '.join(known)}"
            )
