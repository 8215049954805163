"""`lorsa-lens train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorsa_lens.cli.options import mistakes_in_one_line, with_options
from lorsa_lens.training.run_config import RunConfig
from lorsa_lens.validation import ConfigError, read_fields


@with_options(RunConfig)
def train(
    file: Path | None,
    overrides: dict[str, Any],
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint in the output path.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Say how much memory and disk the run takes, and do not train.")
    ] = False,
    trial_steps: Annotated[
        int,
        typer.Option(
            min=0, help="With --dry-run: train so many steps, leave nothing behind, and measure."
        ),
    ] = 0,
) -> None:
    """Train Lorsas on layers of a model, from a file of fields, options, or both.

    The options go before the file's fields. Example: lorsa-lens train run.yaml --lr 0.001
    """
    from rich.console import Console

    from lorsa_lens.training.run import run

    try:
        with mistakes_in_one_line():
            cfg = RunConfig.from_dict({**({} if file is None else read_fields(file)), **overrides})
            if trial_steps and not dry_run:
                raise ConfigError(f"--trial-steps {trial_steps} goes with --dry-run")
            if dry_run:
                _print_needs(cfg, trial_steps)
                return
            run(cfg, resume=resume)
    except KeyboardInterrupt:
        Console().print("Stopped; a checkpoint is saved. Go on with --resume.")
        raise typer.Exit(130) from None
    Console(soft_wrap=True).print(f"The Lorsas are in [bold]{cfg.output_path}/lorsas[/bold]")


def _print_needs(cfg: RunConfig, trial_steps: int) -> None:
    """A table of the memory and the disk that a run takes."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from lorsa_lens.data.cache import in_words
    from lorsa_lens.hosts.loading import load_host
    from lorsa_lens.training.memory import estimate_memory, resident_bytes
    from lorsa_lens.training.trial import trial_peak

    base, device = resident_bytes(), cfg.device.partition(":")[0]
    model = load_host(cfg.model, device="meta", dtype=getattr(torch, cfg.model_dtype))
    needs = estimate_memory(model, cfg.training(), cfg.layers, device=device)
    table = Table(title=f"Memory of this run on {device}")
    table.add_column("held for", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for name in (
        "language_model", "weights", "gradients", "optimizer", "batch", "lorsa_step",
        "model_activations", "prefetched", "scaling", "saving",
    ):  # fmt: skip
        table.add_row(_ROWS[name], in_words(getattr(needs, name)))
    table.add_section()
    table.add_row("peak", in_words(needs.peak), style="bold")
    table.add_section()
    if base is not None:
        table.add_row("interpreter and packages, besides", in_words(base))
    table.add_row("text to be shuffled, besides", in_words(needs.shuffling))
    if trial_steps:
        held = in_words(trial_peak(cfg, trial_steps))
        table.add_row(f"all together, measured in {trial_steps} steps", held, style="bold")
    table.add_row("disk", in_words(needs.disk))
    Console().print(table)


_ROWS = {
    "language_model": "language model",
    "weights": "Lorsas: weights",
    "gradients": "Lorsas: gradients",
    "optimizer": "Lorsas: Adam",
    "batch": "activations of a batch, all layers",
    "lorsa_step": "one Lorsa's step",
    "model_activations": "one pass of the language model",
    "prefetched": "batches prepared ahead",
    "scaling": "(before the first step: scales)",
    "saving": "(between steps: a checkpoint)",
}
