"""A transformer read off its weights: previous-token circuit, induction circuit, who composes.

A two-layer attention-only transformer has learned to look up what followed the current word before.
We train a Lorsa on both layers. Then, without running any text, we multiply weights: what the heads
of the first layer write, as queries and keys of the second layer read it. Equal tokens attract each
other through the heads that fetch the previous token: an induction circuit.

    python examples/global_induction_circuit.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorsa_lens import Lorsa, splice
from lorsa_lens.circuits.coactivation import measure_coactivation
from lorsa_lens.circuits.global_circuit import GlobalCircuit
from lorsa_lens.circuits.global_page import global_sections
from lorsa_lens.circuits.global_tables import composition_graph, save_composition_graph, score_table
from lorsa_lens.circuits.programs import program
from lorsa_lens.demo.example import example_options
from lorsa_lens.testbed import CyclicLanguage, LabelledTokens, RecallLanguage, load_model
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.views import save

LANGUAGES = {
    "induction": CyclicLanguage(n_ctx=19, min_period=9),  # so short that every source is unique
    "recall": RecallLanguage(),
}


class Found(NamedTuple):
    """What the example found."""

    accuracy: float
    """With both layers replaced."""

    key_match: float
    """By how much equal tokens attract each other through what heads wrote at the key."""

    query_match: float
    """The same through what they wrote at the query."""

    program: str
    """What the weights tell."""


def trained_lorsas(model: Any, name: str, n_steps: int) -> dict[int, Lorsa]:
    """A Lorsa for each layer."""
    tokens = LANGUAGES[name].sample(1024, seed=1).tokens
    n_pos = tokens.shape[1]
    config = TrainingConfig(
        n_qk_heads=6 if name == "induction" else 2,
        n_ov_heads=192,
        k=8,
        context_size=n_pos,
        train_batch_size_tokens=32 * n_pos,
        training_tokens=n_steps * 32 * n_pos,
    )
    return train(model, tokens, [0, 1], config)


@torch.no_grad()
def accuracy(model: Any, lorsas: dict[int, Lorsa], labels: LabelledTokens) -> float:
    """Share of right answers with both layers replaced."""
    with splice(model, lorsas.values()):
        logits = model(labels.tokens)
    asked = labels.answer >= 0
    return float((logits[asked].argmax(-1) == labels.answer[asked]).double().mean())


def main(argv: Sequence[str] | None = None) -> Found:
    """Run the example."""
    parser = example_options(__doc__, "global_induction_circuit")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps (default 250)")
    parser.add_argument("--model", choices=LANGUAGES, default="induction", help="which model")
    parser.add_argument("--graphml", type=Path, default=None, help="also write a GraphML file")
    options = parser.parse_args(argv)

    model, language = load_model(options.model), LANGUAGES[options.model]
    lorsas = trained_lorsas(model, options.model, options.steps)
    circuit = GlobalCircuit(model, lorsas, n_pos=language.n_ctx)
    found = Found(
        accuracy=accuracy(model, lorsas, language.sample(128, seed=2)),
        key_match=circuit.matches(0, 1, "key").sum().item(),
        query_match=circuit.matches(0, 1, "query").sum().item(),
        program=program(circuit, strings=language.vocab),
    )
    print(found.program)
    print()
    print(score_table(circuit, n=12).to_string(index=False))
    print(f"\naccuracy with both layers replaced   {found.accuracy:.3f}")
    print(f"match of all heads through keys      {found.key_match:.1f}")
    print(f"match of all heads through queries   {found.query_match:.1f}")

    statistics = measure_coactivation(circuit, language.sample(64, seed=3).tokens)
    sections = global_sections(circuit, statistics=statistics, strings=language.vocab)
    saved = save(options.out, *sections, title=f"Global circuit: {options.model}")
    print(f"\nThe page: {saved}")
    if options.graphml is not None:
        print(f"wrote {save_composition_graph(composition_graph(circuit), options.graphml)}")
    return found


if __name__ == "__main__":
    main()
