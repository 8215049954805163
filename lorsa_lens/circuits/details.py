"""What is known of a graph's nodes beyond their edges: z patterns, contexts, why heads attend."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens.circuits.graph import AttributionGraph, Node
from lorsa_lens.views.facts import Excerpt

if TYPE_CHECKING:
    from lorsa_lens.analysis.strings import Vocabulary
    from lorsa_lens.circuits.replacement import LocalReplacement


@dataclass(frozen=True, kw_only=True)
class Details:
    """What exports and pages show of a graph's heads; what is not known is left out."""

    z_patterns: Mapping[Node, Sequence[float]] = field(default_factory=dict)
    """Of head nodes: what each token of the prompt gives, `A[q, k] v[k]`."""

    contexts: Mapping[tuple[int, int], Sequence[Excerpt]] = field(default_factory=dict)
    """By layer and ov head: texts in which it is strong, strongest first."""

    qk: Mapping[Node, Mapping[str, Any]] = field(default_factory=dict)
    """Of head nodes: what `QKTracing.to_dict()` gives."""

    def check(self, graph: AttributionGraph) -> None:
        """Refuse what does not belong to a graph.

        Raises:
            ValueError: naming the node and what is wrong.
        """
        for name in ("z_patterns", "qk"):
            for node in getattr(self, name):
                if node.kind != "head" or node not in graph.positions_of:
                    raise ValueError(f"{name} has {node.id}, which is no head of the graph")
        for node, values in self.z_patterns.items():
            if len(values) != len(graph.tokens):
                raise ValueError(
                    f"the z pattern of {node.id} has {len(values)} values, the prompt has "
                    f"{len(graph.tokens)} tokens"
                )
            if not all(map(math.isfinite, values)):
                raise ValueError(f"the z pattern of {node.id} holds a value that is not finite")

    def excerpt(self, graph: AttributionGraph, node: Node) -> Excerpt | None:
        """The z pattern of a node on the graph's own prompt, ready to be drawn."""
        if node not in self.z_patterns:
            return None
        z = graph.activations[graph.index(node)].item()
        return Excerpt(graph.tokens, node.pos, z, self.z_patterns[node])


def z_patterns(replacement: "LocalReplacement", graph: AttributionGraph) -> dict[Node, list[float]]:
    """What each token of the prompt gives to every head of a graph, `A[q, k] v[k]`."""
    from lorsa_lens.circuits.attention_stages import LorsaStage

    found: dict[Node, list[float]] = {}
    for stage in replacement.stages:
        if not isinstance(stage, LorsaStage):
            continue
        resid_pre = replacement.stream.layers[stage.layer].resid_pre
        values = (stage.norm.share(resid_pre) + stage.norm.bias) @ stage.W_V.mT + stage.b_V
        for node, i in stage.place.items():
            if node in graph.positions_of:
                pattern = stage.pattern[stage.circuit[i], stage.query[i]]
                found[node] = (pattern * values[:, i]).tolist()
    return found


def stored_contexts(
    graph: AttributionGraph, tables: str | Path, strings: "Vocabulary", *, n_contexts: int = 4
) -> dict[tuple[int, int], list[Excerpt]]:
    """Contexts of a graph's heads, where `lorsa-lens heads --contexts N` kept some.

    Args:
        graph: whose heads.
        tables: the folder that the command wrote.
        strings: of all tokens.
        n_contexts: of each head, the strongest.
    """
    from lorsa_lens.analysis.contexts import ContextStore

    path = Path(tables) / "contexts.sqlite"
    found: dict[tuple[int, int], list[Excerpt]] = {}
    if not path.is_file():
        return found
    with ContextStore(path) as store:
        for head in sorted({(n.layer, n.index) for n in graph.nodes if n.kind == "head"}):
            try:
                kept = store.head(*head).top[:n_contexts]
            except KeyError:  # a layer that the pass over the corpus left out
                continue
            found[head] = [
                Excerpt(strings.read(one.tokens), one.query, one.activation, one.z_pattern.tolist())
                for one in kept
            ]
    return found


def stored_labels(tables: str | Path) -> dict[tuple[int, int], str]:
    """The best-scored behaviour of every head that `lorsa-lens heads` named.

    Args:
        tables: the folder that the command wrote.

    Raises:
        ValueError: if there is none.
    """
    path = Path(tables) / "named.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: run lorsa-lens heads RUN_DIR first")
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["kind"] == "ov"]
    rows.sort(key=lambda row: row["score"])  # the best comes last, and stays
    return {(row["layer"], row["head"]): row["behaviour"] for row in rows}
