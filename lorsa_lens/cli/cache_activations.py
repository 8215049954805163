"""`lorsa-lens cache-activations`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorsa_lens.cli.options import mistakes_in_one_line, with_options
from lorsa_lens.config import Dtype
from lorsa_lens.validation import Config, read_fields


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    """What to cache, from what, and where."""

    MAY_BE_ZERO = frozenset({"layers"})

    model: str
    """A folder with a Hugging Face model and its tokenizer, or an id on the hub."""

    tokens: str
    """Text or token ids: a .txt, .jsonl, .npy or .bin file, or the name of a dataset."""

    output_path: str
    """A new folder for the cache."""

    layers: tuple[int, ...] | None = None
    """Layers to cache. None: all."""

    n_tokens: int = 2_000_000
    """Tokens to cache, rounded up to whole contexts; the text is gone through once."""

    context_size: int = 128
    """Tokens of a context."""

    model_batch_size: int = 32
    """Contexts in one pass of the language model."""

    prepend_bos: bool = True
    """Begin each context with the tokenizer's BOS, if it has one."""

    exclude_special_tokens: bool = True
    """Mark BOS, EOS and padding as not counting in a loss."""

    dtype: Dtype | None = None
    """Precision of the activations on disk. None: the model's own."""

    device: str = "cpu"
    """Where the model runs."""


@with_options(CacheConfig)
def cache_activations(
    file: Path | None,
    overrides: dict[str, Any],
    dry_run: Annotated[
        bool, typer.Option(help="Say how much disk it takes, and write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with a cache that was interrupted.")] = False,
) -> None:
    """Write what attention layers receive and return to disk, to train on without the model.

    Example: lorsa-lens cache-activations --model gpt2 --tokens text.txt --output-path cache, then
    lorsa-lens train --model gpt2 --cached-activations-path cache
    """
    import torch
    from rich.console import Console

    from lorsa_lens.data import ActivationStream, contexts_for_model
    from lorsa_lens.data import cache_activations as write
    from lorsa_lens.data.cache import cache_size, in_words
    from lorsa_lens.hosts import host_of
    from lorsa_lens.hosts.loading import load_host

    with mistakes_in_one_line():
        cfg = CacheConfig.from_dict({**({} if file is None else read_fields(file)), **overrides})
        model = load_host(cfg.model, device=cfg.device)
        contexts = contexts_for_model(
            model,
            cfg.tokens,
            cfg.context_size,
            prepend_bos=cfg.prepend_bos,
            exclude_special_tokens=cfg.exclude_special_tokens,
        )
        layers = range(host_of(model).n_layers) if cfg.layers is None else cfg.layers
        stream = ActivationStream(model, contexts, layers, batch_size=cfg.model_batch_size)
        dtype = None if cfg.dtype is None else getattr(torch, cfg.dtype)
        size = cache_size(stream, cfg.n_tokens, dtype)
        console = Console(soft_wrap=True)
        console.print(
            f"{size.n_tokens:,} tokens of {len(stream.layers)} layers take "
            f"{in_words(size.n_bytes)} in {cfg.output_path}"
        )
        if dry_run:
            return
        written = write(
            stream, cfg.output_path, n_tokens=cfg.n_tokens, dtype=dtype, resume=resume,
            progress=True,
        )  # fmt: skip
        console.print(f"{written.n_tokens:,} tokens are cached, in {in_words(written.n_bytes)}")
