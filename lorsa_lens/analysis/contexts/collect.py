"""One pass over a corpus that finds, for every head, where and how it is active."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorsa_lens.analysis.contexts.gather import LayerHeads, Sizes
from lorsa_lens.analysis.contexts.store import ContextStore, write_store
from lorsa_lens.data import ActivationStream, fingerprint, open_documents, pack, special_token_ids
from lorsa_lens.data.contexts import Contexts
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.lorsa import Lorsa


def collect_contexts(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    tokens: Any,
    path: str | Path,
    *,
    context_size: int = 128,
    n_top: int = 16,
    n_sampled: int = 32,
    max_tokens: int | None = None,
    batch_size: int = 8,
    checkpoint_every: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> ContextStore:
    """Find the contexts of every head in one pass over a corpus.

    Memory holds one batch of activations and `n_top + n_sampled` z patterns per head, whatever
    the length of the corpus. After every `checkpoint_every` batches the pass is saved beside
    `path`; called again after it was cut short, it goes on from there, to the same file. A
    finished file is opened as it is.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: one, or several for different layers.
        tokens: the corpus, as `lorsa_lens.data.open_documents` takes it.
        path: the SQLite file to write.
        context_size: positions per context.
        n_top: contexts kept for each head by their largest `|z|`.
        n_sampled: contexts drawn alike from all in which the head stays.
        max_tokens: end after so many tokens of the corpus. None: go through it once.
        batch_size: contexts at a time.
        checkpoint_every: batches between two checkpoints.
        seed: for the sample.
        progress: show a progress bar.

    Raises:
        ValueError: if a number is not positive, or the file or its checkpoint is of another pass.
    """
    numbers = {"n_top": n_top, "n_sampled": n_sampled, "checkpoint_every": checkpoint_every}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} = {number} must be positive")
    chosen = {lorsa.cfg.layer: lorsa for lorsa in _listed(lorsas)}
    layers = {layer: lorsa for layer, lorsa in chosen.items() if layer is not None}
    if not layers or len(layers) < len(_listed(lorsas)):
        raise ValueError("lorsas must be of different layers, each with a cfg.layer")
    contexts = packed(model, tokens, context_size)
    stream = ActivationStream(model, contexts, list(layers), batch_size=batch_size)
    meta = {
        "lorsas": {str(layer): fingerprint(lorsa) for layer, lorsa in sorted(layers.items())},
        "corpus": stream.contexts.description,
        "context_size": context_size,
        "n_top": n_top,
        "n_sampled": n_sampled,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    path = Path(path)
    if path.exists():
        return _finished(path, meta)
    sizes = Sizes(n_top, n_sampled, context_size)
    run = _Pass(layers, stream, meta, Path(f"{path}.checkpoint"), sizes)
    run.resume()
    run.go(max_tokens, checkpoint_every, progress)
    write_store(path, run.heads, run.tokens, run.n_counted, meta)
    run.checkpoint.unlink(missing_ok=True)
    return ContextStore(path)


def _listed(lorsas: Lorsa | Iterable[Lorsa]) -> list[Lorsa]:
    return [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)


def packed(model: nn.Module, tokens: Any, context_size: int) -> Contexts:
    """A corpus as contexts of one length, in its own order.

    Args:
        model: whose tokenizer reads text and says what contexts begin with.
        tokens: as `lorsa_lens.data.open_documents` takes it.
        context_size: positions per context.
    """
    tokenizer = getattr(model, "tokenizer", None)
    is_ids = isinstance(tokens, str | os.PathLike) and Path(tokens).suffix in (".npy", ".bin")
    is_text = isinstance(tokens, str | os.PathLike) and not is_ids
    return pack(
        open_documents(tokens, tokenizer=tokenizer if is_text else None),
        context_size,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        special_token_ids=special_token_ids(tokenizer) if tokenizer is not None else (),
    )


def _finished(path: Path, meta: dict[str, Any]) -> ContextStore:
    store = ContextStore(path)
    try:
        _check_same(path, store.meta, meta)
    except ValueError:
        store.close()
        raise
    return store


def _check_same(path: Path, found: dict[str, Any], meta: dict[str, Any]) -> None:
    for name, value in meta.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} is of another pass, with {name} = {found.get(name)!r} and not {value!r}: "
                "remove it, or give another path"
            )


@dataclass
class _Pass:
    """A pass under way."""

    lorsas: dict[int, Lorsa]
    stream: ActivationStream
    meta: dict[str, Any]
    checkpoint: Path
    sizes: Sizes
    heads: dict[int, LayerHeads] = field(init=False)
    tokens: dict[int, Int[Tensor, " pos"]] = field(default_factory=dict)
    n_contexts: int = 0
    n_counted: int = 0

    def __post_init__(self) -> None:
        self.heads = {
            layer: LayerHeads.empty(lorsa.cfg.n_ov_heads, self.sizes)
            for layer, lorsa in self.lorsas.items()
        }

    def go(self, max_tokens: int | None, checkpoint_every: int, progress: bool) -> None:
        """Go through the corpus from the place where the pass is."""
        n_pos = self.sizes.n_pos
        bar = tqdm(
            desc="reading heads",
            total=max_tokens,
            initial=self.n_contexts * n_pos,
            unit="token",
            unit_scale=True,
            disable=not progress,
        )
        if max_tokens is not None and self.n_contexts * n_pos >= max_tokens:
            return
        with bar:
            for number, batch in enumerate(self.stream, start=1):
                for layer, lorsa in self.lorsas.items():
                    self.heads[layer].add(
                        lorsa,
                        batch.records[layer],
                        batch.counted,
                        self.n_contexts,
                        int(self.meta["seed"]),
                    )
                rows = enumerate(batch.tokens.cpu(), start=self.n_contexts)
                self.tokens.update({context: row.clone() for context, row in rows})
                self.n_contexts += len(batch.tokens)
                self.n_counted += int(batch.counted.sum())
                bar.update(batch.tokens.numel())
                if max_tokens is not None and self.n_contexts * n_pos >= max_tokens:
                    break
                if number % checkpoint_every == 0:
                    self.save(batch.state)
        self._forget_unkept()

    def _forget_unkept(self) -> None:
        """Drop contexts that no head keeps."""
        kept = [k.context for heads in self.heads.values() for k in (heads.top, heads.sample)]
        wanted = set(torch.cat([context.flatten() for context in kept]).tolist())
        self.tokens = {n: row for n, row in self.tokens.items() if n in wanted}

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, atomically."""
        self._forget_unkept()
        tensors: dict[str, Tensor] = {}
        for layer, heads in self.heads.items():
            tensors |= heads.tensors(str(layer))
        tensors["context_numbers"] = torch.tensor(list(self.tokens))
        tensors["context_tokens"] = torch.stack(list(self.tokens.values()))
        place = {
            "meta": self.meta,
            "state": state,
            "n_contexts": self.n_contexts,
            "n_counted": self.n_counted,
        }
        with atomic_write(self.checkpoint) as temporary:
            save_file(tensors, temporary, metadata={"place": json.dumps(place)})

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: if it is of another pass.
        """
        if not self.checkpoint.exists():
            return
        with safe_open(self.checkpoint, framework="pt") as file:
            place = json.loads(file.metadata()["place"])
            _check_same(self.checkpoint, place["meta"], self.meta)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.heads = {layer: LayerHeads.from_tensors(tensors, str(layer)) for layer in self.heads}
        numbers = tensors["context_numbers"].tolist()
        self.tokens = dict(zip(numbers, tensors["context_tokens"], strict=True))
        self.n_contexts, self.n_counted = place["n_contexts"], place["n_counted"]
        self.stream.load_state_dict(place["state"])
