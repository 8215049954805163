"""Global circuits as ranked tables, and as a NetworkX graph."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.analysis.sources import head_name
from lorsa_lens.analysis.tables import table
from lorsa_lens.circuits.coactivation import Coactivation
from lorsa_lens.circuits.global_circuit import GlobalCircuit, QKSide
from lorsa_lens.io.atomic import atomic_write

if TYPE_CHECKING:
    import networkx
    from pandas import DataFrame


def circuit_name(layer: int, circuit: int) -> str:
    """`L1.qk3`: query-key circuit 3 of layer 1."""
    return f"L{layer}.qk{circuit}"


@torch.no_grad()
def score_table(
    circuit: GlobalCircuit,
    *,
    statistics: Coactivation | None = None,
    offset: int = 1,
    rank_by: str = "match",
    n: int | None = 50,
) -> "DataFrame":
    """Which heads make which circuits of higher layers attend, through which side.

    Args:
        circuit: the model's Lorsas.
        statistics: adds a column `expected`: expected attribution on a corpus, in units of scores.
        offset: tokens from key to query, where positions are rotary.
        rank_by: `match`, `strength` or, with statistics, `expected`.
        n: rows. None: all pairs.

    Returns:
        Rows with `rank`, `head`, `circuit`, `side`, `strength` and `match` (see `GlobalCircuit`),
        largest first; and `share`, the rank as a share of all pairs.

    Raises:
        ValueError: if there is no such column to rank by.
    """
    columns = ["match", "strength"] + ["expected"] * (statistics is not None)
    if rank_by not in columns:
        raise ValueError(f"rank_by = {rank_by!r} must be one of {columns}")
    names: list[tuple[int, int, str]] = []
    values: dict[str, list[Tensor]] = {column: [] for column in columns}
    for low, high in _layer_pairs(circuit):
        for side in get_args(QKSide):
            found = {
                "match": circuit.matches(low, high, side, offset=offset),
                "strength": circuit.strengths(low, high, side, offset=offset),
            }
            if statistics is not None:
                by_side = statistics.query if side == "query" else statistics.key
                found["expected"] = by_side[low, high]
            names.append((low, high, side))
            for column, value in found.items():
                values[column].append(value)
    blocks = values[rank_by]
    rows = []
    for rank, (block, up, down) in enumerate(_ranked(blocks, n)):
        low, high, side = names[block]
        rows.append(
            {
                "rank": rank,
                "head": head_name(low, up),
                "circuit": circuit_name(high, down),
                "side": side,
                **{column: values[column][block][up, down].item() for column in columns},
                "share": (rank + 1) / sum(one.numel() for one in blocks),
            }
        )
    return table(rows)


@torch.no_grad()
def value_table(
    circuit: GlobalCircuit, *, statistics: Coactivation | None = None, n: int | None = 50
) -> "DataFrame":
    """Which heads fetch what heads of lower layers have written (w_O into w_V).

    `effect` is what the upper head writes of it, as a norm with the sign of the virtual weight, if
    the lower head is at its typical activation and the upper one attends to it alone.

    Args:
        circuit: the model's Lorsas.
        statistics: adds `expected` and `target_weighted` (see `Coactivation.expected`), and ranks
            by the size of `expected`. Without, rows are ranked by the size of `effect`.
        n: rows. None: all pairs.

    Returns:
        Rows with `rank`, `source`, `target`, `weight`, `effect`, `share`.
    """
    pairs = list(_layer_pairs(circuit))
    weights = [circuit.value_weights(low, high) for low, high in pairs]
    columns = {"weight": weights, "effect": []}
    for (low, high), weight in zip(pairs, weights, strict=True):
        norms = circuit.layers[high].W_O.norm(dim=1)
        columns["effect"].append(weight * circuit.activations[low][:, None] * norms)
    rank_by = "effect"
    if statistics is not None:
        rank_by = "expected"
        columns["expected"] = [statistics.expected(circuit, low, high) for low, high in pairs]
        columns["target_weighted"] = [
            statistics.expected(circuit, low, high, target_weighted=True) for low, high in pairs
        ]
    rows = []
    for rank, (block, up, down) in enumerate(_ranked([x.abs() for x in columns[rank_by]], n)):
        low, high = pairs[block]
        rows.append(
            {
                "rank": rank,
                "source": head_name(low, up),
                "target": head_name(high, down),
                **{name: blocks[block][up, down].item() for name, blocks in columns.items()},
                "share": (rank + 1) / sum(one.numel() for one in weights),
            }
        )
    return table(rows)


@torch.no_grad()
def pair_table(
    circuit: GlobalCircuit,
    layer: int,
    qk_head: int,
    *,
    offset: int = 1,
    strings: Sequence[str] | None = None,
    n: int | None = 50,
) -> "DataFrame":
    """The pairs of what a query and what a key may hold that raise a score most.

    Args:
        circuit: the model's Lorsas.
        layer: of the circuit.
        qk_head: which.
        offset: tokens from key to query, where positions are rotary.
        strings: of all tokens.
        n: rows. None: all pairs.

    Returns:
        Rows with `rank`, `query`, `query_kind`, `key`, `key_kind`, `score`, `share`.
    """
    items, scores = circuit.pair_scores(layer, qk_head, offset=offset)
    given = None if strings is None else tuple(strings)
    rows = []
    for rank, (_, query, key) in enumerate(_ranked([scores], n)):
        rows.append(
            {
                "rank": rank,
                "query": items.items[query].name(given),
                "query_kind": items.items[query].kind,
                "key": items.items[key].name(given),
                "key_kind": items.items[key].kind,
                "score": scores[query, key].item(),
                "share": (rank + 1) / scores.numel(),
            }
        )
    return table(rows)


@torch.no_grad()
def end_table(
    circuit: GlobalCircuit,
    layer: int,
    *,
    strings: Sequence[str] | None = None,
    n: int | None = 50,
) -> "DataFrame":
    """What each head fetches from the embedding and adds to the logits.

    Args:
        circuit: the model's Lorsas.
        layer: whose heads.
        strings: of all tokens.
        n: heads. None: all.

    Returns:
        Rows with `head`, `reads` (the token from which it fetches most, above the mean token) and
        its `value`, `raises` (the token whose logit it raises most, at its typical activation),
        that `logit`, and `copying`; heads that write most come first.
    """
    activations = circuit.activations[layer]
    size = activations * circuit.layers[layer].W_O.norm(dim=1)
    heads = size.argsort(descending=True)[:n].tolist()
    read = circuit.token_values(layer, heads).max(0)
    raised = (circuit.logit_weights(layer, heads) * activations[heads, None]).max(1)
    copying = circuit.copying(layer)

    def string(token: int) -> str:
        return f"token {token}" if strings is None else repr(strings[token])

    rows = []
    for place, head in enumerate(heads):
        rows.append(
            {
                "head": head_name(layer, head),
                "reads": string(circuit.embeddings.token_ids[int(read.indices[place])]),
                "value": read.values[place].item(),
                "raises": string(int(raised.indices[place])),
                "logit": raised.values[place].item(),
                "copying": copying[head].item(),
            }
        )
    return table(rows)


@torch.no_grad()
def composition_graph(
    circuit: GlobalCircuit, *, statistics: Coactivation | None = None, n: int = 100
) -> "networkx.MultiDiGraph":
    """The strongest pairs as a directed multigraph.

    Nodes are heads (`L0.17`, with `kind="head"`) and circuits (`L1.qk3`, `kind="circuit"`). Edges
    into circuits have `side` query or key and the match as `weight`; edges between heads have side
    value and the effect; an edge from each circuit to its heads has side pattern.

    Args:
        circuit: the model's Lorsas.
        statistics: ranks and weighs edges by expected attribution instead.
        n: edges into circuits, and as many between heads.

    Raises:
        ImportError: if NetworkX is missing.
    """
    try:
        import networkx
    except ImportError as error:  # pragma: no cover - torch requires it
        raise ImportError("this needs NetworkX: pip install networkx") from error
    rank_by = "match" if statistics is None else "expected"
    graph = networkx.MultiDiGraph()

    def node(name: str) -> str:
        layer, rest = name[1:].split(".")
        kind = "circuit" if rest.startswith("qk") else "head"
        graph.add_node(name, kind=kind, layer=int(layer), index=int(rest.removeprefix("qk")))
        return name

    scores = score_table(circuit, statistics=statistics, rank_by=rank_by, n=n)
    for row in scores.to_dict("records"):
        ends = node(row["head"]), node(row["circuit"])
        graph.add_edge(*ends, key=row["side"], side=row["side"], weight=row[rank_by])
    rank_by = "effect" if statistics is None else "expected"
    for row in value_table(circuit, statistics=statistics, n=n).to_dict("records"):
        ends = node(row["source"]), node(row["target"])
        graph.add_edge(*ends, key="value", side="value", weight=row[rank_by])
    for name, values in list(graph.nodes(data=True)):
        if values["kind"] == "head":
            group = circuit.layers[values["layer"]].group_size
            own = node(circuit_name(values["layer"], values["index"] // group))
            graph.add_edge(own, name, key="pattern", side="pattern", weight=1.0)
    return graph


def save_composition_graph(graph: "networkx.MultiDiGraph", path: str | Path) -> Path:
    """Write a GraphML file, atomically: for Cytoscape, Gephi, yEd."""
    import networkx

    with atomic_write(Path(path)) as temporary:
        networkx.write_graphml_xml(graph, temporary)
    return Path(path)


def _layer_pairs(circuit: GlobalCircuit) -> Iterator[tuple[int, int]]:
    for high in circuit.layers:
        yield from ((low, high) for low in circuit.layers if low < high)


def _ranked(
    blocks: Sequence[Float[Tensor, "row column"]], n: int | None
) -> Iterator[tuple[int, int, int]]:
    """Places of the largest entries of some matrices: which, row and column."""
    best: list[tuple[float, int, int, int]] = []
    for number, block in enumerate(blocks):
        flat = block.flatten()
        top = flat.topk(len(flat) if n is None else min(n, len(flat)))
        columns = block.shape[1]
        best += [
            (value, number, *divmod(place, columns))
            for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
    best.sort(key=lambda entry: (-entry[0], *entry[1:]))
    for _, number, row, column in best[:n]:
        yield number, row, column
