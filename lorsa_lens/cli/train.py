"""`lorsa-lens train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorsa_lens.cli.options import with_options
from lorsa_lens.training.run_config import RunConfig
from lorsa_lens.validation import read_fields


@with_options(RunConfig)
def train(
    file: Path | None,
    overrides: dict[str, Any],
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint in the output path.")
    ] = False,
) -> None:
    """Train Lorsas on layers of a model, from a file of fields, options, or both.

    The options go before the file's fields. Example: lorsa-lens train run.yaml --lr 0.001
    """
    from rich.console import Console

    from lorsa_lens.training.run import run

    try:
        values = {} if file is None else read_fields(file)
        cfg = RunConfig.from_dict({**values, **overrides})
        run(cfg, resume=resume)
    except KeyboardInterrupt:
        Console().print("Stopped; a checkpoint is saved. Go on with --resume.")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"The Lorsas are in [bold]{cfg.output_path}/lorsas[/bold]")
