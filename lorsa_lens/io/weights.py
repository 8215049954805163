"""A Lorsa's tensors from a source: names, shapes and kinds are checked before any is read."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorsa_lens.config import LorsaConfig
from lorsa_lens.io.sources import DTYPES, LoadError, TensorSource
from lorsa_lens.lorsa import Lorsa

PIECE_ELEMENTS = 2**20
"""Numbers of a tensor that are read or checked at a time: 4 MB in float32."""


def load_weights(
    cfg: LorsaConfig,
    source: TensorSource,
    *,
    device: torch.device | str,
    names: Mapping[str, str] | None = None,
    copies: Mapping[str, int] | None = None,
    zeros: frozenset[str] = frozenset(),
    ignored: Collection[str] = (),
) -> Lorsa:
    """A Lorsa whose tensors come from a source, piece by piece: memory holds them once.

    Args:
        cfg: what to build.
        source: where its tensors are.
        device: where it goes.
        names: the source's name of a tensor, where it is not the Lorsa's own.
        copies: how often each row of a tensor is repeated, one after the other.
        zeros: tensors that the source has not, and that are zero.
        ignored: names of tensors in the source that mean nothing here.

    Raises:
        LoadError: if the source's tensors are not the Lorsa's, or are not finite.
    """
    names, copies = names or {}, copies or {}
    lorsa = Lorsa(cfg, device="meta")
    wanted = {
        names.get(name, name): (tuple(target.shape), copies.get(name, 1))
        for name, target in lorsa.state_dict().items()
        if name not in zeros
    }
    _check_headers(source, wanted, ignored)
    lorsa.to_empty(device=device)
    for name, target in lorsa.state_dict().items():
        if name in zeros:
            target.zero_()
        else:
            _fill(target, source, names.get(name, name), copies.get(name, 1))
    return lorsa


def _check_headers(
    source: TensorSource,
    wanted: Mapping[str, tuple[tuple[int, ...], int]],
    ignored: Collection[str],
) -> None:
    headers = {name: header for name, header in source.headers.items() if name not in ignored}
    if set(headers) != set(wanted):
        missing, foreign = sorted(set(wanted) - set(headers)), sorted(set(headers) - set(wanted))
        raise LoadError(
            f"{source.path} does not fit its config.json: missing {missing or 'nothing'}, "
            f"unknown {foreign or 'nothing'}"
        )
    for name, (shape, n_copies) in wanted.items():
        if n_copies > 1:
            shape = (shape[0] // n_copies, *shape[1:])
        header = headers[name]
        if header.shape != shape:
            raise LoadError(
                f"{source.path}: {name} has shape {header.shape}, but config.json says {shape}"
            )
        if header.dtype not in DTYPES:
            raise LoadError(
                f"{source.path}: {name} holds {header.dtype}, not floating-point numbers"
            )


def _fill(target: Tensor, source: TensorSource, name: str, n_copies: int) -> None:
    for piece in pieces(target):
        if n_copies == 1:
            target[piece] = source.read(name, piece)
        else:
            stop = min(piece.stop, len(target))
            rows = source.read(name, slice(piece.start // n_copies, -(-stop // n_copies)))
            first = piece.start % n_copies
            repeated = rows.repeat_interleave(n_copies, dim=0)
            target[piece] = repeated[first : first + stop - piece.start]
        what = f"read from {source.path} as {target.dtype}"
        check_finite(name, target[piece], what, LoadError)


def pieces(tensor: Tensor) -> Iterator[Any]:
    """Indices that cut a tensor into pieces, along its first dimension."""
    if tensor.ndim == 0:
        yield ...
        return
    n_rows = max(1, PIECE_ELEMENTS // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), n_rows):
        yield slice(start, start + n_rows)


def check_finite(
    name: str, tensor: Tensor, what: str, error: type[ValueError] = ValueError
) -> None:
    """Raise an error that names a tensor which holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise error(f"{name} has {n_bad} entries that are NaN or infinite: {what}")
