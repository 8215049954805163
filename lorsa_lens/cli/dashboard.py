"""`lorsa-lens dashboard`."""

from pathlib import Path
from typing import Annotated

import typer

from lorsa_lens.cli.options import mistakes_in_one_line
from lorsa_lens.cli.runs import load_lorsas, read_run, read_text


def dashboard(
    run_dir: Annotated[
        Path, typer.Argument(help="A run that `lorsa-lens heads` has named.", file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the site.")],
    tables: Annotated[
        Path | None, typer.Option(help="Folder of `lorsa-lens heads`. Else RUN_DIR/heads.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model, where it is not at the run's path any more.")
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="These layers only. Repeat the option.")
    ] = None,
    excerpts: Annotated[int, typer.Option(min=0, max=16, help="Contexts per head.")] = 6,
    n_prompts: Annotated[int, typer.Option(min=0, help="Prompts of the gallery.")] = 8,
    context_size: Annotated[int, typer.Option(min=8, help="Tokens per prompt.")] = 48,
) -> None:
    """Write a static site of all heads: a table, a page for each, and prompts. No server needed."""
    from rich.console import Console

    console = Console()
    with mistakes_in_one_line():
        run = read_run(run_dir, model, None)
        lorsas = load_lorsas(run_dir, layers)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.dashboard import read_prompts, stored_heads, write_site
        from lorsa_lens.hosts.loading import load_host

        host_model = load_host(run["model"], device=run.get("device", "cpu"))
        folder = run_dir / "heads" if tables is None else tables
        heads = stored_heads(host_model, lorsas, folder, n_excerpts=excerpts)
        prompts = []
        if n_prompts:
            text = read_text(host_model, run["tokens"], n_prompts, context_size)
            prompts = read_prompts(host_model, lorsas, text)
        page = write_site(out, heads, title=f"Lorsa heads of {run['model']}", prompts=prompts)
    console.print(f"Open [bold]{page}[/bold]")
