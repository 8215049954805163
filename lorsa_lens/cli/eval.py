"""`lorsa-lens eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorsa_lens.cli.options import mistakes_in_one_line


def evaluate_lorsas(
    lorsas: Annotated[
        list[str],
        typer.Argument(help="A run's directory, or Lorsas: folders, or ids on the hub."),
    ],
    tokens: Annotated[
        str, typer.Option(help="Held-out text or ids: .txt, .jsonl, .npy, .bin, or a dataset.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model. A run knows its own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the files. By default the run's.", file_okay=False),
    ] = None,
    context_size: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a context. By default the run's, or 128.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Read at most so many, in whole batches.")
    ] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts in one forward pass.")] = 32,
    sinks: Annotated[
        str, typer.Option(help="Which positions are sinks: 'attention' or 'first'.")
    ] = "attention",
    device: Annotated[str, typer.Option(help="Where the model and the Lorsas are.")] = "cpu",
) -> None:
    """Measure how faithful Lorsas are on held-out text, each alone and all together.

    Writes evaluation.json and evaluation.html. Example: lorsa-lens eval runs/first --tokens
    held_out.txt
    """
    from rich.console import Console

    from lorsa_lens.data import contexts_for_model
    from lorsa_lens.evaluation import evaluate, print_evaluation, save_evaluation
    from lorsa_lens.evaluation.subject import find_subject
    from lorsa_lens.hosts.loading import load_host
    from lorsa_lens.lorsa import Lorsa

    with mistakes_in_one_line():
        subject = find_subject(lorsas, model=model, context_size=context_size, out=out)
        host = load_host(subject.model, device=device)
        loaded = [Lorsa.from_pretrained(path, device=device) for path in subject.lorsas]
        contexts = contexts_for_model(
            host,
            tokens,
            subject.context_size,
            prepend_bos=subject.prepend_bos,
            exclude_special_tokens=subject.exclude_special_tokens,
        )
        options: dict[str, Any] = {"sinks": sinks, "max_tokens": max_tokens}
        rows = evaluate(host, loaded, contexts, batch_size=batch_size, progress=True, **options)
    print_evaluation(Console(), rows)
    about = {"model": subject.model, "Lorsas": lorsas, "tokens": tokens, **options}
    about["context_size"] = subject.context_size
    for path in save_evaluation(subject.out, rows, about):
        Console(soft_wrap=True).print(f"[bold]{path}[/bold]")
