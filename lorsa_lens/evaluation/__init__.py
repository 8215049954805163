"""How faithful Lorsas are: to their layer's output, and to the model's predictions."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.splicing import splice


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How faithful one Lorsa is, or several together (then `layer` is None)."""

    layer: int | None
    """The layer, or None for all layers spliced at once."""

    ce_clean: float
    """Cross entropy of the model as it is, in nats per predicted token."""

    ce_spliced: float
    """Cross entropy with the Lorsa in place."""

    ce_zero: float
    """Cross entropy with the attention output set to zero."""

    fvu: float | None = None
    """Fraction of variance of the attention output unexplained: `E|y - y'|^2 / (E|y|^2 - |E y|^2)`
    over all positions, at the Lorsa's `output_site`. None for several layers."""

    l0: float | None = None
    """Heads that stay per token, on average."""

    dead: float | None = None
    """Share of heads that stayed at no token."""

    @property
    def ce_recovered(self) -> float:
        """`(ce_zero - ce_spliced) / (ce_zero - ce_clean)`; SAELens calls it `ce_loss_score`.

        Not a number where zeroing the layer makes no difference.
        """
        at_stake = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_spliced) / at_stake if at_stake else float("nan")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    lorsas: Lorsa | Sequence[Lorsa],
    tokens: Int[Tensor, "batch pos"],
    *,
    predicted: Bool[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
) -> list[Fidelity]:
    """Measure each Lorsa alone, then (if there are several) all of them together.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsas: one or several Lorsas for different layers.
        tokens: token ids, without padding.
        predicted: positions whose next token counts for the cross entropy. None: all but the last.
        batch_size: sequences per forward pass.

    Returns:
        One row for each Lorsa, then one for all together if there are several.

    Raises:
        ValueError: if no position counts, there is no Lorsa, or one does not fit the model.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    if not chosen:
        raise ValueError("lorsas is empty: give at least one")
    splice(model, chosen).remove()  # refuses what does not fit, before any work
    counted = torch.ones_like(tokens, dtype=torch.bool) if predicted is None else predicted.clone()
    if counted.shape != tokens.shape:
        raise ValueError(
            f"predicted has shape {list(counted.shape)}, but tokens has {list(tokens.shape)}"
        )
    counted[:, -1] = False
    if not bool(counted.any()):
        raise ValueError("predicted counts no position before the last, so there is no loss")
    layers = [cast(int, lorsa.cfg.layer) for lorsa in chosen]
    records = record_attention(model, tokens, layers, batch_size=batch_size)

    def loss(lorsas: Sequence[Lorsa] = ()) -> float:
        with splice(model, lorsas):
            return _cross_entropy(model, tokens, counted, batch_size)

    def loss_without(layers: Sequence[int]) -> float:
        with _zeroed(model, layers):
            return _cross_entropy(model, tokens, counted, batch_size)

    clean = loss()
    rows = [
        Fidelity(
            layer=layer,
            ce_clean=clean,
            ce_spliced=loss([lorsa]),
            ce_zero=loss_without([layer]),
            **reconstruction(lorsa, records[layer], batch_size=batch_size),
        )
        for lorsa, layer in zip(chosen, layers, strict=True)
    ]
    if len(chosen) > 1:
        together, without = loss(chosen), loss_without(layers)
        rows.append(Fidelity(layer=None, ce_clean=clean, ce_spliced=together, ce_zero=without))
    return rows


@torch.no_grad()
def reconstruction(
    lorsa: Lorsa, record: AttentionRecord, *, batch_size: int = 32
) -> Mapping[str, float]:
    """`fvu`, `l0` and `dead` of a Lorsa on a layer's records, as `Fidelity` defines them.

    `fvu` is not finite where the layer's output does not vary.
    """
    error = torch.zeros((), dtype=torch.float64)
    n_active, n_tokens = 0, record.x.shape[0] * record.x.shape[1]
    fired = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.bool, device=lorsa.W_O.device)
    for start in range(0, record.x.shape[0], batch_size):
        part = record.batch(slice(start, start + batch_size)).seen_by(lorsa)
        code = lorsa.encode(part.x, **part.context)
        error += (part.out - lorsa.decode(code)).double().square().sum().cpu()
        active = code.values != 0
        n_active += int(active.sum())
        fired[code.indices[active]] = True
    target = record.target(lorsa).double().flatten(0, 1)
    variance = (target - target.mean(0)).square().sum().cpu()
    return {
        "fvu": float(error / variance),
        "l0": n_active / n_tokens,
        "dead": 1.0 - float(fired.double().mean()),
    }


def _cross_entropy(model: nn.Module, tokens: Tensor, counted: Tensor, batch_size: int) -> float:
    total, n_counted = 0.0, 0
    for start in range(0, tokens.shape[0], batch_size):
        batch, mask = tokens[start : start + batch_size], counted[start : start + batch_size]
        logits: Float[Tensor, "batch pos d_vocab"] = model(batch)
        targets = batch.roll(-1, dims=1)[mask].to(logits.device)
        chosen = logits[mask.to(logits.device)].double()
        total += nn.functional.cross_entropy(chosen, targets, reduction="sum").item()
        n_counted += targets.numel()
    return total / n_counted


def _zeroed(model: nn.Module, layers: Sequence[int]) -> AbstractContextManager[Any]:
    """Within, what the attention of some layers adds to the residual stream is zero."""

    def zero(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook's signature
        return torch.zeros_like(activation)

    names = [f"blocks.{layer}.hook_attn_out" for layer in layers]
    hooks: AbstractContextManager[Any] = cast(Any, model).hooks(
        fwd_hooks=[(name, zero) for name in names]
    )
    return hooks
