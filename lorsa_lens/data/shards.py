"""Shards: files with what some layers received and returned for some sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorsa_lens.data.activations import ActivationBatch
from lorsa_lens.data.contexts import TokenBatch
from lorsa_lens.data.manifest import CacheError
from lorsa_lens.hosts import InputNorm
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.recording import AttentionRecord, joined

STREAMS = ("x", "out", "qk_input", "attn_out")
"""Fields of a record that are activations, and are kept in the precision of the cache."""


def write_shard(path: Path, batches: Sequence[ActivationBatch], dtype: torch.dtype) -> int:
    """Write some batches into one file, whole or not at all.

    Args:
        path: the file.
        batches: on any device.
        dtype: of the activations in the file.

    Returns:
        The size of the file in bytes.
    """
    tensors = {
        name: torch.cat([getattr(batch, name).cpu() for batch in batches])
        for name in TokenBatch._fields
    }
    for layer in batches[0].records:
        record = joined([batch.records[layer] for batch in batches])
        for name, value in record._asdict().items():
            if isinstance(value, Tensor):
                tensors[f"{layer}.{name}"] = value.to(dtype) if name in STREAMS else value
        if record.input_norm is not None:
            for name, value in record.input_norm._asdict().items():
                tensors[f"{layer}.{name}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(_unshared(tensors), temporary)
    return path.stat().st_size


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, no two of which share memory."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return own


class OpenShard:
    """A shard, memory-mapped: what is not looked at is not read.

    Args:
        path: the file.
        layers: which layers.

    Raises:
        CacheError: if the file is damaged.
    """

    def __init__(self, path: Path, layers: Sequence[int]) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                self.tokens = TokenBatch(*(file.get_tensor(name) for name in TokenBatch._fields))
                self.records = {
                    layer: _record(
                        {
                            name.partition(".")[2]: file.get_tensor(name)
                            for name in names
                            if name.startswith(f"{layer}.")
                        }
                    )
                    for layer in layers
                }
        except (SafetensorError, OSError, KeyError) as error:
            raise CacheError(f"{path} is damaged: {error}") from error

    def rows(self, rows: Tensor) -> tuple[TokenBatch, dict[int, AttentionRecord]]:
        """Some of its sequences, copied into memory."""
        batch = TokenBatch(*(part[rows] for part in self.tokens))
        return batch, {layer: record.batch(rows) for layer, record in self.records.items()}


def _record(tensors: dict[str, Tensor]) -> AttentionRecord:
    norm = None
    if "gain" in tensors:
        norm = InputNorm(gain=tensors["gain"], bias=tensors["bias"])
    return AttentionRecord(
        x=tensors["x"],
        out=tensors["out"],
        qk_input=tensors.get("qk_input"),
        positions=tensors["positions"],
        keep=tensors.get("keep"),
        input_norm=norm,
        attn_out=tensors.get("attn_out"),
    )


def joined_rows(
    parts: Sequence[tuple[TokenBatch, dict[int, AttentionRecord]]], order: Tensor
) -> tuple[TokenBatch, dict[int, AttentionRecord]]:
    """Sequences of several shards as one batch.

    Args:
        parts: sequences of each shard.
        order: for each sequence of the batch, its place among those of all parts [batch].
    """
    if len(parts) == 1:  # then the order is theirs
        return parts[0]
    tokens = TokenBatch(
        *(torch.cat(column)[order] for column in zip(*(part for part, _ in parts), strict=True))
    )
    records = {
        layer: joined([records[layer] for _, records in parts]).batch(order)
        for layer in parts[0][1]
    }
    return tokens, records
