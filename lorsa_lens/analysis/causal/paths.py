"""Path patching: what a head does by way of chosen later heads only (arXiv 2304.05969)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.interventions import set_heads
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.splicing import splice


class PathEffect(NamedTuple):
    """What goes along a path from one head through others to the logits."""

    receivers: Float[Tensor, "batch pos receiver"]
    """How much the receivers' activations change when the sender's output is taken from what
    they read."""

    logits: Float[Tensor, "batch pos d_vocab"]
    """How much the logits change when the receivers alone are changed so."""


@torch.no_grad()
def path_patch(
    model: nn.Module,
    lorsas: Iterable[Lorsa],
    tokens: Int[Tensor, "batch pos"],
    *,
    sender: tuple[int, int],
    receivers: tuple[int, Sequence[int]],
    error_term: bool = True,
) -> PathEffect:
    """Take a head's output out of what chosen heads of a later layer read, and see what follows.

    Only the direct path from the sender counts: everything between stays as it was. Queries, keys
    and values of the receivers' layer all read the changed stream, and its norm is computed anew.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: of both layers at least.
        tokens: the text.
        sender: layer and head.
        receivers: layer and heads.
        error_term: add what the Lorsas miss.

    Raises:
        ValueError: if a layer has no Lorsa, or the receivers are not in a later layer.
    """
    by_layer = {lorsa.cfg.layer: lorsa for lorsa in lorsas}
    (from_layer, head), (to_layer, heads) = sender, receivers
    for name, layer in (("sender", from_layer), ("receivers", to_layer)):
        if layer not in by_layer:
            raise ValueError(f"{name} names layer {layer}, but lorsas are of {[*by_layer]}")
    if to_layer <= from_layer:
        raise ValueError(f"receivers are in layer {to_layer}, not after the sender's {from_layer}")
    acts, stream = "blocks.{}.attn.lorsa.hook_acts_post", f"blocks.{to_layer}.hook_resid_pre"
    run: Any = cast(Any, model)
    with splice(model, by_layer.values(), error_term=error_term):
        names = [acts.format(from_layer), acts.format(to_layer)]
        clean_logits, cache = run.run_with_cache(tokens, names_filter=names)
        written: Tensor = cache[names[0]][..., head, None] * by_layer[from_layer].W_O[head]
        clean = cache[names[1]][..., list(heads)]
        found: dict[str, Tensor] = {}

        def take_out(resid: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook's signature
            return resid - written.to(resid)

        def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
            found["acts"] = activation[..., list(heads)]

        run.run_with_hooks(tokens, fwd_hooks=[(stream, take_out), (names[1], keep)])
        hooks = [(names[1], set_heads(list(heads), found["acts"]))]
        logits = run.run_with_hooks(tokens, fwd_hooks=hooks)
    return PathEffect(found["acts"] - clean, logits - clean_logits)
