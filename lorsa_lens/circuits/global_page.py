"""A global circuit as sections of a page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorsa_lens.circuits.coactivation import Coactivation
from lorsa_lens.circuits.global_circuit import GlobalCircuit
from lorsa_lens.circuits.global_tables import end_table, pair_table, score_table, value_table
from lorsa_lens.circuits.programs import program
from lorsa_lens.views.page import Static
from lorsa_lens.views.sections import Heading, Table, Text

if TYPE_CHECKING:
    from pandas import DataFrame


def global_sections(
    circuit: GlobalCircuit,
    *,
    statistics: Coactivation | None = None,
    strings: Sequence[str] | None = None,
    offset: int = 1,
    n: int = 20,
) -> list[Static]:
    """What weights alone tell, for `lorsa_lens.views.save`.

    Args:
        circuit: the model's Lorsas.
        statistics: adds tables of expected attributions on a corpus.
        strings: of all tokens.
        offset: tokens from key to query, where positions are rotary.
        n: rows of each table.
    """
    written = program(circuit, strings=strings, offset=offset)
    sections: list[Static] = [
        Heading("The program"),
        *(Text(line.strip()) for line in written.splitlines()),
        Heading("Heads that make circuits attend"),
        Text(
            "Match: by how much equal tokens attract each other through the head, in units of "
            "scores. Strength: how much the head moves scores at all."
        ),
        _section(score_table(circuit, offset=offset, n=n)),
        Heading("Heads that fetch what heads have written"),
        _section(value_table(circuit, n=n)),
    ]
    top = max(circuit.layers)
    for number in range(len(circuit.layers[top].circuits)):
        pairs = pair_table(circuit, top, number, offset=offset, strings=strings, n=n)
        sections += [Heading(f"What L{top}.qk{number} looks for", level=3), _section(pairs)]
    for layer in circuit.layers:
        ends = end_table(circuit, layer, strings=strings, n=n)
        sections += [Heading(f"Layer {layer}: from tokens to logits", level=3), _section(ends)]
    if statistics is not None:
        found = score_table(circuit, statistics=statistics, rank_by="expected", offset=offset, n=n)
        sections += [
            Heading(f"On {statistics.n_tokens} tokens of a corpus"),
            _section(found),
            _section(value_table(circuit, statistics=statistics, n=n)),
        ]
    return sections


def _section(frame: "DataFrame") -> Table:
    return Table(list(frame.columns), frame.values.tolist())
