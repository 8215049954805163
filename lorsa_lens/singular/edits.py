"""Changes to the queries and keys of single heads while a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.hosts import AttentionWeights, Host, host_of
from lorsa_lens.singular.qk_head import QKHead, QKReading
from lorsa_lens.singular.read_in import Side
from lorsa_lens.singular.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change to the query, or the key, of one head at one token.

    Other heads keep their keys, those that share them in grouped-query attention too.
    """

    layer: int
    head: int
    side: Side
    """`dest`: its query; `src`: its key."""
    position: int
    rotated: Float[Tensor, " d_head"] | None = None
    """Added to the rotated query or key."""
    read: Float[Tensor, " d_model"] | None = None
    """Added to what the query or key is made from."""


@contextmanager
def edited(stream: Stream, edits: Sequence[Edit]) -> Iterator[dict[tuple[int, int], QKReading]]:
    """Within, the model runs with the edits in place, on prompts of the stream's length.

    The output of an attention layer changes by what the changed patterns of the edited heads move:
    nothing else in the model is touched.

    Yields:
        By layer and head, queries, keys and scores of the edited heads in the last run.
    """
    host = host_of(stream.model)
    measured: dict[tuple[int, int], QKReading] = {}
    layers = sorted({edit.layer for edit in edits})
    replaced = []
    try:
        for layer in layers:
            own = [edit for edit in edits if edit.layer == layer]
            attention = host.attention(layer)
            stand_in = _EditedAttention(host, stream.layers[layer].weights, own, measured)
            replaced.append((attention, attention.__dict__.get("forward")))
            attention.__dict__["forward"] = stand_in.forward
        yield measured
    finally:
        for attention, before in replaced:
            del attention.__dict__["forward"]
            if before is not None:
                attention.__dict__["forward"] = before


class _EditedAttention:
    """Runs an attention module, and adds what changed patterns change."""

    def __init__(
        self,
        host: Host,
        weights: AttentionWeights,
        edits: Sequence[Edit],
        measured: dict[tuple[int, int], QKReading],
    ) -> None:
        self.host, self.weights, self.measured = host, weights, measured
        self.layer = edits[0].layer
        self.original = host.attention(self.layer).forward
        heads = sorted({edit.head for edit in edits})
        self.edits = {
            QKHead.from_weights(weights, self.layer, head): [e for e in edits if e.head == head]
            for head in heads
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention module's `forward`."""
        call = self.host.receive(self.layer, args, kwargs)
        out = self.host.run_original(self.layer, self.original, call, args, kwargs)
        x = call.x[0].double()
        read = x if call.qk_input is None else call.qk_input[0].double()
        keep = None if call.keep is None else call.keep[0]
        change = torch.zeros_like(x)
        for head, edits in self.edits.items():
            before = head.reading(read, positions=call.positions[0], keep=keep)
            after = _apply(before, edits, read, keep)
            self.measured[self.layer, head.index] = after
            values = x @ self.weights.W_V[head.index].double()
            moved = (after.pattern - before.pattern) @ values
            change += moved @ self.weights.W_O[head.index].double()
        return self.host.respond(self.layer, out + change.to(out))


def _apply(
    before: QKReading, edits: Sequence[Edit], read: Tensor, keep: Tensor | None
) -> QKReading:
    """Queries, keys and scores with the edits in them."""
    sides: dict[Side, Tensor] = {}
    for side in ("dest", "src"):
        own = [edit for edit in edits if edit.side == side]
        x = read.clone()
        for edit in own:
            if edit.read is not None:
                x[edit.position] += edit.read
        changed = before.head.reading(x, positions=before.positions, keep=keep)
        vectors = (changed.q if side == "dest" else changed.k).clone()
        for edit in own:
            if edit.rotated is not None:
                vectors[edit.position] += edit.rotated
        sides[side] = vectors
    return replace(before, q=sides["dest"], k=sides["src"])
