"""Circuits as data: nodes, edges, JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lorsa_lens.io.json_object import load_object, save_object
from lorsa_lens.singular.components import KINDS, Component, Firing
from lorsa_lens.singular.read_in import Side

FORMAT = "lorsa-lens/circuit"
FORMAT_VERSION = 1
"""Version of the saved form."""


class Node(NamedTuple):
    """A component at work: which, at which token, and for a head from which token."""

    kind: str
    """A kind of component, or `root`: what was asked."""
    layer: int
    head: int | None
    dest: int
    src: int | None
    """Heads: the token attended to; None for all of them together. Others: `dest`."""

    @property
    def id(self) -> str:
        """As `head.L3.1.13.9` (layer, head, destination, source), `mlp.L0.5`, `root.13`."""
        if self.kind == "head":
            src = "all" if self.src is None else self.src
            return f"head.L{self.layer}.{self.head}.{self.dest}.{src}"
        layer = f".L{self.layer}" if self.kind in ("mlp", "bias") else ""
        return f"{self.kind}{layer}.{self.dest}"

    @property
    def label(self) -> str:
        """What it is, without its tokens: as `L3.1`, `L0 mlp`, `embedding`."""
        if self.kind == "head":
            return f"L{self.layer}.{self.head}"
        return f"L{self.layer} {self.kind}" if self.kind in ("mlp", "bias") else self.kind

    @property
    def firing(self) -> Firing | None:
        """The firing to trace on, if it is a head's attention to one token."""
        if self.head is None or self.src is None:
            return None
        return Firing(self.layer, self.head, self.dest, self.src)


def node_of(component: Component, position: int) -> Node:
    """The node of a component that writes at a position."""
    src = component.source if component.kind == "head" else position
    return Node(component.kind, component.layer, component.head, position, src)


def firing_node(firing: Firing) -> Node:
    """The node of a head's attention to one token."""
    return Node("head", firing.layer, firing.head, firing.dest, firing.src)


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One component's part in a head's attention (or in what was asked)."""

    up: Node
    down: Node
    side: Side
    """`dest`: through the query; `src`: through the key. The root is reached through `dest`."""
    weight: float
    """Greedy rule: the fall of the attention weight while its terms are removed."""
    vectors: tuple[int, ...] = ()
    """Indices of the singular vectors, in the order of their selection."""
    n_prompts: int = 1
    """Merged graphs: prompts in which it appeared."""


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """What a trace found. Nodes and edges are sorted, so that equal circuits are equal."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    attention: dict[Node, float] = field(default_factory=dict)
    """Attention weight of every head among the nodes."""
    tokens: tuple[str, ...] = ()
    """The prompt, token by token; empty for merged circuits."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How it was made: plain JSON values."""

    @property
    def heads(self) -> set[tuple[int, int]]:
        """Layer and index of every attention head in it."""
        return {(node.layer, node.head) for node in self.nodes if node.head is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "meta": self.meta,
            "tokens": list(self.tokens),
            "nodes": [
                {"id": node.id, **node._asdict(), "attn": self.attention.get(node)}
                for node in self.nodes
            ],
            "edges": [
                {**asdict(edge), "up": edge.up.id, "down": edge.down.id, "vectors": [*edge.vectors]}
                for edge in self.edges
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Circuit":
        """Build from what `to_dict` gives.

        Raises:
            ValueError: if it is something else, or of a version that this release does not know.
        """
        if values.get("format") != FORMAT:
            raise ValueError(f"format = {values.get('format')!r}: a circuit has {FORMAT!r}")
        version = values.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version = {version!r}: this release of lorsa_lens reads up to "
                f"{FORMAT_VERSION}. Upgrade lorsa_lens to read it"
            )
        nodes, attention = {}, {}
        for entry in values["nodes"]:
            node = Node(*(entry[name] for name in Node._fields))
            if node.kind not in (*KINDS, "root"):
                raise ValueError(f"a node has kind {node.kind!r}: one of {(*KINDS, 'root')}")
            nodes[entry["id"]] = node
            if entry["attn"] is not None:
                attention[node] = float(entry["attn"])
        edges = []
        for entry in values["edges"]:
            fields = {**entry, "up": nodes[entry["up"]], "down": nodes[entry["down"]]}
            edges.append(Edge(**{**fields, "vectors": tuple(entry["vectors"])}))
        return cls(
            nodes=tuple(nodes.values()),
            edges=tuple(edges),
            attention=attention,
            tokens=tuple(values["tokens"]),
            meta=values["meta"],
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, atomically."""
        return save_object(path, self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is no JSON, or no circuit.
        """
        return cls.from_dict(load_object(path, "circuit"))


def circuit_of(
    edges: Iterable[Edge],
    *,
    attention: dict[Node, float],
    tokens: Sequence[str] = (),
    meta: dict[str, Any] | None = None,
) -> Circuit:
    """The circuit of some edges: their nodes, and everything in a fixed order."""
    ordered = sorted(edges, key=lambda edge: (_key(edge.down), _key(edge.up), edge.side))
    nodes = sorted({node for edge in ordered for node in (edge.up, edge.down)}, key=_key)
    return Circuit(
        nodes=tuple(nodes),
        edges=tuple(ordered),
        attention={node: attention[node] for node in nodes if node in attention},
        tokens=tuple(tokens),
        meta=meta or {},
    )


def _key(node: Node) -> tuple[Any, ...]:
    numbers = (-1 if number is None else number for number in (node.head, node.dest, node.src))
    return (node.layer, node.kind, *numbers)
