"""Held-out text: the same batches of it each time it is gone through."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lorsa_lens.data import ActivationBatch, ActivationStream, Contexts, contexts_for_model
from lorsa_lens.data.contexts import PADDING
from lorsa_lens.recording import AttentionRecord


class Batch(NamedTuple):
    """Some contexts, what counts in them, and what the layers received and returned."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids, where the model is."""

    counted: Bool[Tensor, "batch pos"]
    """Tokens that count in the reconstruction."""

    predicted: Bool[Tensor, "batch pos"]
    """Tokens whose prediction of the next one counts."""

    document: Int[Tensor, "batch pos"]
    """Document of each token, negative where it is of none."""

    records: dict[int, AttentionRecord]
    """By layer, what it received and returned."""

    @property
    def n_predicted(self) -> int:
        """Predictions that count."""
        return int(self.predicted.sum())


@dataclass(frozen=True)
class HeldOut:
    """Batches of held-out text, as often as one likes.

    A document is, in this order: what `documents` says of a row; a document of the contexts; a
    context, where all the text is one document.
    """

    stream: ActivationStream
    n_batches: int | None
    """How many are read at most. None: all."""
    predicted: Bool[Tensor, "row pos"] | None = None
    documents: Int[Tensor, " row"] | None = None
    contexts_are_documents: bool = False

    def __iter__(self) -> Iterator[Batch]:
        """All batches, from the first."""
        beginning = self.stream.state_dict()
        device = next(self.stream.model.parameters()).device
        try:
            with closing(iter(self.stream)) as batches:  # type: ignore[type-var]
                yield from self._batches(islice(batches, self.n_batches), device)
        finally:
            self.stream.load_state_dict(beginning)

    def _batches(self, given: Iterator[ActivationBatch], device: torch.device) -> Iterator[Batch]:
        n_contexts = 0
        for batch in given:
            row = batch.document
            document = row if self.documents is None else self.documents[row]
            if self.contexts_are_documents:
                numbers = torch.arange(n_contexts, n_contexts + len(row))[:, None]
                document = numbers.expand_as(row).masked_fill(row == PADDING, PADDING)
            n_contexts += len(row)
            predicted = batch.counted if self.predicted is None else self.predicted[row[:, 0]]
            yield Batch(
                tokens=batch.tokens.to(device),
                counted=batch.counted,
                predicted=predicted & _has_next(row),
                document=document,
                records=batch.records,
            )

    def by_context(self) -> "HeldOut":
        """The same text, each context taken for a document."""
        return replace(self, contexts_are_documents=True)


def _has_next(document: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Whether a token follows, other than padding."""
    there = document != PADDING
    return torch.cat((there[:, :-1] & there[:, 1:], torch.zeros_like(there[:, :1])), dim=1)


def held_out(
    model: nn.Module,
    tokens: Int[Tensor, "row pos"] | Contexts,
    layers: list[int],
    *,
    batch_size: int,
    predicted: Bool[Tensor, "row pos"] | None = None,
    documents: Int[Tensor, " row"] | None = None,
    exclude_special_tokens: bool = True,
    max_tokens: int | None = None,
) -> HeldOut:
    """Held-out text of any kind; see `lorsa_lens.evaluation.evaluate` for the arguments.

    Raises:
        ValueError: if masks do not fit the tokens, or the text does not fit the model.
    """
    if isinstance(tokens, Contexts):
        for name, value in (("predicted", predicted), ("documents", documents)):
            if value is not None:
                raise ValueError(f"{name} is for tokens in a tensor; contexts say it themselves")
        contexts = tokens
    else:
        rows, predicted, documents = _sorted(tokens, predicted, documents)
        contexts = contexts_for_model(
            model,
            rows,
            rows.shape[1],
            prepend_bos=False,
            exclude_special_tokens=exclude_special_tokens,
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} must be positive, or None for all")
    stream = ActivationStream(model, contexts, layers, batch_size=batch_size)
    n_batches = None
    if max_tokens is not None:
        n_batches = max(1, max_tokens // (batch_size * contexts.context_size))
    return HeldOut(stream, n_batches, predicted, documents)


def _sorted(
    tokens: Tensor, predicted: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows, with those of a document one after another, and checked masks."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens has shape {list(tokens.shape)}: give ids [row, pos]")
    if predicted is not None and predicted.shape != tokens.shape:
        raise ValueError(
            f"predicted has shape {list(predicted.shape)}, but tokens has {list(tokens.shape)}"
        )
    counted = torch.ones_like(tokens, dtype=torch.bool) if predicted is None else predicted
    if not bool(counted[:, :-1].any()):
        raise ValueError("predicted counts no position before the last, so there is no loss")
    if documents is None:
        return tokens, None if predicted is None else predicted.cpu(), None
    if documents.shape != tokens.shape[:1]:
        raise ValueError(
            f"documents has shape {list(documents.shape)}, but tokens has {tokens.shape[0]} rows"
        )
    documents, order = documents.cpu().sort(stable=True)
    return tokens.cpu()[order], None if predicted is None else predicted.cpu()[order], documents
