"""`lorsa-lens heads`."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from lorsa_lens.lorsa import Lorsa


def heads(
    run_dir: Annotated[
        Path, typer.Argument(help="A run that `lorsa-lens train` made.", file_okay=False)
    ],
    tokens: Annotated[
        str | None, typer.Option(help="Text or token ids. Else those that the run was trained on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model, where it is not at the run's path any more.")
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="These layers only. Repeat the option.")
    ] = None,
    n_sequences: Annotated[int, typer.Option(min=2, help="Sequences of text.")] = 128,
    context_size: Annotated[int, typer.Option(min=8, help="Tokens per sequence.")] = 128,
    n_prompts: Annotated[int, typer.Option(min=2, help="Prompts for each behaviour.")] = 64,
    contexts: Annotated[
        int, typer.Option(min=0, help="Also keep contexts of every head from so many tokens.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tables. Else RUN_DIR/heads.")
    ] = None,
) -> None:
    """Name the heads of a run: what they fetch, where they came from, which tokens they join.

    Tables are printed in short and saved in full, as CSV and JSON.
    """
    from rich.console import Console

    console = Console()
    folder = run_dir / "heads" if out is None else out
    try:
        run = _read_run(run_dir, model, tokens)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.analysis.report import head_tables, save_tables
        from lorsa_lens.hosts.loading import load_host

        host_model = load_host(run["model"], device=run.get("device", "cpu"))
        lorsas = _load_lorsas(run_dir, layers)
        text = _read_text(host_model, run["tokens"], n_sequences, context_size)
        tables = head_tables(host_model, lorsas, text, n_prompts=n_prompts)
        save_tables(tables, folder)
        if contexts:
            _collect(host_model, lorsas, run["tokens"], folder, contexts, context_size)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    _print_named(console, tables["named"])
    _print_spans(console, tables["spans"])
    console.print(f"\nThe tables are in [bold]{folder}[/bold]")


def _read_run(run_dir: Path, model: str | None, tokens: str | None) -> dict[str, Any]:
    """The run's configuration, with what was given in place of it."""
    from lorsa_lens.validation import read_fields

    file = run_dir / "run_config.json"
    fields = read_fields(file) if file.is_file() else {}
    given = {"model": model, "tokens": tokens}
    run = {**fields, **{name: value for name, value in given.items() if value is not None}}
    if missing := [name for name in given if name not in run]:
        raise ValueError(f"there is no {file}: give --{' and --'.join(missing)}")
    return run


def _load_lorsas(run_dir: Path, layers: list[int] | None) -> dict[int, "Lorsa"]:
    from lorsa_lens.lorsa import Lorsa

    folders = sorted((run_dir / "lorsas").glob("blocks.*"), key=lambda path: int(path.suffix[1:]))
    found = {int(folder.suffix[1:]): folder for folder in folders}
    chosen = layers if layers else list(found)
    for layer in chosen:
        if layer not in found:
            raise ValueError(f"{run_dir}/lorsas has no layer {layer}: it has {list(found)}")
    if not chosen:
        raise ValueError(f"there are no Lorsas in {run_dir}/lorsas: has the run ended?")
    return {layer: Lorsa.from_pretrained(found[layer]) for layer in chosen}


def _read_text(model: Any, tokens: str, n_sequences: int, context_size: int) -> Any:
    import torch

    from lorsa_lens.analysis.contexts.collect import packed

    sequences = packed(model, tokens, context_size)
    rows = [torch.from_numpy(context.tokens) for context in islice(sequences, n_sequences)]
    if len(rows) < 2:
        raise ValueError(f"{tokens} has too few tokens for two sequences of {context_size}")
    return torch.stack(rows)


def _collect(
    model: Any,
    lorsas: dict[int, "Lorsa"],
    tokens: str,
    folder: Path,
    n_tokens: int,
    context_size: int,
) -> None:
    from lorsa_lens.analysis.contexts import collect_contexts

    collect_contexts(
        model,
        lorsas.values(),
        tokens,
        folder / "contexts.sqlite",
        context_size=context_size,
        max_tokens=n_tokens,
    ).close()


def _print_named(console: "Console", named: "DataFrame") -> None:
    """The strongest rank-1 heads of each behaviour."""
    from rich.table import Table

    heads = named[named["kind"] == "ov"]
    table = Table(title="Heads by what they fetch")
    for column in ("behaviour", "on", "layer", "heads", "attended", "score", "strongest"):
        table.add_column(column, justify="left" if column in ("behaviour", "on") else "right")
    for (behaviour, on, layer), group in heads.groupby(
        ["behaviour", "found_on", "layer"], sort=False
    ):
        attended, score = group["attended"].iloc[0], group["score"].mean()
        names = " ".join(group["name"].head(5))
        cells = (str(layer), str(len(group)), f"{attended:.2f}", f"{score:.2f}", names)
        table.add_row(behaviour, on, *cells)
    console.print(table if len(heads) else "No head has any of the behaviours looked for.")


def _print_spans(console: "Console", spans: "DataFrame") -> None:
    from rich.table import Table

    table = Table(title="Attention heads that a Lorsa head spans")
    for column in ("layer", "attention heads", "Lorsa heads", "share"):
        table.add_column(column, justify="right")
    for row in spans.itertuples():
        table.add_row(str(row.layer), str(row.spanned_heads), str(row.n_heads), f"{row.share:.2f}")
    console.print(table)
