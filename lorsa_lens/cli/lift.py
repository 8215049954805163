"""`lorsa-lens lift`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lorsa_lens.cli.options import mistakes_in_one_line, with_options
from lorsa_lens.config import ActFn
from lorsa_lens.validation import Config, ConfigError, read_fields


@dataclass(frozen=True, kw_only=True)
class LiftConfig(Config):
    """Which layers become Lorsas, and how."""

    MAY_BE_ZERO = frozenset({"layers", "seed"})

    model: str
    """A folder with a Hugging Face model and its tokenizer, or an id on the hub."""

    output_path: str
    """The Lorsas go to `blocks.N` in this folder."""

    layers: tuple[int, ...] | None = None
    """Layers to lift. None: all."""

    init: Literal["exact", "tied", "svd", "random"] | None = None
    """`exact` is the layer itself, the others start a training: see `lorsa_lens.lift`. None:
    `exact`, or `tied` if there are sizes that are not the layer's own."""

    n_ov_heads: int | None = None
    """Rank-1 heads of each Lorsa. None: as many as the layer's heads have dimensions together."""

    n_qk_heads: int | None = None
    """Query-key circuits of each Lorsa. None: one for each attention head of the layer."""

    k: int | None = None
    """Heads that stay per token. None: all."""

    act_fn: ActFn = "topk"
    """How heads are selected: see `LorsaConfig.act_fn`."""

    seed: int = 0
    """For what is drawn at random."""

    device: str = "cpu"
    """Where the model is."""


@with_options(LiftConfig)
def lift(
    file: Path | None,
    overrides: dict[str, Any],
    overwrite: Annotated[bool, typer.Option(help="Replace Lorsas that are there.")] = False,
) -> None:
    """Make Lorsas from attention layers: equal to them, or the start of a training.

    Example: lorsa-lens lift --model gpt2 --layers 5 --output-path lifted
    """
    from rich.console import Console

    from lorsa_lens.hosts import host_of
    from lorsa_lens.hosts.loading import load_host
    from lorsa_lens.lift import lift as lifted

    sizes = ("n_ov_heads", "n_qk_heads", "k", "act_fn")
    with mistakes_in_one_line():
        cfg = LiftConfig.from_dict({**({} if file is None else read_fields(file)), **overrides})
        changes = {name: getattr(cfg, name) for name in sizes if getattr(cfg, name) is not None}
        model = load_host(cfg.model, device=cfg.device)
        layers = range(host_of(model).n_layers) if cfg.layers is None else cfg.layers
        folders = {layer: Path(cfg.output_path) / f"blocks.{layer}" for layer in layers}
        there = [str(folder) for folder in folders.values() if folder.exists()]
        if there and not overwrite:
            raise ConfigError(f"{', '.join(there)}: there already; give --overwrite to replace")
        for layer, folder in folders.items():
            lorsa = lifted(model, layer, init=cfg.init, seed=cfg.seed, **changes)
            lorsa.save_pretrained(folder)
            Console(soft_wrap=True).print(
                f"layer {layer}: {lorsa.cfg.n_qk_heads} query-key circuits, "
                f"{lorsa.cfg.n_ov_heads} heads, K {lorsa.cfg.k or 'all'}, in {folder}"
            )
