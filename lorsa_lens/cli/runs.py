"""What several commands read of a run's directory."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from lorsa_lens.lorsa import Lorsa

Model = Annotated[
    str | None, typer.Option(help="The model, where it is not at the run's path any more.")
]
Layers = Annotated[list[int] | None, typer.Option(help="These layers only. Repeat the option.")]
Tables = Annotated[
    Path | None, typer.Option(help="Folder of `lorsa-lens heads`. Else RUN_DIR/heads.")
]


def read_run(run_dir: Path, model: str | None, tokens: str | None) -> dict[str, Any]:
    """The run's configuration, with what was given in place of it."""
    from lorsa_lens.training.folders import RUN_CONFIG_FILE
    from lorsa_lens.validation import read_fields

    file = run_dir / RUN_CONFIG_FILE
    fields = read_fields(file) if file.is_file() else {}
    given = {"model": model, "tokens": tokens}
    run = {**fields, **{name: value for name, value in given.items() if value is not None}}
    if missing := [name for name in given if name not in run]:
        raise ValueError(f"there is no {file}: give --{' and --'.join(missing)}")
    return run


def load_lorsas(run_dir: Path, layers: list[int] | None) -> dict[int, "Lorsa"]:
    """By layer, the Lorsas of a run: those asked for, or all."""
    from lorsa_lens.lorsa import Lorsa
    from lorsa_lens.training.folders import LORSAS, saved_lorsas

    found = saved_lorsas(run_dir / LORSAS)
    chosen = layers if layers else list(found)
    for layer in chosen:
        if layer not in found:
            raise ValueError(f"{run_dir}/{LORSAS} has no layer {layer}: it has {list(found)}")
    if not chosen:
        raise ValueError(f"there are no Lorsas in {run_dir}/{LORSAS}: has the run ended?")
    return {layer: Lorsa.from_pretrained(found[layer]) for layer in chosen}


def read_text(model: Any, tokens: str, n_sequences: int, context_size: int) -> "Tensor":
    """The first sequences of a text, Int[Tensor, "batch pos"]."""
    import torch

    from lorsa_lens.analysis.contexts.collect import packed

    sequences = packed(model, tokens, context_size)
    rows = [torch.from_numpy(context.tokens) for context in islice(sequences, n_sequences)]
    if len(rows) < min(2, n_sequences):
        raise ValueError(f"{tokens} has too few tokens for two sequences of {context_size}")
    return torch.stack(rows)
