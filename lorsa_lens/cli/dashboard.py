"""`lorsa-lens dashboard`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorsa_lens.cli.options import mistakes_in_one_line
from lorsa_lens.cli.runs import Layers, Model, Tables, load_lorsas, read_run, read_text

if TYPE_CHECKING:
    from lorsa_lens.lorsa import Lorsa

EXCERPTS, N_PROMPTS, CONTEXT_SIZE = 6, 8, 48
"""Contexts per head, prompts of the gallery, and tokens of each."""


def dashboard(
    run_dir: Annotated[
        Path, typer.Argument(help="A run that `lorsa-lens heads` has named.", file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the site.")],
    tables: Tables = None,
    model: Model = None,
    layers: Layers = None,
    excerpts: Annotated[int, typer.Option(min=0, max=16, help="Contexts per head.")] = EXCERPTS,
    n_prompts: Annotated[int, typer.Option(min=0, help="Prompts of the gallery.")] = N_PROMPTS,
    context_size: Annotated[int, typer.Option(min=8, help="Tokens per prompt.")] = CONTEXT_SIZE,
) -> None:
    """Write a static site of all heads: a table, a page for each, and prompts. No server needed."""
    from rich.console import Console

    console = Console()
    with mistakes_in_one_line():
        run = read_run(run_dir, model, None)
        lorsas = load_lorsas(run_dir, layers)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.hosts.loading import load_host

        host_model = load_host(run["model"], device=run.get("device", "cpu"))
        folder = run_dir / "heads" if tables is None else tables
        page = write_dashboard(
            host_model, lorsas, run, folder, out, excerpts, n_prompts, context_size
        )
    console.print(f"Open [bold]{page}[/bold]")


def write_dashboard(
    model: Any,
    lorsas: dict[int, "Lorsa"],
    run: dict[str, Any],
    tables: Path,
    out: Path,
    excerpts: int = EXCERPTS,
    n_prompts: int = N_PROMPTS,
    context_size: int = CONTEXT_SIZE,
    *,
    served: bool = False,
) -> Path:
    """Write the site from the tables of a run."""
    from lorsa_lens.dashboard import read_prompts, stored_heads, write_site

    heads = stored_heads(model, lorsas, tables, n_excerpts=excerpts)
    prompts = []
    if n_prompts:
        text = read_text(model, run["tokens"], n_prompts, context_size)
        prompts = read_prompts(model, lorsas, text)
    title = f"Lorsa heads of {run['model']}"
    return write_site(out, heads, title=title, prompts=prompts, served=served)
