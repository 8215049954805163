"""The front door of training: a model, some text, and Lorsas of its layers come back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lorsa_lens.data import ActivationStream, open_documents, pack, special_token_ids
from lorsa_lens.data.hugging_face import is_dataset
from lorsa_lens.data.in_memory import RecordedActivations
from lorsa_lens.data.sharing import SharedContexts
from lorsa_lens.hosts import Host, host_of
from lorsa_lens.lift import lift
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.training.trainer import Trainer
from lorsa_lens.validation import ConfigError

SHUFFLE_BUFFER = 512
"""Contexts among which the next one is drawn."""


def train(
    model: nn.Module,
    tokens: Any,
    layers: Iterable[int] | None = None,
    config: TrainingConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[int, Lorsa]:
    """Train a Lorsa on each of several layers, side by side, from one pass over the text.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: the text: token ids as a tensor or lists, a `.npy`, `.bin`, `.txt` or `.jsonl`
            file, or a Hugging Face dataset or its name; see `lorsa_lens.data.open_documents`.
        layers: which layers. None: all.
        config: everything else. None: the defaults.
        resume: go on from the newest checkpoint in `config.output_path`, if there is one.
        progress: show a progress bar.

    Returns:
        By layer, the trained Lorsas; they are also saved if `config.output_path` says where.

    Raises:
        ConfigError: if the configuration does not fit the model.
        UnsupportedAttentionError: if a Lorsa cannot stand in for a layer's attention.
        FileExistsError: if there is a run in `config.output_path` already, and `resume` is off.
        ValueError: if the text is too short, or holds ids outside the vocabulary.

    Example:
        >>> lorsas = train(model, "text.txt", layers=[5])  # doctest: +SKIP
    """
    cfg = TrainingConfig() if config is None else config
    host = host_of(model)
    chosen = list(range(host.n_layers)) if layers is None else list(layers)
    lorsas = {layer: initial_lorsa(host, layer, cfg) for layer in chosen}
    stream = activation_stream(model, tokens, chosen, cfg)
    return Trainer(lorsas, stream, cfg, resume=resume).run(progress=progress)


def train_on(
    lorsas: dict[int, Lorsa],
    records: dict[int, AttentionRecord],
    config: TrainingConfig | None = None,
    *,
    counted: Bool[Tensor, "batch pos"] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[int, Lorsa]:
    """Train Lorsas, in place, on records in memory: little text, gone through many times.

    Args:
        lorsas: by layer, what to train, best made with `Lorsa.from_attention`. Their sizes are
            their own; those in the configuration do not matter.
        records: by layer, from `record_attention`.
        config: everything else; each step takes `train_batch_size_tokens` tokens of whole
            sequences, at least one sequence and at most all.
        counted: positions that count in the loss. None: all.
        resume: go on from the newest checkpoint in `config.output_path`, if there is one.
        progress: show a progress bar.

    Returns:
        The Lorsas.
    """
    cfg = TrainingConfig() if config is None else config
    n_sequences, n_pos, _ = next(iter(records.values())).x.shape
    source = RecordedActivations(
        records,
        torch.zeros(n_sequences, n_pos, dtype=torch.long),
        batch_size=min(n_sequences, max(1, cfg.train_batch_size_tokens // n_pos)),
        counted=counted,
        seed=cfg.seed,
    )
    return Trainer(lorsas, source, cfg, resume=resume).run(progress=progress)


def initial_lorsa(host: Host, layer: int, cfg: TrainingConfig) -> Lorsa:
    """The Lorsa that a run starts from, with the sizes of the configuration or their defaults."""
    n_qk_heads = cfg.n_qk_heads or int(host.read_attention(layer).W_Q.shape[0])
    n_ov_heads = cfg.n_ov_heads or max(1, 8 * host.d_model // n_qk_heads) * n_qk_heads
    k = cfg.k
    if k is None and cfg.act_fn not in ("relu", "jumprelu"):
        k = min(n_ov_heads, max(4, host.d_model // 12))
    return lift(
        host.model,
        layer,
        init=cfg.init,
        seed=cfg.seed,
        n_qk_heads=n_qk_heads,
        n_ov_heads=n_ov_heads,
        k=k,
        act_fn=cfg.act_fn,
        output_site=cfg.output_site,
    )


def activation_stream(
    model: nn.Module, tokens: Any, layers: list[int], cfg: TrainingConfig
) -> ActivationStream:
    """What the layers receive and return, for the text over and over again, shuffled."""
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None) if cfg.prepend_bos else None
    excluded = cfg.exclude_special_tokens and tokenizer is not None
    contexts = pack(
        open_documents(tokens, tokenizer=tokenizer if _is_text(tokens) else None),
        cfg.context_size,
        bos_token_id=bos,
        special_token_ids=special_token_ids(tokenizer) if excluded else (),
        n_epochs=None,
    )
    ranks = Ranks()
    n_parts = cfg.gradient_accumulation_steps * ranks.n
    if cfg.batch_size % n_parts:
        raise ConfigError(
            f"the {cfg.batch_size} contexts of a batch must divide among {ranks.n} processes with "
            f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps}"
        )
    shuffled = contexts.shuffled(SHUFFLE_BUFFER, cfg.seed)
    return ActivationStream(
        model,
        SharedContexts(shuffled, ranks.rank, ranks.n) if ranks.n > 1 else shuffled,
        layers,
        batch_size=cfg.batch_size // n_parts,
        prefetch=cfg.prefetch_batches,
    )


def _is_text(tokens: Any) -> bool:
    """Whether it may hold text, which a tokenizer must read, rather than token ids."""
    if isinstance(tokens, str | Path):
        return Path(tokens).suffix not in (".npy", ".bin")
    return is_dataset(tokens)
