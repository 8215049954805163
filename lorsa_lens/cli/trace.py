"""`lorsa-lens trace`."""

from pathlib import Path
from typing import Annotated

import typer


def trace(
    model: Annotated[
        str, typer.Option(help="A folder with a Hugging Face model, or an id on the hub.")
    ],
    prompt: Annotated[str, typer.Option(help="The text, up to where the answer is said.")],
    answer: Annotated[str, typer.Option(help="The token to explain, with its leading space.")],
    wrong: Annotated[
        str | None,
        typer.Option(help="A token to compare with: then the logit difference is traced."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the page and the graph.", file_okay=False)
    ] = Path("lorsa_trace"),
) -> None:
    """Trace which heads and singular vectors make a model say an answer.

    Writes circuit.html, circuit.json, circuit.graphml and circuit-tracer.json.
    """
    from rich.console import Console

    console = Console()
    console.print("Loading TransformerLens ...")
    from lorsa_lens.hosts.loading import load_host
    from lorsa_lens.singular.prompt import save_all, trace_prompt

    try:
        host = load_host(model)
        circuit = trace_prompt(host, prompt, answer, wrong)
        if not circuit.nodes:
            console.print("Nothing to trace: nothing writes towards that answer.")
            raise typer.Exit(1)
        page = save_all(circuit, out, slug=Path(model).name or model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    heads = sorted(circuit.heads)
    console.print(
        f"{len(circuit.nodes)} nodes, {len(circuit.edges)} edges, {len(heads)} heads: "
        + " ".join(f"L{layer}.{head}" for layer, head in heads),
        soft_wrap=True,
    )
    console.print(f"The page: [bold]{page.resolve()}[/bold]", soft_wrap=True)
