"""What an attribution graph in circuit-tracer's form is made of: nodes, links, examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

NodeKind = Literal[
    "head",
    "feature",
    "attention_head",
    "mlp",
    "bias",
    "offset",
    "error",
    "token",
    "position",
    "logit",
]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph."""

    kind: NodeKind
    """`head` (of a Lorsa), `feature` (of an MLP), `attention_head` (of the model), `mlp`, `bias`,
    `offset` (of what reads), `error`, `token`, `position` or `logit`."""

    pos: int
    """Position in the prompt."""

    layer: int = 0
    """The block; of no meaning for tokens, positions and logits."""

    index: int = 0
    """Of a head or a feature: which; of a token or a logit: its token id."""

    source: int | None = None
    """Of an attention head that is split by source token: the position of that token."""

    module: Literal["attn", "mlp"] = "mlp"
    """Of a bias or an error: whose."""

    label: str = ""
    """For people. Of a logit: the token's string."""

    influence: float | None = None
    """Share of all influence that this node and the stronger ones have together, 0 to 1."""

    activation: float | None = None
    """Of a head or a feature."""

    probability: float = 0.0
    """Of a logit."""

    is_target: bool = False
    """Of a logit: whether the graph was traced from it."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The direct effect of one node on another."""

    source: Node
    target: Node
    weight: float
    """Signed."""

    more: Mapping[str, Any] = field(default_factory=dict)
    """Further plain JSON values by name, which their page passes over."""


@dataclass(frozen=True, kw_only=True)
class QKTracing:
    """Why a head attends: what nodes give to its score, on the query's and on the key's side."""

    pairs: Sequence[tuple[str, str, float]]
    """Query node, key node, and what they give together; nodes by `node_id` or any other name."""

    queries: Sequence[tuple[str, float]] = ()
    """What nodes give through the query, with all keys together."""

    keys: Sequence[tuple[str, float]] = ()
    """What nodes give through the key, with all queries together."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An attribution graph of one prompt."""

    slug: str
    """Its file's name: letters, digits, `-` and `_`."""

    prompt_tokens: Sequence[str]
    """The prompt, token by token."""

    n_layers: int
    """Of the model: logits are drawn above them."""

    nodes: Sequence[Node]
    links: Sequence[Link]

    scan: str = "./data/features"
    """Where their page looks for examples. So their server delivers `features/` of the folder."""

    node_threshold: float | None = None
    """The share of influence that pruning kept; their page then shows a slider."""

    pinned: Sequence[Node] = field(default=())
    """Nodes that the page begins with."""

    supernodes: Mapping[str, Sequence[Node]] = field(default_factory=dict)
    """Groups of nodes by name. Their page shows those members that are pinned."""

    qk_tracing: Mapping[Node, QKTracing] = field(default_factory=dict)
    """For heads among the nodes: why they attend."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context of a head: what each source token gives to its activation at one token."""

    tokens: Sequence[str]
    """The context."""

    z_pattern: Sequence[float]
    """`A[q, k] v[k]` at the shown token, over all tokens."""

    query: int
    """Which token that is."""
