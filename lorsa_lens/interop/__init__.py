"""What others trained and what they can use: other layouts, other libraries, other files.

The names below are imported when they are first used; optional packages are not imported before.
"""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.interop.graph_json import save_graph
    from lorsa_lens.interop.graph_parts import Example, Graph, Link, Node, QKTracing
    from lorsa_lens.interop.llamascopium import save_llamascopium, split_signs
    from lorsa_lens.interop.saelens import as_lorsa, as_sae, at_output, load_attention_sae
    from lorsa_lens.interop.sites import to_site

__all__ = [
    "Example",
    "Graph",
    "Link",
    "Node",
    "QKTracing",
    "as_lorsa",
    "as_sae",
    "at_output",
    "load_attention_sae",
    "save_graph",
    "save_llamascopium",
    "split_signs",
    "to_site",
]

_HOMES = {
    "Example": "graph_parts",
    "Graph": "graph_parts",
    "Link": "graph_parts",
    "Node": "graph_parts",
    "QKTracing": "graph_parts",
    "as_lorsa": "saelens",
    "as_sae": "saelens",
    "at_output": "saelens",
    "load_attention_sae": "saelens",
    "save_graph": "graph_json",
    "save_llamascopium": "llamascopium",
    "split_signs": "llamascopium",
    "to_site": "sites",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
