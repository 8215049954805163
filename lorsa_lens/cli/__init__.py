"""The command line: each module is a command, and only parses, calls and prints."""

import typer

from lorsa_lens.cli.demo import demo
from lorsa_lens.cli.train import train

app = typer.Typer(help="Low-Rank Sparse Attention for TransformerLens.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Low-Rank Sparse Attention for TransformerLens."""


for command in (demo, train):
    app.command()(command)
