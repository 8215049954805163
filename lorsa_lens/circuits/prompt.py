"""From text to a graph and its files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.circuits.attention_links import trace_heads, with_attention_nodes
from lorsa_lens.circuits.attention_stages import Attention
from lorsa_lens.circuits.attribution import attribution_graph
from lorsa_lens.circuits.details import Details, stored_contexts, stored_labels, z_patterns
from lorsa_lens.circuits.export import save_circuit_tracer, save_graphml
from lorsa_lens.circuits.graph import AttributionGraph
from lorsa_lens.circuits.page import save_graph_page
from lorsa_lens.circuits.pruning import prune
from lorsa_lens.circuits.replacement import LocalReplacement, local_replacement
from lorsa_lens.circuits.supernodes import group_by_label
from lorsa_lens.circuits.targets import Target
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.prompt import one_token

HeadLabels = Mapping[tuple[int, int], str]
"""Names of behaviours, by layer and ov head."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a model answers a prompt as it does."""

    replacement: LocalReplacement
    """The prompt, frozen."""
    whole: AttributionGraph
    """The graph before it was pruned."""
    graph: AttributionGraph
    """The graph to look at."""
    details: Details
    """Of the heads of `graph`."""


def explain(
    replacement: LocalReplacement,
    target: Target | None = None,
    *,
    n_nodes: int | Literal["all"] = 500,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.95,
    n_traced: int = 8,
    labels: HeadLabels | None = None,
    target_names: Sequence[str] | None = None,
    meta: Mapping[str, object] | None = None,
) -> Explanation:
    """A pruned graph, with z patterns of its heads and why the strongest of them attend.

    Args:
        replacement: the prompt, frozen.
        target: as `attribution_graph` takes it.
        n_nodes: heads, features and MLPs of the graph before pruning.
        node_threshold: as in `prune`.
        edge_threshold: as in `prune`.
        n_traced: heads whose attention is traced; what decides it joins the graph.
        labels: names of heads, which also make supernodes.
        target_names: the vocabulary as text, for labels of targets.
        meta: plain values to keep with the graph.
    """
    whole = attribution_graph(
        replacement, target, n_nodes=n_nodes, target_names=target_names, meta=meta
    )
    pruned = prune(whole, node_threshold=node_threshold, edge_threshold=edge_threshold)
    traced = trace_heads(replacement, pruned, n_traced) if n_traced else {}
    graph = labelled(with_attention_nodes(whole, pruned, traced), labels or {})
    details = Details(z_patterns=z_patterns(replacement, graph), qk=traced)
    return Explanation(replacement=replacement, whole=whole, graph=graph, details=details)


def explain_prompt(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    prompt: str,
    target: Target | None = None,
    *,
    attention: Attention = "frozen",
    tables: str | Path | None = None,
    **options: Any,
) -> Explanation:
    """`explain` of a text.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        lorsas: for the layers that their `cfg.layer` names.
        prompt: the text up to where the answer is said.
        target: as `attribution_graph` takes it; `target_of` makes one of text.
        attention: what becomes of the attention of other layers, as in `local_replacement`.
        tables: the folder of `lorsa-lens heads`: names and contexts of heads are taken from it.
        **options: those of `explain`.

    Raises:
        ValueError: if the prompt is empty, or a number or the folder cannot be used.
    """
    host: Any = model
    if not prompt:
        raise ValueError("prompt is empty: give the text up to where the answer is said")
    labels = {} if tables is None else stored_labels(tables)
    strings = Vocabulary.of(model)
    tokens = host.to_tokens(prompt)
    replacement = local_replacement(
        model, lorsas, tokens, attention=attention, str_tokens=strings.read(tokens[0])
    )
    meta = {"prompt": prompt, "replaced_layers": sorted(replacement.lorsas)}
    found = explain(
        replacement, target, labels=labels, target_names=strings.strings, meta=meta, **options
    )
    if tables is None:
        return found
    contexts = stored_contexts(found.graph, tables, strings)
    return replace(found, details=replace(found.details, contexts=contexts))


def labelled(graph: AttributionGraph, labels: HeadLabels) -> AttributionGraph:
    """A graph whose heads bear names; heads of one name, layer and token become a supernode."""
    named = {
        node: labels[node.layer, node.index]
        for node in graph.nodes
        if node.kind == "head" and (node.layer, node.index) in labels
    }
    grouped = group_by_label(graph, labels) if named else graph
    several = {name: group for name, group in grouped.supernodes.items() if len(group) > 1}
    return replace(graph, labels={**graph.labels, **named}, supernodes=several)


def target_of(model: nn.Module, target: str | None = None, against: str | None = None) -> Target:
    """What to explain, from tokens as text.

    Args:
        model: with a tokenizer.
        target: one token, with its leading space where it has one. None: the most probable ones.
        against: another, to explain the difference of the two logits.

    Raises:
        ValueError: if one is not a single token, or `against` stands alone.
    """
    if target is None:
        if against is not None:
            raise ValueError(f"against = {against!r} needs a target to be compared with")
        return Target.top_probability()
    token = _token(model, "target", target)
    if against is None:
        return Target.logit(token)
    return Target.difference(token, _token(model, "against", against))


def _token(model: nn.Module, name: str, text: str) -> int:
    """A token by its string, where one has it; SentencePiece would put a space before the text."""
    strings = Vocabulary.of(model).strings
    return strings.index(text) if text in strings else one_token(model, name, text)


def save_all(
    graph: AttributionGraph, folder: str | Path, *, slug: str, details: Details | None = None
) -> Path:
    """Write `graph.json`, `graph.graphml`, `graph.html` and the folder `circuit-tracer`.

    Args:
        graph: pruned, as it is to be looked at.
        folder: where to.
        slug: the graph's name: letters, digits, `-` and `_`.
        details: z patterns, contexts and QK tracing of its heads.

    Returns:
        The page.
    """
    folder, details = Path(folder), details or Details()
    page = save_graph_page(graph, folder / "graph.html", details=details, title=f"Circuit: {slug}")
    graph.save(folder / "graph.json")
    save_graphml(graph, folder / "graph.graphml")
    save_circuit_tracer(graph, folder / "circuit-tracer", slug=slug, details=details)
    return page
