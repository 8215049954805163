"""Circuits: attribution graphs whose nodes are Lorsa heads.

    local_replacement -> attribution_graph -> prune -> graph_scores, trust_report

On one prompt, with attention patterns, norm scales and selection masks frozen, the residual stream
is linear: every pre-activation is an exact sum of direct effects.
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.circuits.attention_links import trace_heads, with_attention_nodes
    from lorsa_lens.circuits.attribution import GraphSize, attribution_graph, graph_size
    from lorsa_lens.circuits.chains import Chain, strongest_chain
    from lorsa_lens.circuits.coactivation import Coactivation, measure_coactivation
    from lorsa_lens.circuits.details import Details, z_patterns
    from lorsa_lens.circuits.export import (
        save_circuit_tracer,
        save_graphml,
        to_circuit_tracer,
        to_networkx,
    )
    from lorsa_lens.circuits.first_order import FirstOrderEffects, first_order_effects
    from lorsa_lens.circuits.global_circuit import GlobalCircuit
    from lorsa_lens.circuits.global_page import global_sections
    from lorsa_lens.circuits.global_tables import (
        composition_graph,
        end_table,
        pair_table,
        save_composition_graph,
        score_table,
        value_table,
    )
    from lorsa_lens.circuits.graph import AttributionGraph, Node
    from lorsa_lens.circuits.influence import edge_influence, node_influence
    from lorsa_lens.circuits.interventions import (
        EdgeEffects,
        Effects,
        PathEffect,
        ablate,
        edge_effects,
        intervene,
        path_effect,
        steer,
        top_edges,
    )
    from lorsa_lens.circuits.loadings import HeadLoadings, head_loadings
    from lorsa_lens.circuits.low_rank import LowRank
    from lorsa_lens.circuits.page import GraphView, render_graph, save_graph_page
    from lorsa_lens.circuits.paths import GraphPath, path_table, strongest_paths
    from lorsa_lens.circuits.programs import Role, alignments, program, roles
    from lorsa_lens.circuits.prompt import Explanation, explain, explain_prompt, target_of
    from lorsa_lens.circuits.pruning import prune, top_nodes
    from lorsa_lens.circuits.qk_tracing import QKTracing, trace_qk
    from lorsa_lens.circuits.replacement import LocalReplacement, local_replacement
    from lorsa_lens.circuits.replay import Measured, Replay
    from lorsa_lens.circuits.score_effects import AttentionEffects, attention_effects
    from lorsa_lens.circuits.scores import (
        GraphScores,
        Stability,
        graph_scores,
        nodes_for,
        stability,
    )
    from lorsa_lens.circuits.supernodes import (
        SupernodeGraph,
        group_by_label,
        supernode_graph,
        with_supernodes,
    )
    from lorsa_lens.circuits.targets import Target
    from lorsa_lens.circuits.trust import Agreement, TrustReport, agreement, trust_report

_HOMES = {
    "Agreement": "trust",
    "AttentionEffects": "score_effects",
    "AttributionGraph": "graph",
    "Chain": "chains",
    "Coactivation": "coactivation",
    "Details": "details",
    "EdgeEffects": "interventions",
    "Effects": "interventions",
    "Explanation": "prompt",
    "FirstOrderEffects": "first_order",
    "GlobalCircuit": "global_circuit",
    "GraphPath": "paths",
    "GraphScores": "scores",
    "GraphSize": "attribution",
    "GraphView": "page",
    "HeadLoadings": "loadings",
    "LocalReplacement": "replacement",
    "LowRank": "low_rank",
    "Measured": "replay",
    "Node": "graph",
    "PathEffect": "interventions",
    "QKTracing": "qk_tracing",
    "Replay": "replay",
    "Role": "programs",
    "Stability": "scores",
    "SupernodeGraph": "supernodes",
    "Target": "targets",
    "TrustReport": "trust",
    "ablate": "interventions",
    "agreement": "trust",
    "alignments": "programs",
    "attention_effects": "score_effects",
    "attribution_graph": "attribution",
    "composition_graph": "global_tables",
    "edge_effects": "interventions",
    "edge_influence": "influence",
    "end_table": "global_tables",
    "explain": "prompt",
    "explain_prompt": "prompt",
    "first_order_effects": "first_order",
    "global_sections": "global_page",
    "graph_scores": "scores",
    "graph_size": "attribution",
    "group_by_label": "supernodes",
    "head_loadings": "loadings",
    "intervene": "interventions",
    "local_replacement": "replacement",
    "measure_coactivation": "coactivation",
    "node_influence": "influence",
    "nodes_for": "scores",
    "pair_table": "global_tables",
    "path_effect": "interventions",
    "path_table": "paths",
    "program": "programs",
    "prune": "pruning",
    "render_graph": "page",
    "roles": "programs",
    "save_circuit_tracer": "export",
    "save_composition_graph": "global_tables",
    "save_graph_page": "page",
    "save_graphml": "export",
    "score_table": "global_tables",
    "stability": "scores",
    "steer": "interventions",
    "strongest_chain": "chains",
    "strongest_paths": "paths",
    "supernode_graph": "supernodes",
    "target_of": "prompt",
    "to_circuit_tracer": "export",
    "to_networkx": "export",
    "top_edges": "interventions",
    "top_nodes": "pruning",
    "trace_heads": "attention_links",
    "trace_qk": "qk_tracing",
    "trust_report": "trust",
    "value_table": "global_tables",
    "with_attention_nodes": "attention_links",
    "with_supernodes": "supernodes",
    "z_patterns": "details",
}

__all__ = [
    "Agreement",
    "AttentionEffects",
    "AttributionGraph",
    "Chain",
    "Coactivation",
    "Details",
    "EdgeEffects",
    "Effects",
    "Explanation",
    "FirstOrderEffects",
    "GlobalCircuit",
    "GraphPath",
    "GraphScores",
    "GraphSize",
    "GraphView",
    "HeadLoadings",
    "LocalReplacement",
    "LowRank",
    "Measured",
    "Node",
    "PathEffect",
    "QKTracing",
    "Replay",
    "Role",
    "Stability",
    "SupernodeGraph",
    "Target",
    "TrustReport",
    "ablate",
    "agreement",
    "alignments",
    "attention_effects",
    "attribution_graph",
    "composition_graph",
    "edge_effects",
    "edge_influence",
    "end_table",
    "explain",
    "explain_prompt",
    "first_order_effects",
    "global_sections",
    "graph_scores",
    "graph_size",
    "group_by_label",
    "head_loadings",
    "intervene",
    "local_replacement",
    "measure_coactivation",
    "node_influence",
    "nodes_for",
    "pair_table",
    "path_effect",
    "path_table",
    "program",
    "prune",
    "render_graph",
    "roles",
    "save_circuit_tracer",
    "save_composition_graph",
    "save_graph_page",
    "save_graphml",
    "score_table",
    "stability",
    "steer",
    "strongest_chain",
    "strongest_paths",
    "supernode_graph",
    "target_of",
    "to_circuit_tracer",
    "to_networkx",
    "top_edges",
    "top_nodes",
    "trace_heads",
    "trace_qk",
    "trust_report",
    "value_table",
    "with_attention_nodes",
    "with_supernodes",
    "z_patterns",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
