"""`lorsa-lens graph`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorsa_lens.cli.options import mistakes_in_one_line
from lorsa_lens.cli.runs import load_lorsas
from lorsa_lens.interop.graph_schema import check_slug, slug_of

if TYPE_CHECKING:
    from rich.console import Console

    from lorsa_lens.circuits.prompt import Explanation
    from lorsa_lens.lorsa import Lorsa

Layers = Annotated[
    list[int] | None, typer.Option(help="Replace these layers only. Repeat the option.")
]
OriginalHeads = Annotated[
    bool, typer.Option(help="Show the heads of layers without a Lorsa, not pass through them.")
]
NNodes = Annotated[int, typer.Option(min=1, help="Heads, features and MLPs looked at.")]
NodeShare = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the nodes' influence to keep.")
]
EdgeShare = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the edges' influence to keep.")
]
NTraced = Annotated[
    int, typer.Option(min=0, help="Heads whose attention is traced: the strongest.")
]
Tables = Annotated[
    Path | None,
    typer.Option(help="Folder of `lorsa-lens heads`: names and contexts of heads are shown."),
]


def graph(
    model: Annotated[
        str, typer.Option(help="A folder with a Hugging Face model, or an id on the hub.")
    ],
    lorsas: Annotated[
        str, typer.Option(help="A run, a folder of Lorsas, or a repository on the hub.")
    ],
    prompt: Annotated[str, typer.Option(help="The text, up to where the answer is said.")],
    target: Annotated[
        str | None,
        typer.Option(help="The token to explain, with its leading space. Else the likeliest ones."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A token to compare with: then the logit difference is explained."),
    ] = None,
    layers: Layers = None,
    original_heads: OriginalHeads = False,
    n_nodes: NNodes = 500,
    node_threshold: NodeShare = 0.8,
    edge_threshold: EdgeShare = 0.95,
    n_traced: NTraced = 8,
    tables: Tables = None,
    slug: Annotated[str | None, typer.Option(help="The graph's name, for file names.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.", file_okay=False)] = Path(
        "lorsa_graph"
    ),
) -> None:
    """Draw which Lorsa heads lead to a model's answer, and how.

    Writes graph.html (open it in a browser), graph.json, graph.graphml, and a folder that
    circuit-tracer shows. Prints the strongest paths.
    """
    from rich.console import Console

    console = Console()
    with mistakes_in_one_line():
        name = slug or slug_of(Path(model).name)
        check_slug(name)
        chosen = find_lorsas(lorsas, layers)
        console.print("Loading TransformerLens ...")
        from lorsa_lens.circuits.prompt import explain_prompt, save_all, target_of
        from lorsa_lens.hosts.loading import load_host

        host = load_host(model)
        explained = explain_prompt(
            host,
            chosen.values(),
            prompt,
            target_of(host, target, against),
            attention="heads" if original_heads else "frozen",
            n_nodes=n_nodes,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            n_traced=n_traced,
            tables=tables,
        )
        page = save_all(explained.graph, out, slug=name, details=explained.details)
    _print(console, explained, page)


def _print(console: "Console", explained: "Explanation", page: Path) -> None:
    from lorsa_lens.circuits.paths import path_table
    from lorsa_lens.circuits.scores import graph_scores

    scores = graph_scores(explained.whole)
    table = str(path_table(explained.graph))
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(explained.graph.nodes)} of {len(explained.whole.nodes)} nodes; replacement score "
        f"{scores.replacement:.2f}, completeness {scores.completeness:.2f}",
        soft_wrap=True,
    )
    console.print(f"The page: [bold]{page.resolve()}[/bold]", soft_wrap=True)


def find_lorsas(path: str, layers: list[int] | None) -> dict[int, "Lorsa"]:
    """By layer, the Lorsas of a run, of a folder or of a repository on the hub."""
    from lorsa_lens.io.listing import list_lorsas
    from lorsa_lens.lorsa import Lorsa
    from lorsa_lens.training.folders import LORSAS

    if (Path(path) / LORSAS).is_dir():
        return load_lorsas(Path(path), layers)
    found: dict[int, str] = {}
    for entry in list_lorsas(path):
        layer = None if entry.cfg is None else entry.cfg.layer
        if layer in found:
            raise ValueError(f"{path} holds two Lorsas of layer {layer}: give a folder with one")
        if layer is not None:
            found[layer] = f"{path}/{entry.name}" if entry.name else path
    if missing := sorted(set(layers or ()) - set(found)):
        raise ValueError(f"{path} has no Lorsa of layer {missing[0]}: it has {sorted(found)}")
    if not found:
        raise ValueError(f"there are no Lorsas in {path}")
    return {layer: Lorsa.from_pretrained(found[layer]) for layer in layers or sorted(found)}
