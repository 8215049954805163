"""Where a run's activations come from: the language model as it reads, or a cache on disk."""

from typing import Any

import torch
from torch import nn

from lorsa_lens.data import (
    ActivationStream,
    CachedActivations,
    CacheError,
    Contexts,
    contexts_for_model,
)
from lorsa_lens.data.sharing import SharedContexts
from lorsa_lens.data.token_stream import TokenStream
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.validation import ConfigError

SHUFFLE_BUFFER = 512
"""Contexts among which the next one is drawn."""


def activation_source(
    model: nn.Module, tokens: Any, layers: list[int], cfg: TrainingConfig
) -> ActivationStream | CachedActivations:
    """What the layers receive and return, over and over again, in a random order.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: the text, see `lorsa_lens.training.train`; None for a cache.
        layers: which layers.
        cfg: the run's configuration.

    Raises:
        ConfigError: if there is neither text nor a cache, or a number does not fit.
        CacheError: if the cache does not fit the model, the layers or the tokens.
    """
    if cfg.cached_activations_path is not None:
        return _cached(cfg.cached_activations_path, model, tokens, layers, cfg)
    if tokens is None:
        raise ConfigError("tokens = None and cached_activations_path = None: give one of them")
    return ActivationStream(
        model,
        _contexts(model, tokens, cfg),
        layers,
        batch_size=_contexts_per_pass(cfg),
        prefetch=cfg.prefetch_batches,
    )


def token_source(model: nn.Module, tokens: Any, cfg: TrainingConfig) -> TokenStream:
    """The text by itself, over and over again, in the same order as `activation_source` has it.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: the text, see `lorsa_lens.training.train`.
        cfg: the run's configuration.

    Raises:
        ConfigError: if there is no text, or a number does not fit.
    """
    if tokens is None:
        raise ConfigError(f"tokens = None, but objective = {cfg.objective!r} reads the text itself")
    return TokenStream(_contexts(model, tokens, cfg), batch_size=_contexts_per_pass(cfg))


def _contexts(model: nn.Module, tokens: Any, cfg: TrainingConfig) -> Contexts:
    """This process's share of the text, over and over again, shuffled."""
    ranks = Ranks()
    contexts = contexts_for_model(
        model,
        tokens,
        cfg.context_size,
        prepend_bos=cfg.prepend_bos,
        exclude_special_tokens=cfg.exclude_special_tokens,
        n_epochs=None,
    ).shuffled(SHUFFLE_BUFFER, cfg.seed)
    return SharedContexts(contexts, ranks.rank, ranks.n) if ranks.n > 1 else contexts


def _cached(
    folder: str, model: nn.Module, tokens: Any, layers: list[int], cfg: TrainingConfig
) -> CachedActivations:
    ranks = Ranks()
    source = CachedActivations(
        folder,
        model,
        layers,
        batch_size=_contexts_per_pass(cfg),
        shuffle_seed=cfg.seed,
        n_epochs=None,
        prefetch=cfg.prefetch_batches,
        rank=ranks.rank,
        n_ranks=ranks.n,
    )
    if source.manifest.context_size != cfg.context_size:
        raise ConfigError(
            f"context_size = {cfg.context_size}, but the cache in {folder} has contexts of "
            f"{source.manifest.context_size} tokens"
        )
    if tokens is not None:
        _check_tokens(source, model, tokens, cfg)
    return source


def _check_tokens(
    source: CachedActivations, model: nn.Module, tokens: Any, cfg: TrainingConfig
) -> None:
    """Refuse tokens whose first contexts are not those of the cache."""
    contexts = contexts_for_model(
        model,
        tokens,
        cfg.context_size,
        prepend_bos=cfg.prepend_bos,
        exclude_special_tokens=cfg.exclude_special_tokens,
        n_epochs=1,
    )
    cached = next(iter(CachedActivations(source.folder, layers=[], batch_size=source.batch_size)))
    given = contexts.next_batch(len(cached.tokens))
    if (
        given is None
        or not torch.equal(given.tokens, cached.tokens)
        or not torch.equal(given.counted, cached.counted)
    ):
        raise CacheError(
            f"the cache in {source.folder} was made from {source.manifest.source}, and the tokens "
            f"given are {contexts.description}; they, or which of them count, differ: give the "
            "same, or no tokens"
        )


def _contexts_per_pass(cfg: TrainingConfig) -> int:
    """Contexts that go through the model at once, in this process."""
    ranks = Ranks()
    n_parts = cfg.gradient_accumulation_steps * ranks.n
    if cfg.batch_size % n_parts:
        raise ConfigError(
            f"the {cfg.batch_size} contexts of a batch must divide among {ranks.n} processes with "
            f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps}"
        )
    return cfg.batch_size // n_parts
