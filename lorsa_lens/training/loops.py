"""The front door of training: a model, some text, and Lorsas of its layers come back."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.config import LorsaConfig
from lorsa_lens.data.in_memory import RecordedActivations
from lorsa_lens.hosts import Host, host_of
from lorsa_lens.lift import lift
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.parts import Source
from lorsa_lens.training.sources import activation_source, token_source
from lorsa_lens.training.trainer import Trainer
from lorsa_lens.validation import ConfigError


def train(
    model: nn.Module,
    tokens: Any = None,
    layers: Iterable[int] | None = None,
    config: TrainingConfig | None = None,
    *,
    lorsas: Mapping[int, Lorsa] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[int, Lorsa]:
    """Train a Lorsa on each of several layers, side by side, from one pass over the text.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: the text: token ids as a tensor or lists, a `.npy`, `.bin`, `.txt` or `.jsonl`
            file, or a Hugging Face dataset or its name; see `lorsa_lens.data.open_documents`. With
            `config.cached_activations_path` they may be left out; if given, they must be those
            that the cache was made from.
        layers: which layers. None: all.
        config: everything else. None: the defaults.
        lorsas: by layer, what to train, in place; their sizes are their own. None: as
            `config.start_from` and `config.init` say.
        resume: go on from the newest checkpoint in `config.output_path`, if there is one.
        progress: show a progress bar.

    Returns:
        By layer, the trained Lorsas; they are also saved if `config.output_path` says where. Of
        several processes, each returns those that it has: all (`parallel = "data"`), those of its
        layers (`"layers"`), or the first one all and the others none (`"sharded"`, `"heads"`).

    Raises:
        ConfigError: if the configuration does not fit the model.
        UnsupportedAttentionError: if a Lorsa cannot stand in for a layer's attention.
        FileExistsError: if there is a run in `config.output_path` already, and `resume` is off.
        ValueError: if the text is too short, or holds ids outside the vocabulary.
        CacheError: if a cache of activations does not fit the model, the layers or the tokens.

    Example:
        >>> lorsas = train(model, "text.txt", layers=[5])  # doctest: +SKIP
    """
    cfg = TrainingConfig() if config is None else config
    host = host_of(model)
    chosen = list(range(host.n_layers)) if layers is None else list(layers)
    if cfg.start_from is not None:
        _check_start(Path(cfg.start_from), chosen)
    start: Mapping[int, Lorsa] = InitialLorsas(host, chosen, cfg)
    if lorsas is not None:
        if missing := [layer for layer in chosen if layer not in lorsas]:
            raise ConfigError(f"lorsas has none for layers {missing}: give one for each layer")
        start, cfg = {layer: lorsas[layer] for layer in chosen}, cfg.replace(fit_initial_gain=False)
    if cfg.objective == "reconstruction":
        source: Source = activation_source(model, tokens, chosen, cfg)
    else:
        source = token_source(model, tokens, cfg)
    return Trainer(start, source, cfg, model=model, resume=resume).run(progress=progress)


def _check_start(folder: Path, layers: list[int]) -> None:
    """Refuse a folder that does not hold a Lorsa for each layer."""
    for layer in layers:
        file = folder / f"blocks.{layer}" / "config.json"
        if not file.is_file():
            raise ConfigError(f"start_from = {str(folder)!r}: there is no {file}")
        own = LorsaConfig.from_json(file).layer
        if own != layer:
            raise ConfigError(
                f"start_from = {str(folder)!r}: what lies in blocks.{layer} is for layer {own}"
            )


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


class InitialLorsas(Mapping[int, Lorsa]):
    """The Lorsas that a run starts from, made anew each time that they are asked for.

    So a process that trains only some layers, or some heads of each, never holds them all.

    Args:
        host: the model.
        layers: which layers.
        cfg: the run's configuration.
    """

    def __init__(self, host: Host, layers: list[int], cfg: TrainingConfig) -> None:
        self.host, self.layers, self.cfg = host, layers, cfg

    @override
    def __getitem__(self, layer: int) -> Lorsa:
        return initial_lorsa(self.host, layer, self.cfg)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    @override
    def __len__(self) -> int:
        return len(self.layers)


def initial_lorsa(host: Host, layer: int, cfg: TrainingConfig) -> Lorsa:
    """The Lorsa that a run starts from: a saved one, or one made from the layer."""
    if cfg.start_from is not None:
        device = next(host.model.parameters()).device
        return Lorsa.from_pretrained(Path(cfg.start_from) / f"blocks.{layer}", device=device)
    n_qk_heads = cfg.n_qk_heads or int(host.read_attention(layer).W_Q.shape[0])
    n_ov_heads = cfg.n_ov_heads or max(1, 8 * host.d_model // n_qk_heads) * n_qk_heads
    k = cfg.k
    if k is None and cfg.act_fn not in ("relu", "jumprelu"):
        k = min(n_ov_heads, max(4, host.d_model // 12))
    precision = next(host.model.parameters()).dtype
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
        dtype=str(torch.promote_types(precision, torch.float32)).removeprefix("torch."),
    )
