"""Twice through the text: means first, then every metric, alone and together."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorsa_lens.data import Contexts
from lorsa_lens.evaluation import layer as of_layer
from lorsa_lens.evaluation import predictions
from lorsa_lens.evaluation.documents import DocumentSums
from lorsa_lens.evaluation.fidelity import Fidelity, estimates
from lorsa_lens.evaluation.held_out import HeldOut, held_out
from lorsa_lens.evaluation.layer import LayerEvaluation
from lorsa_lens.evaluation.sinks import SinkRule, check_rule
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.splicing import splice


@torch.no_grad()
def evaluate(
    model: nn.Module,
    lorsas: Lorsa | Sequence[Lorsa],
    tokens: Int[Tensor, "row pos"] | Contexts,
    *,
    predicted: Bool[Tensor, "row pos"] | None = None,
    documents: Int[Tensor, " row"] | None = None,
    exclude_special_tokens: bool = True,
    sinks: SinkRule = "attention",
    batch_size: int = 32,
    max_tokens: int | None = None,
    progress: bool = False,
) -> list[Fidelity]:
    """Measure each Lorsa alone, then (if there are several) all of them together.

    The text is gone through twice, batch by batch; sums are in float64, and memory does not grow
    with the text. `Fidelity` states the formulas.

    Args:
        model: a HookedTransformer or a TransformerBridge. Lorsas may be in place at other layers.
        lorsas: one or several Lorsas for different layers.
        tokens: token ids without padding, or contexts that end, from `lorsa_lens.data.pack`.
        predicted: of tokens in a tensor, positions whose next token counts for predictions. None:
            all that count but the last.
        documents: of tokens in a tensor, the document of each row: the unit of the confidence
            intervals. None: every row is one. Contexts say themselves which documents they hold;
            if it is one only, every context is a unit.
        exclude_special_tokens: BOS, EOS and padding of the model's tokenizer do not count, as
            positions: their outputs, and what is predicted at them. They are there for attention.
            Contexts say themselves what counts.
        sinks: what positions `fvu_without_sinks` leaves out: see `sink_positions`.
        batch_size: contexts per forward pass.
        max_tokens: whole batches of at most so many tokens, but at least one batch. None: all.
        progress: show a progress bar.

    Returns:
        One row for each Lorsa, then one for all together if there are several.

    Raises:
        ValueError: if no position counts, there is no Lorsa, or one does not fit the model.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    if not chosen:
        raise ValueError("lorsas is empty: give at least one")
    check_rule(sinks)
    splice(model, chosen).remove()  # refuses what does not fit, before any work
    text = held_out(
        model,
        tokens,
        [lorsa.cfg.layer for lorsa in chosen if lorsa.cfg.layer is not None],
        batch_size=batch_size,
        predicted=predicted,
        documents=documents,
        exclude_special_tokens=exclude_special_tokens,
        max_tokens=max_tokens,
    )
    layers = [LayerEvaluation(model, lorsa, sinks) for lorsa in chosen]
    text, n_batches = _survey(layers, text, progress)
    return _measure(model, layers, text, n_batches, progress)


def _survey(layers: list[LayerEvaluation], text: HeldOut, progress: bool) -> tuple[HeldOut, int]:
    """Go through the text once; the text by documents, or by contexts if it is one document."""
    n_batches, n_predicted, document_range = 0, 0, set()
    for batch in tqdm(text, "surveying", text.n_batches, disable=not progress):
        for layer in layers:
            layer.survey(batch.records[layer.layer], batch.counted)
        there = batch.document[batch.document >= 0]
        document_range |= {int(there.min()), int(there.max())}
        n_batches, n_predicted = n_batches + 1, n_predicted + batch.n_predicted
    if n_predicted == 0:
        raise ValueError(
            "no position counts: all hold special tokens, or are the last of their context"
        )
    given = text.documents is not None or len(document_range) > 1
    return (text if given else text.by_context()), n_batches


def _measure(
    model: nn.Module,
    layers: list[LayerEvaluation],
    text: HeldOut,
    n_batches: int,
    progress: bool,
) -> list[Fidelity]:
    means = {layer.layer: layer.mean_added.value for layer in layers}
    names = (*of_layer.STATISTICS, *predictions.STATISTICS)
    alone = [DocumentSums(names) for _ in layers]
    together = DocumentSums(predictions.STATISTICS)
    several = len(layers) > 1
    with tqdm(
        desc="evaluating", total=n_batches * (len(layers) + several), disable=not progress
    ) as bar:
        for batch in text:
            clean = predictions.CleanPredictions(model, batch.tokens, batch.predicted)
            for layer, sums in zip(layers, alone, strict=True):
                own = layer.measure(batch.records[layer.layer], batch.counted)
                mean = {layer.layer: means[layer.layer]}
                found = predictions.prediction_statistics(clean, [layer.lorsa], mean)
                sums.add(batch.document, {**own, **found})
                bar.update()
            if several:
                lorsas = [layer.lorsa for layer in layers]
                found = predictions.prediction_statistics(clean, lorsas, means)
                together.add(batch.document, found)
                bar.update()
    rows = [_row(sums, layer) for layer, sums in zip(layers, alone, strict=True)]
    return [*rows, _row(together)] if several else rows


def _row(sums: DocumentSums, layer: LayerEvaluation | None = None) -> Fidelity:
    sums.finish()
    values: dict[str, Any] = estimates(sums)
    if layer is not None:
        density = layer.density
        values.update(
            n_tokens=layer.n_counted,
            dead=float((density == 0).double().mean()),
            density=density,
            pattern_overlap_chance=layer.match.chance,
            matched_heads=layer.match.heads,
        )
    return Fidelity(
        layer=None if layer is None else layer.layer,
        n_documents=sums.n_documents,
        n_predicted=round(sums.total("predicted")),
        **values,
    )
