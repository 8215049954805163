"""Singular vectors of attention: sparse decomposition of scores, and circuit tracing.

One `QKHead` stands for an attention head of a model and for a query-key circuit of a Lorsa alike.

    stream = record_stream(model, tokens)
    circuit = trace(stream, logit_seeds(stream, answer, wrong))
    save_page(circuit, "circuit.html")
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.singular.augmented import AugmentedFiring, Cumulative
    from lorsa_lens.singular.basis import Basis, HeadBasis, head_basis
    from lorsa_lens.singular.breakdown import Breakdown, break_down
    from lorsa_lens.singular.components import Component, Firing
    from lorsa_lens.singular.drawing import circuit_view, edge_table, save_page
    from lorsa_lens.singular.edits import Edit, edited
    from lorsa_lens.singular.exports import (
        save_circuit_tracer,
        save_graphml,
        to_circuit_tracer,
        to_networkx,
    )
    from lorsa_lens.singular.graph import Circuit, Edge, Node
    from lorsa_lens.singular.greedy import Explanation, Greedy
    from lorsa_lens.singular.heads import IOI_CIRCUIT, IOI_HEADS, HeadMatch, match_heads
    from lorsa_lens.singular.interventions import (
        EdgeEffect,
        InterventionReport,
        intervene,
        random_control,
    )
    from lorsa_lens.singular.level_page import save_level_page
    from lorsa_lens.singular.levels import LevelComparison, compare_levels
    from lorsa_lens.singular.merging import (
        cluster,
        jaccard,
        merge,
        prune_by_effect,
        prune_by_frequency,
    )
    from lorsa_lens.singular.method import Method
    from lorsa_lens.singular.prompt import trace_prompt
    from lorsa_lens.singular.qk_head import QKHead, QKReading
    from lorsa_lens.singular.relative import Relative, RelativeFiring
    from lorsa_lens.singular.seeds import Seed, direction_seeds, logit_seeds, probability_seeds
    from lorsa_lens.singular.selection import (
        attention_threshold,
        relative_attention,
        select_cumulative,
        select_greedy,
        select_relative,
    )
    from lorsa_lens.singular.signals import signal
    from lorsa_lens.singular.statistics import Sparsity, firings_of, rolls_tovee, sparsity
    from lorsa_lens.singular.stream import LayerStream, Stream, record_stream
    from lorsa_lens.singular.tracer import trace, trace_firings

_HOMES = {
    "AugmentedFiring": "augmented",
    "Basis": "basis",
    "Breakdown": "breakdown",
    "Circuit": "graph",
    "Component": "components",
    "Cumulative": "augmented",
    "Edge": "graph",
    "EdgeEffect": "interventions",
    "Edit": "edits",
    "Explanation": "greedy",
    "Firing": "components",
    "Greedy": "greedy",
    "HeadBasis": "basis",
    "HeadMatch": "heads",
    "IOI_CIRCUIT": "heads",
    "IOI_HEADS": "heads",
    "InterventionReport": "interventions",
    "LayerStream": "stream",
    "LevelComparison": "levels",
    "Method": "method",
    "Node": "graph",
    "QKHead": "qk_head",
    "QKReading": "qk_head",
    "Relative": "relative",
    "RelativeFiring": "relative",
    "Seed": "seeds",
    "Sparsity": "statistics",
    "Stream": "stream",
    "attention_threshold": "selection",
    "break_down": "breakdown",
    "circuit_view": "drawing",
    "cluster": "merging",
    "compare_levels": "levels",
    "direction_seeds": "seeds",
    "edge_table": "drawing",
    "edited": "edits",
    "firings_of": "statistics",
    "head_basis": "basis",
    "intervene": "interventions",
    "jaccard": "merging",
    "logit_seeds": "seeds",
    "match_heads": "heads",
    "merge": "merging",
    "probability_seeds": "seeds",
    "prune_by_effect": "merging",
    "prune_by_frequency": "merging",
    "random_control": "interventions",
    "record_stream": "stream",
    "relative_attention": "selection",
    "rolls_tovee": "statistics",
    "save_circuit_tracer": "exports",
    "save_graphml": "exports",
    "save_level_page": "level_page",
    "save_page": "drawing",
    "select_cumulative": "selection",
    "select_greedy": "selection",
    "select_relative": "selection",
    "signal": "signals",
    "sparsity": "statistics",
    "to_circuit_tracer": "exports",
    "to_networkx": "exports",
    "trace": "tracer",
    "trace_firings": "tracer",
    "trace_prompt": "prompt",
}

__all__ = [
    "IOI_CIRCUIT",
    "IOI_HEADS",
    "AugmentedFiring",
    "Basis",
    "Breakdown",
    "Circuit",
    "Component",
    "Cumulative",
    "Edge",
    "EdgeEffect",
    "Edit",
    "Explanation",
    "Firing",
    "Greedy",
    "HeadBasis",
    "HeadMatch",
    "InterventionReport",
    "LayerStream",
    "LevelComparison",
    "Method",
    "Node",
    "QKHead",
    "QKReading",
    "Relative",
    "RelativeFiring",
    "Seed",
    "Sparsity",
    "Stream",
    "attention_threshold",
    "break_down",
    "circuit_view",
    "cluster",
    "compare_levels",
    "direction_seeds",
    "edge_table",
    "edited",
    "firings_of",
    "head_basis",
    "intervene",
    "jaccard",
    "logit_seeds",
    "match_heads",
    "merge",
    "probability_seeds",
    "prune_by_effect",
    "prune_by_frequency",
    "random_control",
    "record_stream",
    "relative_attention",
    "rolls_tovee",
    "save_circuit_tracer",
    "save_graphml",
    "save_level_page",
    "save_page",
    "select_cumulative",
    "select_greedy",
    "select_relative",
    "signal",
    "sparsity",
    "to_circuit_tracer",
    "to_networkx",
    "trace",
    "trace_firings",
    "trace_prompt",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
