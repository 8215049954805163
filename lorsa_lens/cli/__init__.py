"""The command line: each module is a command, and only parses, calls and prints."""

import typer

from lorsa_lens.cli.cache_activations import cache_activations
from lorsa_lens.cli.dashboard import dashboard
from lorsa_lens.cli.demo import demo
from lorsa_lens.cli.eval import evaluate_lorsas
from lorsa_lens.cli.graph import graph
from lorsa_lens.cli.heads import heads
from lorsa_lens.cli.lift import lift
from lorsa_lens.cli.serve import serve
from lorsa_lens.cli.sharing import list_lorsas, push
from lorsa_lens.cli.trace import trace
from lorsa_lens.cli.train import train

app = typer.Typer(help="Low-Rank Sparse Attention for TransformerLens.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Low-Rank Sparse Attention for TransformerLens."""


for command in (
    demo, train, heads, dashboard, serve, graph, cache_activations, lift, push, trace,
):  # fmt: skip
    app.command()(command)
app.command("eval")(evaluate_lorsas)
app.command("list")(list_lorsas)
