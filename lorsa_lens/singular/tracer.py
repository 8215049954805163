"""Circuit tracing: from what the model says, upstream, firing by firing."""

from collections.abc import Sequence
from typing import Any

from lorsa_lens.singular.components import Firing
from lorsa_lens.singular.graph import Circuit, Edge, Node, circuit_of, node_of
from lorsa_lens.singular.greedy import Greedy
from lorsa_lens.singular.method import Method
from lorsa_lens.singular.seeds import Seed
from lorsa_lens.singular.stream import Stream


def trace(
    stream: Stream,
    seeds: Sequence[Seed],
    *,
    method: Method | None = None,
    tokens: Sequence[str] | None = None,
    meta: dict[str, Any] | None = None,
) -> Circuit:
    """Trace what the seeds do back to the embedding.

    Every seed is an edge to the root. A head that attends strongly enough is explained by the
    method, and so are the heads found upstream, each once.

    Args:
        stream: the prompt, from `record_stream`.
        seeds: from `logit_seeds`, `probability_seeds` or `direction_seeds`.
        method: how firings are explained. None: `Greedy()`.
        tokens: the prompt as strings, one for each token. None: their ids.
        meta: to keep with the circuit; plain JSON values.

    Returns:
        The circuit; empty if there are no seeds.

    Raises:
        ValueError: if `tokens` are not as many as the prompt has.
    """
    method = method or Greedy()
    words = [str(i) for i in stream.tokens.tolist()] if tokens is None else list(tokens)
    if len(words) != stream.n_pos:
        raise ValueError(f"tokens has {len(words)} strings, but the prompt {stream.n_pos} tokens")
    n_layers = len(stream.layers)
    edges = []
    for seed in seeds:
        root = Node("root", n_layers, None, seed.position, seed.position)
        up = node_of(seed.component, seed.position)
        edges.append(Edge(up=up, down=root, side="dest", weight=seed.weight))
    edges += trace_firings(stream, [edge.up.firing for edge in edges], method)
    return circuit_of(
        edges,
        attention=attention_of(stream, edges),
        tokens=words,
        meta={"method": method.name, **(meta or {})},
    )


def trace_firings(stream: Stream, firings: Sequence[Firing | None], method: Method) -> list[Edge]:
    """The edges of everything upstream of some firings, each firing explained once."""
    edges: list[Edge] = []
    waiting = [firing for firing in firings if firing is not None]
    seen = set(waiting)
    while waiting:
        firing = waiting.pop()
        if not method.fires(stream, firing):
            continue
        for edge in method.explain(stream, firing):
            edges.append(edge)
            upstream = edge.up.firing
            if upstream is not None and upstream not in seen:
                seen.add(upstream)
                waiting.append(upstream)
    return edges


def attention_of(stream: Stream, edges: Sequence[Edge]) -> dict[Node, float]:
    """Attention weights of the firings among the nodes."""
    attention = {}
    for node in {node for edge in edges for node in (edge.up, edge.down)}:
        firing = node.firing
        if firing is not None:
            pattern = stream.layers[firing.layer].pattern
            attention[node] = pattern[firing.head, firing.dest, firing.src].item()
    return attention
