"""Attribution graphs as data: nodes, direct effects, JSON. No model is needed to read one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorsa_lens.io.json_object import load_object, save_object

FORMAT = "lorsa-lens/attribution-graph"
FORMAT_VERSION = 1
"""Version of the saved form."""

Kind = Literal[
    "token", "position", "head", "attention_head", "feature", "mlp", "bias", "error", "logit"
]
KINDS: tuple[Kind, ...] = (
    "token",
    "position",
    "head",
    "attention_head",
    "bias",
    "error",
    "feature",
    "mlp",
    "logit",
)
"""Every kind of node. Tokens, positions, biases and errors are leaves: nothing flows into them."""

LEAVES = frozenset({"token", "position", "bias", "error"})

Module = Literal["attn", "mlp"]


class Node(NamedTuple):
    """One thing at work on a prompt: which, and at which token it writes."""

    kind: Kind
    layer: int
    """Block; -1 for tokens and positions, the number of layers for logits."""
    pos: int
    """Token at which it writes; for a head the query."""
    index: int = 0  # type: ignore[assignment]  # hides the method of tuples
    """Of a head, a feature: which; of a token, a logit: its id (of other targets: which)."""
    source: int | None = None
    """Original attention heads that are split by source token: the key."""
    module: Module | None = None
    """Biases and errors: of which module."""

    @property
    def id(self) -> str:
        """As `head.L3.1234@7`, `attention-head.L0.2@7.4` (from token 4), `bias.L1.mlp@7`."""
        parts = [self.kind.replace("_", "-")]
        if self.layer >= 0 and self.kind != "logit":
            parts.append(f"L{self.layer}")
        if self.module is not None:
            parts.append(self.module)
        if self.kind in ("head", "attention_head", "feature", "logit"):
            parts.append(str(self.index))
        where = f"@{self.pos}" if self.source is None else f"@{self.pos}.{self.source}"
        return ".".join(parts) + where

    @property
    def is_leaf(self) -> bool:
        """Whether nothing flows into it: a token, a position, a bias or an error."""
        return self.kind in LEAVES

    @property
    def is_attention(self) -> bool:
        """Whether it is a unit of an attention layer."""
        return self.kind in ("head", "attention_head")

    @property
    def order(self) -> tuple[int, ...]:
        """Sort key: what can write to a node sorts before it."""
        mlp = self.kind in ("feature", "mlp") or self.module == "mlp"
        source = -1 if self.source is None else self.source
        return (self.layer, int(mlp), self.pos, KINDS.index(self.kind), self.index, source)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph:
    """The nodes of one prompt and their direct effects on each other.

    With attention patterns, norm scales and selection masks frozen, every pre-activation is a sum:
    `pre_activations = edges.sum(1) + constants + missing`. Leaves (`Node.is_leaf`) have none: their
    rows and numbers are zero.
    """

    nodes: tuple[Node, ...]
    """Sorted by `Node.order`: sources before targets."""
    activations: Float[Tensor, " node"]
    """Of a head its z, of a feature its activation, of a logit the target's value; of the others,
    which write vectors of their own on each prompt, the norm of what they write."""
    edges: Float[Tensor, "target source"]
    """Direct effects, at the sources' activations, in units of the targets' pre-activations."""
    constants: Float[Tensor, " target"]
    """Parts of a pre-activation that no node carries: biases of what reads the stream."""
    missing: Float[Tensor, " target"]
    """What nodes and edges outside the graph give."""
    pre_activations: Float[Tensor, " target"]
    """Of a head its z before selection, of a feature likewise, of a logit the (mean-centred) logit;
    of `mlp` and `attention_head` the norm of what they write, which is its part along itself."""
    target_weights: Float[Tensor, " node"]
    """What each logit counts in what the graph explains; 0 for the others."""
    gross: Float[Tensor, " target"] | None = None
    """Sum of the sizes of all direct effects on each target, those outside the graph included:
    shares of influence are relative to it. None: of those inside, and of `missing`."""
    probabilities: Mapping[Node, float] = field(default_factory=dict)
    """Of logits that are tokens."""
    tokens: tuple[str, ...] = ()
    """The prompt, token by token."""
    n_layers: int
    labels: Mapping[Node, str] = field(default_factory=dict)
    """For people."""
    supernodes: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    """Groups of nodes by name."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: plain JSON values."""

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if tuple(self.edges.shape) != (n, n):
            raise ValueError(f"edges has shape {list(self.edges.shape)}: [{n}, {n}] for {n} nodes")
        if self.gross is None:
            object.__setattr__(self, "gross", self.edges.abs().sum(1) + self.missing.abs())
        for name in _NUMBERS:
            shape = tuple(getattr(self, name).shape)
            if shape != (n,):
                raise ValueError(f"{name} has shape {list(shape)}, but there are {n} nodes")
        if list(self.nodes) != sorted(set(self.nodes), key=lambda node: node.order):
            raise ValueError("nodes must be sorted by Node.order, each once")
        known = self.positions_of
        named = [*self.labels, *self.probabilities]
        named += [node for group in self.supernodes.values() for node in group]
        for node in named:
            if node not in known:
                raise ValueError(f"{node.id} is named, but is no node of the graph")

    def __repr__(self) -> str:
        n_edges = int((self.edges != 0).sum())
        return f"AttributionGraph(n_nodes={len(self.nodes)}, n_edges={n_edges})"

    @cached_property
    def positions_of(self) -> dict[Node, int]:
        """Row and column of every node."""
        return {node: i for i, node in enumerate(self.nodes)}

    def index(self, node: Node) -> int:
        """Row and column of a node.

        Raises:
            ValueError: if it is not in the graph.
        """
        if node not in self.positions_of:
            raise ValueError(f"{node.id} is no node of the graph, which has {len(self.nodes)}")
        return self.positions_of[node]

    def node(self, name: str) -> Node:
        """The node of an id.

        Raises:
            ValueError: if there is none.
        """
        for node in self.nodes:
            if node.id == name:
                return node
        raise ValueError(f"the graph has no node {name!r}; ids look like {self.nodes[-1].id!r}")

    def edge(self, source: Node, target: Node) -> float:
        """The direct effect of one node on another; 0 if there is none."""
        return float(self.edges[self.index(target), self.index(source)])

    @property
    def targets(self) -> tuple[Node, ...]:
        """What the graph explains: its logit nodes."""
        return tuple(node for node in self.nodes if node.kind == "logit")

    def of_kind(self, *kinds: Kind) -> Bool[Tensor, " node"]:
        """Which nodes are of these kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes], dtype=torch.bool)

    def keeping(
        self,
        nodes: Bool[Tensor, " node"],
        edges: Bool[Tensor, "target source"] | None = None,
    ) -> "AttributionGraph":
        """The graph of some nodes and edges; what the others give goes to `missing`.

        Args:
            nodes: which nodes stay.
            edges: which edges stay, over all nodes. None: those between nodes that stay.
        """
        stay = nodes[:, None] & nodes[None, :]
        if edges is not None:
            stay = stay & edges
        kept = torch.where(stay, self.edges, torch.zeros_like(self.edges))
        missing = self.missing + (self.edges - kept).sum(1)
        chosen = [node for node, here in zip(self.nodes, nodes.tolist(), strict=True) if here]
        here = set(chosen)
        groups = {
            name: tuple(node for node in group if node in here)
            for name, group in self.supernodes.items()
        }
        return replace(
            self,
            nodes=tuple(chosen),
            activations=self.activations[nodes],
            edges=kept[nodes][:, nodes],
            constants=self.constants[nodes],
            missing=missing[nodes],
            pre_activations=self.pre_activations[nodes],
            target_weights=self.target_weights[nodes],
            gross=None if self.gross is None else self.gross[nodes],
            probabilities={n: p for n, p in self.probabilities.items() if n in here},
            labels={n: label for n, label in self.labels.items() if n in here},
            supernodes={name: group for name, group in groups.items() if group},
        )

    # ---------------------------------------------------------------------------------- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them. Edges of weight 0 are left out."""
        targets, sources = self.edges.nonzero(as_tuple=True)
        weights = self.edges[targets, sources]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "meta": dict(self.meta),
            "n_layers": self.n_layers,
            "tokens": list(self.tokens),
            "nodes": [self._node_dict(i, node) for i, node in enumerate(self.nodes)],
            "edges": [
                [source, target, weight]
                for source, target, weight in zip(
                    sources.tolist(), targets.tolist(), weights.tolist(), strict=True
                )
            ],
            "supernodes": {
                name: [node.id for node in group] for name, group in self.supernodes.items()
            },
        }

    def _node_dict(self, i: int, node: Node) -> dict[str, Any]:
        numbers = {name: float(getattr(self, name)[i]) for name in _NUMBERS}
        return {
            "id": node.id,
            **node._asdict(),
            **numbers,
            "probability": self.probabilities.get(node),
            "label": self.labels.get(node),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AttributionGraph":
        """Build from what `to_dict` gives.

        Raises:
            ValueError: if it is something else, or of a version that this release does not know.
        """
        if values.get("format") != FORMAT:
            raise ValueError(f"format = {values.get('format')!r}: a graph has {FORMAT!r}")
        version = values.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version = {version!r}: this release of lorsa_lens reads up to "
                f"{FORMAT_VERSION}. Upgrade lorsa_lens to read it"
            )
        entries = values["nodes"]
        nodes = [Node(*(entry[name] for name in Node._fields)) for entry in entries]
        for node in nodes:
            if node.kind not in KINDS:
                raise ValueError(f"a node has kind {node.kind!r}: one of {KINDS}")
        edges = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
        for source, target, weight in values["edges"]:
            edges[target, source] = weight
        by_id = {node.id: node for node in nodes}
        pairs = list(zip(nodes, entries, strict=True))
        return cls(
            nodes=tuple(nodes),
            edges=edges,
            **{name: _column(entries, name) for name in _NUMBERS},
            probabilities={n: e["probability"] for n, e in pairs if e["probability"] is not None},
            labels={n: e["label"] for n, e in pairs if e["label"] is not None},
            supernodes={
                name: tuple(by_id[one] for one in group)
                for name, group in values["supernodes"].items()
            },
            tokens=tuple(values["tokens"]),
            n_layers=values["n_layers"],
            meta=values["meta"],
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, atomically."""
        return save_object(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "AttributionGraph":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is no JSON, or no graph.
        """
        return cls.from_dict(load_object(path, "graph"))


_NUMBERS = (
    "activations",
    "constants",
    "missing",
    "pre_activations",
    "target_weights",
    "gross",
)


def _column(entries: Sequence[Mapping[str, Any]], name: str) -> Float[Tensor, " node"]:
    return torch.tensor([entry[name] for entry in entries], dtype=torch.float64)


def sorted_nodes(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Nodes as a graph holds them: each once, sources before targets."""
    return tuple(sorted(set(nodes), key=lambda node: node.order))
