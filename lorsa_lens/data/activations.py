"""What attention layers receive and return, streamed from a language model as it reads."""

import functools
import inspect
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lorsa_lens.data.contexts import Contexts, State, TokenBatch
from lorsa_lens.data.prefetch import prefetched
from lorsa_lens.hosts import Host, InputNorm, host_of
from lorsa_lens.recording import AttentionRecord, recorded
from lorsa_lens.site import site_at


class ActivationBatch(NamedTuple):
    """What chosen attention layers received and returned, for some contexts."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids that the language model read."""

    counted: Bool[Tensor, "batch pos"]
    """Whether a position counts in a loss: not if it is padding or a special token."""

    document: Int[Tensor, "batch pos"]
    """Number of the document of each position, -1 for padding."""

    records: dict[int, AttentionRecord]
    """For each layer, what it received and returned."""

    state: State
    """The place after this batch, for `load_state_dict`."""


class ActivationStream:
    """Batches of activations of several layers, each from one pass of the language model.

    Iterating goes on after the last batch that was given out, also when an iteration was broken
    off, and ends with the contexts. Nothing is lost or repeated by working ahead: `state_dict` is
    the place after the last batch given out, whatever was prepared after it.

    The language model runs without gradients, in its own precision, and stops after the last layer
    asked for where its class can (all but HookedEncoder; a bridge wrapped around a Hugging Face
    model still computes logits if that is the last layer of all). Lorsas may be in place at other
    layers.

    With `prefetch`, the model belongs to a background thread during an iteration. To use it for
    anything else meanwhile, do so within `with stream.paused():`.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        contexts: from `pack`. Ids outside the model's vocabulary are refused when they are met.
        layers: which layers.
        batch_size: contexts per batch; the last batch may have fewer.
        prefetch: how many batches a background thread prepares ahead; 0 for no thread.
        device: where records go; by default they stay where the model is.

    Raises:
        ValueError: if a number is out of range, a layer does not exist, is asked for twice or has a
            Lorsa in its place, the contexts are longer than the model takes, or they are padded
            and attention is bidirectional, so that it would see the padding.

    Example:
        >>> stream = ActivationStream(model, contexts, [0, 1], batch_size=32)  # doctest: +SKIP
        >>> for batch in stream:  # doctest: +SKIP
        ...     x, out = batch.records[0].x, batch.records[0].out  # [batch, pos, d_model]
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        layers: Iterable[int],
        *,
        batch_size: int,
        prefetch: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be positive")
        if prefetch < 0:
            raise ValueError(f"prefetch = {prefetch} must not be negative")
        self.host, self.contexts, self.layers = _remembering(host_of(model)), contexts, list(layers)
        self.batch_size, self.prefetch, self.device = batch_size, prefetch, device
        _check(self.host, self.layers, contexts)
        if (d_vocab := getattr(self.host.model.cfg, "d_vocab", -1)) > 0:
            contexts.limit_vocabulary(d_vocab)
        self._arguments = _forward_arguments(self.host, max(self.layers))
        self._state = contexts.state_dict()
        self._model_in_use = threading.RLock()
        self._iterating = False

    @property
    def model(self) -> nn.Module:
        """The language model."""
        model: nn.Module = self.host.model
        return model

    # ------------------------------------------------------------------------------------ state

    def state_dict(self) -> State:
        """The place after the last batch that was given out, as JSON can hold it."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Go to a place.

        Raises:
            ValueError: if the state is of contexts that were made in another way.
            RuntimeError: during an iteration.
        """
        self._refuse_while_iterating()
        self.contexts.load_state_dict(state)
        self._state = state

    # -------------------------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Batches from the place on.

        Raises:
            RuntimeError: during another iteration.
        """
        self._refuse_while_iterating()
        return self._iterate()

    def _iterate(self) -> Generator[ActivationBatch, None, None]:
        self._refuse_while_iterating()
        self._iterating = True
        batches: Generator[ActivationBatch, None, None]
        batches = prefetched(self._produce, self.prefetch) if self.prefetch else self._produce()
        try:
            self.contexts.load_state_dict(self._state)
            for batch in batches:
                self._state = batch.state
                yield batch
                del batch
        finally:
            batches.close()
            self._iterating = False

    def _refuse_while_iterating(self) -> None:
        if self._iterating:
            raise RuntimeError(
                "the stream is being iterated over: end that iteration (or close its iterator) "
                "first"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the background thread does not touch the model.

        Batches that are ready can still be taken; more of them would be waited for without end.
        """
        with self._model_in_use:
            yield

    # ------------------------------------------------------------------------------- production

    def _produce(self) -> Generator[ActivationBatch, None, None]:
        while (batch := self.contexts.next_batch(self.batch_size)) is not None:
            state = self.contexts.state_dict()
            yield self._activations(batch, state)

    def _activations(self, batch: TokenBatch, state: State) -> ActivationBatch:
        tokens = batch.tokens.to(next(self.model.parameters()).device)
        parts: dict[int, list[AttentionRecord]] = {layer: [] for layer in self.layers}
        with self._model_in_use, torch.no_grad():
            _check_not_spliced(self.host, self.layers)
            with recorded(self.host, self.layers, parts):
                self.host.model(tokens, **self._arguments)
        records = {layer: _moved(part, self.device) for layer, (part,) in parts.items()}
        if self.device is not None:
            batch = TokenBatch(*(tensor.to(self.device) for tensor in batch))
        return ActivationBatch(*batch, records=records, state=state)


def _remembering(host: Host) -> Host:
    """A host that looks for a layer's norms once: on a bridge that takes 1 ms."""
    for name in ("input_norm", "post_norm"):
        setattr(host, name, functools.cache(getattr(host, name)))
    return host


def _check(host: Host, layers: Sequence[int], contexts: Contexts) -> None:
    if not layers:
        raise ValueError("layers is empty: say which layers to record")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers = {list(layers)} names a layer twice")
    for layer in layers:
        host.check_layer(layer)
    _check_not_spliced(host, layers)
    longest = getattr(host.model.cfg, "n_ctx", None)
    if longest and contexts.context_size > longest:
        raise ValueError(
            f"context_size = {contexts.context_size}, but the model takes {longest} positions"
        )
    if not contexts.padded:
        return
    for layer in layers:
        if host.read_attention(layer).spec.attention_dir == "bidirectional":
            raise ValueError(
                f"attention of layer {layer} is bidirectional and would see the padding of "
                "contexts that hold one document: pack with respect_documents=False"
            )


def _check_not_spliced(host: Host, layers: Sequence[int]) -> None:
    for layer in layers:
        if site_at(host, layer) is not None:
            raise ValueError(
                f"layer {layer} is spliced, so its attention does not run: remove the splice first"
            )


def _forward_arguments(host: Host, last_layer: int) -> dict[str, Any]:
    """Arguments for a forward pass that computes no more than it must."""
    arguments: dict[str, Any] = {"return_type": None}
    if "stop_at_layer" in inspect.signature(host.model.forward).parameters:
        arguments["stop_at_layer"] = last_layer + 1
    return arguments


def _moved(record: AttentionRecord, device: torch.device | str | None) -> AttentionRecord:
    """A record on another device."""
    if device is None:
        return record
    norm = record.input_norm
    tensors = {
        name: value.to(device)
        for name, value in record._asdict().items()
        if isinstance(value, Tensor)
    }
    moved = None if norm is None else InputNorm(norm.gain.to(device), norm.bias.to(device))
    return record._replace(**tensors, input_norm=moved)
