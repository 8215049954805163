"""`lorsa-lens serve`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lorsa_lens.cli.dashboard import write_dashboard
from lorsa_lens.cli.options import mistakes_in_one_line
from lorsa_lens.cli.runs import Layers, Model, Tables, load_lorsas, read_run


def serve(
    run_dir: Annotated[
        Path, typer.Argument(help="A run that `lorsa-lens train` made.", file_okay=False)
    ],
    tables: Tables = None,
    model: Model = None,
    layers: Layers = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of this machine. 0: any that is free.")
    ] = 8765,
) -> None:
    """Serve the dashboard to this machine, with a page to try prompts on and to steer heads.

    Only 127.0.0.1 is listened on. From another machine: ssh -L 8765:localhost:8765 THIS_MACHINE.
    Without the tables of `lorsa-lens heads` there is that page alone.
    """
    from rich.console import Console

    console = Console()
    with mistakes_in_one_line():
        from lorsa_lens.dashboard import bind, make_app, make_server

        run = read_run(run_dir, model, None)
        lorsas = load_lorsas(run_dir, layers)
        bound = bind(port)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.dashboard import Playground
        from lorsa_lens.hosts.loading import load_host

        playground = Playground(load_host(run["model"], device=run.get("device", "cpu")), lorsas)
        folder = run_dir / "heads" if tables is None else tables
        with tempfile.TemporaryDirectory(prefix="lorsa-serve-") as made:
            site = Path(made) / "site" if tables is not None or folder.is_dir() else None
            if site is None:
                console.print(f"No table of heads: there is no {folder}, see lorsa-lens heads.")
            else:
                console.print("Writing the dashboard ...")
                write_dashboard(playground.model, lorsas, run, folder, site, served=True)
            app = make_app(playground, site, title=f"Lorsa heads of {run['model']}")
            address = f"http://127.0.0.1:{bound.getsockname()[1]}"
            console.print(f"Open [bold]{address}[/bold] (Ctrl + C ends it)")
            make_server(app).run(sockets=[bound])
