"""What a model predicts with something else in the place of attention, beside what it predicts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.splicing import splice

BLOCK_ELEMENTS = 2**23
"""Logits that are compared at a time: 64 MB in float64."""

STATISTICS = (
    "predicted", "ce_clean", "ce_spliced", "ce_zero", "ce_mean",
    "kl_spliced", "kl_zero", "kl_mean", "agrees",
)  # fmt: skip
"""What `prediction_statistics` gives."""


class CleanPredictions:
    """What the model as it is predicts for a batch.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: token ids.
        predicted: tokens whose next one is predicted; none is the last of its sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "batch pos"],
        predicted: Bool[Tensor, "batch pos"],
    ) -> None:
        self.model, self.tokens, self.predicted = model, tokens, predicted
        self.targets = tokens.roll(-1, dims=1)[predicted]
        self.logits = self.run()
        self.ce = compare(self.logits, self.logits, self.targets).ce

    def run(self) -> Float[Tensor, "token d_vocab"]:
        """Logits of the model in its present state, where they count."""
        logits: Tensor = self.model(self.tokens)
        return logits[self.predicted.to(logits.device)]


class Comparison(NamedTuple):
    """Predictions beside the clean ones, in float64."""

    ce: Float[Tensor, " token"]
    """Cross entropy."""

    kl: Float[Tensor, " token"]
    """KL(clean || these)."""

    agrees: Float[Tensor, " token"]
    """1 where the most likely token is the same."""


def compare(
    clean: Float[Tensor, "token d_vocab"],
    other: Float[Tensor, "token d_vocab"],
    targets: Int[Tensor, " token"],
) -> Comparison:
    """Hold logits against the clean ones, block by block."""
    n_rows = max(1, BLOCK_ELEMENTS // clean.shape[-1])
    blocks = []
    for start in range(0, max(1, len(targets)), n_rows):
        rows = slice(start, start + n_rows)
        p, q = (logits[rows].double().log_softmax(-1) for logits in (clean, other))
        ce = -q.gather(-1, targets[rows, None].to(q.device))[:, 0]
        kl = (p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1)
        agrees = (p.argmax(-1) == q.argmax(-1)).double()
        blocks.append((ce.cpu(), kl.cpu(), agrees.cpu()))
    return Comparison(*(torch.cat(part) for part in zip(*blocks, strict=True)))


def ablated(
    model: nn.Module, values: Mapping[int, Float[Tensor, " d_model"]]
) -> AbstractContextManager[Any]:
    """Within, what the attention of some layers adds to the residual stream is a constant.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        values: by layer, the constant.
    """

    def replacement(value: Tensor) -> Any:
        def hook_fn(activation: Tensor, hook: Any) -> Tensor:
            del hook
            return value.to(activation).expand_as(activation)

        return hook_fn

    hooks = [
        (f"blocks.{layer}.hook_attn_out", replacement(value)) for layer, value in values.items()
    ]
    within: AbstractContextManager[Any] = cast(Any, model).hooks(fwd_hooks=hooks)
    return within


def prediction_statistics(
    clean: CleanPredictions,
    lorsas: Sequence[Lorsa],
    means: Mapping[int, Float[Tensor, " d_model"]],
) -> dict[str, Float[Tensor, "batch pos"]]:
    """For every token, `STATISTICS` of some Lorsas in place together; 0 where none counts.

    Args:
        clean: the model, the batch, and the clean predictions.
        lorsas: which ones.
        means: for each of their layers, the mean of what it adds to the residual stream.
    """
    values = {"predicted": torch.ones_like(clean.ce), "ce_clean": clean.ce}
    for name, within in _states(clean.model, lorsas, means):
        with within:
            found = compare(clean.logits, clean.run(), clean.targets)
        values[f"ce_{name}"], values[f"kl_{name}"] = found.ce, found.kl
        if name == "spliced":
            values["agrees"] = found.agrees
    mask = clean.predicted.cpu()
    return {name: _placed(value, mask) for name, value in values.items()}


def _states(
    model: nn.Module, lorsas: Sequence[Lorsa], means: Mapping[int, Tensor]
) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    yield "spliced", splice(model, lorsas)
    yield "zero", ablated(model, {layer: torch.zeros_like(mean) for layer, mean in means.items()})
    yield "mean", ablated(model, means)


def _placed(values: Tensor, mask: Tensor) -> Float[Tensor, "batch pos"]:
    """Values of the tokens of a mask at their places, 0 elsewhere."""
    placed = torch.zeros(mask.shape, dtype=torch.float64)
    placed[mask] = values
    return placed
