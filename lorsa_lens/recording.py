"""What attention layers receive and return while a model runs: the data Lorsas learn from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorsa_lens.hosts import Host, host_of


class AttentionRecord(NamedTuple):
    """What one attention layer received and returned, for some sequences of one length."""

    x: Float[Tensor, "batch pos d_model"]
    """What the attention module received."""

    out: Float[Tensor, "batch pos d_model"]
    """What it returned."""

    qk_input: Float[Tensor, "batch pos d_model"] | None
    """What queries and keys read, where that differs from `x` (shortformer)."""

    positions: Int[Tensor, "#batch pos"]
    """Position of each token."""

    keep: Bool[Tensor, "batch #pos key"] | None
    """Keys that could be seen, where some could not."""

    def batch(self, rows: Tensor | slice) -> "AttentionRecord":
        """The records of some of the sequences."""
        shared = self.positions.shape[0] == 1
        return AttentionRecord(
            self.x[rows],
            self.out[rows],
            None if self.qk_input is None else self.qk_input[rows],
            self.positions if shared else self.positions[rows],
            None if self.keep is None else self.keep[rows],
        )

    @property
    def context(self) -> dict[str, Tensor | None]:
        """Keyword arguments for `Lorsa.forward`, `encode`, `pattern` and `z_pattern`."""
        return {"qk_input": self.qk_input, "positions": self.positions, "keep": self.keep}


@torch.no_grad()
def record_attention(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    layers: Iterable[int],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[int, AttentionRecord]:
    """Run a model and keep what chosen attention layers receive and return.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: token ids, without padding.
        layers: which layers.
        batch_size: sequences per forward pass.
        progress: show a progress bar.

    Returns:
        For each layer, one record of all sequences.
    """
    layers = list(layers)
    parts: dict[int, list[AttentionRecord]] = {layer: [] for layer in layers}
    starts = range(0, tokens.shape[0], batch_size)
    with _recorded(host_of(model), layers, parts):
        for start in tqdm(starts, desc="recording attention", disable=not progress):
            model(tokens[start : start + batch_size], return_type=None)
    return {layer: _joined(records) for layer, records in parts.items()}


@contextmanager
def _recorded(
    host: Host, layers: Sequence[int], parts: dict[int, list[AttentionRecord]]
) -> Iterator[None]:
    """Within, every call of the layers' attention is appended to `parts`."""
    for layer in layers:
        host.check_layer(layer)
    recorders = [_Recorder(host, layer, parts[layer]) for layer in layers]
    hidden = [recorder.attention.__dict__.get("forward") for recorder in recorders]
    try:
        for recorder in recorders:
            recorder.attention.__dict__["forward"] = recorder.forward
        yield
    finally:
        for recorder, forward in zip(recorders, hidden, strict=True):
            del recorder.attention.__dict__["forward"]
            if forward is not None:
                recorder.attention.__dict__["forward"] = forward


class _Recorder:
    """Runs an attention module as it is, and notes what went in and out."""

    def __init__(self, host: Host, layer: int, records: list[AttentionRecord]) -> None:
        self.host, self.layer, self.records = host, layer, records
        self.attention = host.attention(layer)
        self.original = self.attention.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.host.receive(self.layer, args, kwargs)
        out = self.host.run_original(self.original, call, args, kwargs)
        self.records.append(AttentionRecord(call.x, out, call.qk_input, call.positions, call.keep))
        return self.host.respond(self.layer, out)


def _joined(records: list[AttentionRecord]) -> AttentionRecord:
    first = records[0]
    shared = first.positions.shape[0] == 1
    return AttentionRecord(
        torch.cat([record.x for record in records]),
        torch.cat([record.out for record in records]),
        None if first.qk_input is None else torch.cat([r.qk_input for r in records]),  # type: ignore[misc]
        first.positions if shared else torch.cat([record.positions for record in records]),
        None if first.keep is None else torch.cat([r.keep for r in records]),  # type: ignore[misc]
    )
