"""Activations on their way to the processes that train on them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorsa_lens.training.parts import Part
from lorsa_lens.training.ranks import Ranks

STREAMS = ("x", "out", "qk_input", "attn_out")


def exchanged(
    sent: Sequence[Part],
    own: Part | None,
    ranks: Ranks,
    move: Callable[[list[Tensor]], Tensor | None],
) -> Part | None:
    """The part of a batch that the processes' shares of it make up.

    Args:
        sent: shares, in the order in which `move` sends them.
        own: this process's share of what it receives. None: it receives nothing.
        ranks: the processes.
        move: sends tensors, one for each share, and returns the rows that were received.
    """
    records = [part.record for part in sent]
    moved: dict[str, Any] = {}
    for name in STREAMS:
        streams = [getattr(record, name) for record in records]
        if streams[0] is not None:
            moved[name] = move(streams)
    batch, pos = sent[0].counted.shape
    moved["positions"] = move([record.positions.expand(batch, pos) for record in records])
    # Only some of the processes may have met padding.
    n_rows = [0 if record.keep is None else record.keep.shape[1] for record in records]
    n_keep = int(ranks.max(torch.tensor(max(n_rows))))
    if n_keep:
        masks = [_mask(record.keep, batch, n_keep, record.x) for record in records]
        keep = move(masks)
        moved["keep"] = None if keep is None else keep.bool()
    counted = move([part.counted.to(part.record.x.device, torch.uint8) for part in sent])
    if own is None or counted is None:
        return None
    return Part(own.record._replace(**moved), counted.bool())


def _mask(keep: Tensor | None, batch: int, n_rows: int, x: Tensor) -> Tensor:
    """Keys that may be seen, as numbers; all, if nothing is said."""
    mask = torch.ones((), device=x.device) if keep is None else keep
    return mask.to(torch.uint8).expand(batch, n_rows, x.shape[1])
