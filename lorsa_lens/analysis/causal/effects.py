"""What happens to predictions, and to other heads, when heads are switched off or set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.interventions import set_heads
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.splicing import splice

To = float | Literal["mean"]
Heads = Mapping[int, Sequence[int]]
"""Heads by layer."""


@dataclass(frozen=True, kw_only=True)
class HeadEffects:
    """Predictions with and without an intervention."""

    loss: Float[Tensor, "batch predicted"]
    """Cross entropy of each next token, in nats."""

    changed_loss: Float[Tensor, "batch predicted"]
    """The same with the intervention."""

    logit_difference: Float[Tensor, "batch pos"] | None
    """Logit of the answer less that of the alternative, where answers were given."""

    changed_logit_difference: Float[Tensor, "batch pos"] | None
    """The same with the intervention."""

    downstream: dict[int, Float[Tensor, " ov_head"]]
    """By later layer with a Lorsa, each head's mean change `|z' - z| * ||w_O||`."""

    @property
    def cost(self) -> Float[Tensor, "batch predicted"]:
        """How much loss the intervention adds at each position."""
        return self.changed_loss - self.loss


@torch.no_grad()
def head_effects(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    tokens: Int[Tensor, "batch pos"],
    heads: Heads,
    *,
    to: To = 0.0,
    error_term: bool = True,
    answers: Int[Tensor, "batch pos"] | None = None,
    alternatives: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
) -> HeadEffects:
    """Set heads to a value at all positions, and compare predictions.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: those of the heads, and of later layers whose heads are to be watched.
        tokens: the text.
        heads: which heads, by layer.
        to: the value their activations are set to: 0 switches them off; `mean` is each head's
            mean activation over the text.
        error_term: add what the Lorsas miss, so that without intervention the model is exact.
        answers: by position, a token whose logit is compared with that of `alternatives`.
        alternatives: see `answers`.
        batch_size: sequences at a time.

    Raises:
        ValueError: if a layer has no Lorsa, or only one of `answers` and `alternatives` is given.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    by_layer = {cast(int, lorsa.cfg.layer): lorsa for lorsa in chosen}
    for layer in heads:
        if layer not in by_layer:
            raise ValueError(f"heads names layer {layer}, but lorsas are of layers {[*by_layer]}")
    if (answers is None) != (alternatives is None):
        raise ValueError("give both answers and alternatives, or neither")
    parts: list[dict[str, Any]] = []
    with splice(model, chosen, error_term=error_term):
        values = _values(model, by_layer, tokens, heads, to, batch_size)
        hooks = [
            (_acts(layer), set_heads(list(which), values[layer])) for layer, which in heads.items()
        ]
        for start in range(0, tokens.shape[0], batch_size):
            rows = slice(start, start + batch_size)
            asked = None if answers is None else (answers[rows], alternatives[rows])  # type: ignore[index]
            parts.append(_compared(model, by_layer, tokens[rows], hooks, asked))
    return _joined(parts, by_layer, heads, tokens.shape[0])


def _acts(layer: int) -> str:
    return f"blocks.{layer}.attn.lorsa.hook_acts_post"


def _values(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    tokens: Tensor,
    heads: Heads,
    to: To,
    batch_size: int,
) -> dict[int, float | Tensor]:
    """What the heads of each layer are set to."""
    if to != "mean":
        return dict.fromkeys(heads, float(to))
    totals = {layer: torch.zeros(len(which)) for layer, which in heads.items()}
    for start in range(0, tokens.shape[0], batch_size):
        names = [_acts(layer) for layer in heads]
        _, cache = cast(Any, model).run_with_cache(
            tokens[start : start + batch_size], names_filter=names
        )
        for layer, which in heads.items():
            totals[layer] = totals[layer].to(lorsas[layer].W_O)
            totals[layer] += cache[_acts(layer)][..., list(which)].sum((0, 1))
    return {layer: total / tokens.numel() for layer, total in totals.items()}


def _compared(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    tokens: Tensor,
    hooks: list[Any],
    asked: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """One batch without and with the intervention."""
    found: dict[str, Any] = {}
    acts: dict[str, dict[int, Tensor]] = {"": {}, "changed_": {}}
    for prefix, interventions in (("", []), ("changed_", hooks)):

        def keep(activation: Tensor, hook: Any, kept: dict[int, Tensor] = acts[prefix]) -> None:
            kept[int(hook.name.split(".")[1])] = activation

        watching = [(_acts(layer), keep) for layer in lorsas]
        logits = cast(Any, model).run_with_hooks(tokens, fwd_hooks=[*interventions, *watching])
        found[f"{prefix}loss"] = _loss(logits, tokens)
        if asked is not None:
            answer, alternative = (
                logits.gather(-1, ids.to(logits.device)[..., None])[..., 0] for ids in asked
            )
            found[f"{prefix}logit_difference"] = answer - alternative
    found["downstream"] = {
        layer: ((acts["changed_"][layer] - acts[""][layer]).abs() * writing_norms(lorsa.W_O))
        .mean(1)
        .sum(0)
        for layer, lorsa in lorsas.items()
    }
    return found


def _loss(logits: Tensor, tokens: Tensor) -> Float[Tensor, "batch predicted"]:
    chances = logits[:, :-1].log_softmax(-1)
    return -chances.gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]


def _joined(
    parts: list[dict[str, Any]], lorsas: Mapping[int, Lorsa], heads: Heads, n_sequences: int
) -> HeadEffects:
    def whole(name: str) -> Tensor | None:
        return torch.cat([part[name] for part in parts]) if name in parts[0] else None

    later = [layer for layer in lorsas if layer > min(heads, default=-1)]
    return HeadEffects(
        loss=cast(Tensor, whole("loss")),
        changed_loss=cast(Tensor, whole("changed_loss")),
        logit_difference=whole("logit_difference"),
        changed_logit_difference=whole("changed_logit_difference"),
        downstream={
            layer: torch.stack([part["downstream"][layer] for part in parts]).sum(0) / n_sequences
            for layer in later
        },
    )
