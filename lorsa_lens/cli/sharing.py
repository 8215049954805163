"""`lorsa-lens list` and `lorsa-lens push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

PATH_HELP = "A folder, or an id on the hub: user/repo, user/repo/folder or user/repo:folder."


def list_lorsas(
    path: Annotated[str, typer.Argument(help=PATH_HELP)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """List the Lorsas in a folder or a repository, without downloading their weights."""
    from rich.console import Console
    from rich.table import Column, Table

    entries = _entries(path, revision)
    table = Table(
        Column("name", no_wrap=True), "layer", "circuits", "heads", "act_fn", "K", "model", "layout"
    )
    for entry in entries:
        if entry.cfg is None:
            table.add_row(entry.name, *[""] * 6, entry.problem)
            continue
        cfg = entry.cfg
        cells = (cfg.layer, cfg.n_qk_heads, cfg.n_ov_heads, cfg.act_fn, cfg.k, cfg.model_name)
        shown = ("" if cell is None else str(cell) for cell in cells)
        table.add_row(entry.name or ".", *shown, entry.layout)
    Console().print(table)


def push(
    folder: Annotated[Path, typer.Argument(help="A Lorsa's folder, or one that holds several.")],
    repo: Annotated[str, typer.Argument(help="user/repo; it is made if it is not there.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload the Lorsas of a folder to the Hugging Face hub, with a model card."""
    from rich.console import Console

    from lorsa_lens.io.push import push_to_hub
    from lorsa_lens.lorsa import Lorsa

    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}")
    try:
        entries = _entries(str(folder))
        lorsas = [Lorsa.from_pretrained(folder / entry.name) for entry in entries]
        metrics = {
            lorsa.cfg.hook_out: entry.metrics
            for lorsa, entry in zip(lorsas, entries, strict=True)
            if entry.metrics
        }
        url = push_to_hub(
            lorsas,
            repo,
            metrics=metrics,
            private=private or None,
            revision=revision,
            commit_message=message,
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"Pushed {len(lorsas)} Lorsas: {url}", soft_wrap=True)


def _entries(path: str, revision: str | None = None) -> list[Any]:
    from lorsa_lens.io.listing import list_lorsas as find

    try:
        entries = find(path, revision=revision)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    if not entries:
        raise typer.BadParameter(f"{path} holds no Lorsa")
    return entries
