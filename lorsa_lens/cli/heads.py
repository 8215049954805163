"""`lorsa-lens heads`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorsa_lens.cli.runs import Layers, Model, load_lorsas, read_run, read_text

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
    model: Model = None,
    layers: Layers = None,
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
        run = read_run(run_dir, model, tokens)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.analysis.report import head_tables, save_tables
        from lorsa_lens.hosts.loading import load_host

        host_model = load_host(run["model"], device=run.get("device", "cpu"))
        lorsas = load_lorsas(run_dir, layers)
        text = read_text(host_model, run["tokens"], n_sequences, context_size)
        tables = head_tables(host_model, lorsas, text, n_prompts=n_prompts)
        save_tables(tables, folder)
        if contexts:
            _collect(host_model, lorsas, run["tokens"], folder, contexts, context_size)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    _print_named(console, tables["named"])
    _print_spans(console, tables["spans"])
    if "operands" in tables:
        _print_operands(console, tables["operands"])
    console.print(f"\nThe tables are in [bold]{folder}[/bold]")


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


def _print_operands(console: "Console", operands: "DataFrame", n: int = 10) -> None:
    """The heads whose strength depends most on an operand of a sum."""
    from rich.table import Table

    from lorsa_lens.analysis.behaviours.find import MAX_P

    known = operands[(operands["p_value"] <= MAX_P) & (operands["explained"] > 0)]
    table = Table(title="Heads by the operand of a+b= that they fetch")
    for column in ("operand", "by", "values", "head", "attended", "score"):
        table.add_column(column, justify="right" if column in ("attended", "score") else "left")
    for row in known.sort_values("score", ascending=False).head(n).itertuples():
        values = str(row.low) if row.low == row.high else f"{row.low} to {row.high}"
        table.add_row(
            row.operand, row.by, values, row.name, f"{row.attended:.2f}", f"{row.score:.2f}"
        )
    console.print(table if len(known) else "No head depends on the operands of sums.")
