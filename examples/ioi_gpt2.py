"""Indirect object identification in GPT-2 small: traced circuits against the published one.

"When Mary and John went to the store, John gave a drink to" -> " Mary". The circuit of each prompt
is traced from the logit difference; their union is compared with the 26 heads of Wang et al.
(arXiv 2211.00593). It needs the network, or a local folder with the model:

    python examples/ioi_gpt2.py
    python examples/ioi_gpt2.py --model path/to/gpt2
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorsa_lens.demo.example import example_options, show
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.singular import (
    IOI_HEADS,
    Circuit,
    Stream,
    circuit_view,
    edge_table,
    logit_seeds,
    match_heads,
    merge,
    record_stream,
    sparsity,
    trace,
)
from lorsa_lens.views import Heading, Table, Text
from lorsa_lens.views.page import Section

NAMES = [("Mary", "John"), ("Alice", "Tom"), ("Anna", "David"), ("Sarah", "Paul")]
TEMPLATE = "When {io} and {s} went to the store, {s} gave a drink to"


def traced(model: Any, template: str, io: str, s: str) -> tuple[Stream, Circuit]:
    """The circuit of one prompt, from the logit of the indirect object less that of the subject."""
    tokens = model.to_tokens(template.format(io=io, s=s), prepend_bos=True)
    answer, wrong = (model.to_single_token(f" {name}") for name in (io, s))
    stream = record_stream(model, tokens)
    words = [model.to_string(token[None]) for token in tokens[0]]
    return stream, trace(stream, logit_seeds(stream, answer, wrong), tokens=words)


def row_of(name: str, circuit: Circuit) -> list[str | int | float]:
    """A circuit's size, and how well its heads match the published ones."""
    match = match_heads(circuit.heads)
    return [
        name,
        len(circuit.nodes),
        len(circuit.edges),
        len(circuit.heads),
        len(circuit.heads & IOI_HEADS),
        match.precision,
        match.recall,
        match.f1,
    ]


def compare(model: Any, template: str, page: Path) -> Circuit:
    """Trace all prompts and show them beside the published circuit; returns their union.

    Args:
        model: a host with a tokenizer.
        template: text with {io} and {s}, in which every prompt has as many tokens.
        page: where the page goes.
    """
    found = [traced(model, template, io, s) for io, s in NAMES]
    circuits = [circuit for _, circuit in found]
    merged = merge(circuits)
    rows = [
        row_of(f"{io} and {s}", circuit) for (io, s), circuit in zip(NAMES, circuits, strict=True)
    ]
    statistics = [
        [row.statistic, row.singular, row.rotated]
        for row in sparsity([found[0][0]], greedy=False, n_rotations=1)
    ]
    header = ["prompt", "nodes", "edges", "heads", "published", "precision", "recall", "F1"]
    sections: list[Section] = [
        Table(header, [*rows, row_of("merged", merged)]),
        Text("How many vectors carry a score, and in a randomly rotated basis."),
        Table(["statistic", "singular", "rotated"], statistics),
    ]
    if circuits[0].nodes:
        sections += [
            Heading("The circuit of the first prompt"),
            circuit_view(circuits[0]),
            edge_table(circuits[0]),
        ]
    show(page, "Indirect object identification", *sections)
    return merged


def main(argv: Sequence[str] | None = None) -> Circuit:
    """Run the example; returns the merged circuit."""
    parser = example_options(__doc__, "ioi")
    parser.add_argument("--model", default="gpt2", help="folder or hub id (default gpt2)")
    options = parser.parse_args(argv)
    try:
        model = load_host(options.model)
    except ValueError as error:
        sys.exit(str(error))
    model.enable_compatibility_mode()  # fold the norms, as the publication did
    return compare(model, TEMPLATE, options.out)


if __name__ == "__main__":
    main()
