"""The circuit of associative recall, from Lorsa heads: what is moved, and why from there.

A two-layer attention-only transformer has learned to recall pairs: after "word3 word8 ... word3"
comes "word8". Both layers are replaced by Lorsas. The attribution graph of an answer shows what is
moved: the value's embedding, by an induction head. Why that head attends to the value is asked of
its query-key circuit: since a previous-token head has written there which word came before. The
last table switches these heads off and measures what the graph predicts.

    python examples/circuit_of_recall.py
"""

from collections.abc import Sequence
from typing import NamedTuple

from lorsa_lens.circuits.chains import strongest_chain
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.interventions import ablate, intervene
from lorsa_lens.circuits.page import save_graph_page
from lorsa_lens.circuits.paths import path_table
from lorsa_lens.circuits.prompt import Explanation, explain
from lorsa_lens.circuits.replacement import local_replacement
from lorsa_lens.circuits.score_effects import attention_effects
from lorsa_lens.circuits.targets import Target
from lorsa_lens.demo.example import example_options
from lorsa_lens.demo.recall_circuit import (
    answer_losses,
    attention_table,
    behaviours,
    recall_prompt,
    recovered,
    trained_lorsas,
)
from lorsa_lens.testbed import RecallLanguage, load_model
from lorsa_lens.views import Table


class Found(NamedTuple):
    """What the example found."""

    explanation: Explanation
    labels: dict[tuple[int, int], str]
    """Behaviours of heads, measured on other text."""
    chain: tuple[Node, ...]
    """The strongest chain of heads that ends at the answer."""
    loss_recovered: float
    """With both layers replaced."""
    changes: dict[str, tuple[float, float]]
    """Change of the answer's logit without some heads: predicted with all frozen, and live."""


def without(explained: Explanation, groups: dict[str, list[Node]], target: Target) -> dict:
    """What the answer's logit loses without the heads of each group."""
    (answer,) = explained.graph.targets
    changes = {}
    for name, nodes in groups.items():
        predicted, live = (
            intervene(explained.replacement, ablate(nodes), target, live=live).of(answer)
            for live in (False, True)
        )
        changes[name] = (predicted[0], live[1])
    return changes


def main(argv: Sequence[str] | None = None) -> Found:
    """Run the example."""
    parser = example_options(__doc__, "circuit_of_recall")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300)")
    parser.add_argument("--seed", type=int, default=3, help="of the prompt (default 3)")
    options = parser.parse_args(argv)

    model, vocab = load_model("recall"), RecallLanguage().vocab
    lorsas = trained_lorsas(model, options.steps)
    labels, losses = behaviours(model, lorsas), answer_losses(model, lorsas)
    print(Table(["cross entropy of answers", "nats"], [list(row) for row in losses.items()]))
    print(f"recovered by both Lorsas: {recovered(losses):.3f}\n")

    prompt, answer = recall_prompt(options.seed)
    words = [vocab[token] for token in prompt.tolist()]
    target = Target.logit(answer)
    replacement = local_replacement(model, lorsas.values(), prompt, str_tokens=words)
    explained = explain(
        replacement, target, n_nodes="all", n_traced=4, labels=labels, target_names=vocab
    )
    graph = explained.graph
    print(f"prompt: {' '.join(words)}\n\nWhat is moved:\n\n{path_table(graph, 6)}\n")

    head = next(iter(explained.details.qk))
    traced = explained.details.qk[head]
    print(f"Why {head.id} attends to {words[traced['key']]} ({traced['key']}), with weight "
          f"{traced['weight']:.2f}:\n\n{attention_table(traced)}\n")  # fmt: skip
    heads = [node for node in graph.nodes if node.kind == "head" and node.layer == 1]
    chain = strongest_chain(explained.whole, attention_effects(replacement, heads)).nodes
    print("the strongest chain: " + " → ".join(node.id for node in chain) + "\n")

    groups = {"the induction head": [head], "the head that it looks for": [chain[0]]}
    changes = without(explained, groups, target)
    rows = [[name, *values] for name, values in changes.items()]
    print(Table(["logit of the answer without", "predicted, frozen", "measured, live"], rows))
    page = save_graph_page(graph, options.out, details=explained.details, title="Recall")
    print(f"\nThe page: {page}")
    return Found(explained, labels, chain, recovered(losses), changes)


if __name__ == "__main__":
    main()
