"""Indirect object identification in GPT-2 small: traced circuits against the published one.

"When Mary and John went to the store, John gave a drink to" -> " Mary". The circuit of each prompt
is traced from the logit difference; their union is compared with the 26 heads of Wang et al.
(arXiv 2211.00593). It needs the network, or a local folder with the model:

    python examples/ioi_gpt2.py
    python examples/ioi_gpt2.py path/to/gpt2
"""

import sys
from pathlib import Path
from typing import Any

from lorsa_lens.singular import (
    IOI_HEADS,
    Circuit,
    logit_seeds,
    match_heads,
    merge,
    record_stream,
    save_page,
    sparsity,
    trace,
)

NAMES = [("Mary", "John"), ("Alice", "Tom"), ("Anna", "David"), ("Sarah", "Paul")]
TEMPLATE = "When {io} and {s} went to the store, {s} gave a drink to"


def main(model: Any = None, template: str = TEMPLATE, folder: str = "lorsa_trace") -> Circuit:
    """Run the example; returns the merged circuit.

    Args:
        model: a host with a tokenizer. None: GPT-2 small, or what the command line names.
        template: text with {io} and {s}, in which every prompt has as many tokens.
        folder: where the pages go.
    """
    if model is None:
        from lorsa_lens.hosts.loading import load_host

        model = load_host(sys.argv[1] if len(sys.argv) > 1 else "gpt2")
        model.enable_compatibility_mode()  # fold the norms, as the publication did
    circuits, streams = [], []
    for io, s in NAMES:
        tokens = model.to_tokens(template.format(io=io, s=s), prepend_bos=True)
        answer, wrong = (model.to_single_token(f" {name}") for name in (io, s))
        stream = record_stream(model, tokens)
        words = [model.to_string(token[None]) for token in tokens[0]]
        circuit = trace(stream, logit_seeds(stream, answer, wrong), tokens=words)
        match = match_heads(circuit.heads)
        print(
            f"{io} and {s}: {len(circuit.nodes)} nodes, {len(circuit.edges)} edges, "
            f"{len(circuit.heads)} heads, {len(circuit.heads & IOI_HEADS)} of the published"
        )
        print(f"  precision {match.precision:.2f}, recall {match.recall:.2f}, F1 {match.f1:.2f}")
        circuits.append(circuit)
        streams.append(stream)
    merged = merge(circuits)
    match = match_heads(merged.heads)
    print(f"merged: precision {match.precision:.2f}, recall {match.recall:.2f}, F1 {match.f1:.2f}")
    for row in sparsity(streams[:1], greedy=False, n_rotations=1):
        print(f"{row.statistic}: {row.singular:.2f} of singular vectors, {row.rotated:.2f} rotated")
    if circuits[0].nodes:
        save_page(circuits[0], Path(folder) / "ioi.html", title="IOI")
    return merged


if __name__ == "__main__":
    main()
