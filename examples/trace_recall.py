"""Circuit tracing on a model that we train ourselves: the previous token feeds induction.

A two-layer attention-only transformer learns to recall pairs: after "word3 word8 ... word3" comes
"word8". We trace its answers to the singular vectors that carry them. The trace finds the textbook
circuit: the head of the second layer attends to the value, since the head of the first layer has
written there which word came before.

    python examples/trace_recall.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorsa_lens.demo.example import example_options, show
from lorsa_lens.singular import (
    Circuit,
    Stream,
    circuit_view,
    edge_table,
    intervene,
    logit_seeds,
    random_control,
    record_stream,
    sparsity,
    trace,
)
from lorsa_lens.testbed import RecallLanguage, load_model
from lorsa_lens.testbed.train import RECIPES, network_config, save_model, train
from lorsa_lens.views import Heading, Table

LANGUAGE = RecallLanguage()

MIN_WEIGHT = 0.3
"""Edges of at least this weight are ablated."""

N_CONTROLS = 4
"""Random vectors that are ablated for each edge."""


def trained(folder: Path) -> Any:
    """Train the model, in less than a minute, and load it."""
    recipe = RECIPES["recall"]
    weights = train(LANGUAGE, recipe, show_progress=True)
    save_model(folder, "recall", weights, network_config(recipe, LANGUAGE), recipe)
    return load_model("recall", folder=folder)


def recall_prompt(seed: int) -> tuple[torch.Tensor, int]:
    """Sixteen different pairs, then the key of one of them; and its value."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(32, generator=generator) + 1
    pair = 2 + seed % 12
    bos = torch.zeros(1, dtype=torch.int64)
    return torch.cat((bos, words, words[2 * pair : 2 * pair + 1])), int(words[2 * pair + 1])


def traced(model: Any, seed: int) -> tuple[Stream, Circuit]:
    """The circuit of one prompt: the answer's logit over that of the best other word."""
    prompt, answer = recall_prompt(seed)
    stream = record_stream(model, prompt)
    logits = stream.logits[-1].clone()
    logits[answer] = -torch.inf
    seeds = logit_seeds(stream, answer, int(logits.argmax()))
    return stream, trace(stream, seeds, tokens=LANGUAGE.str_tokens(prompt))


def effects(stream: Stream, circuit: Circuit) -> tuple[list[float], list[float]]:
    """Change of attention when strong edges into heads are ablated, and for random vectors."""
    edges = [e for e in circuit.edges if e.down.kind == "head" and e.weight >= MIN_WEIGHT]
    controls = [
        random_control(stream, edge, seed=seed) for edge in edges for seed in range(N_CONTROLS)
    ]
    drops, nulls = (
        [change(intervene(stream, edge)) for edge in group] for group in (edges, controls)
    )
    return drops, nulls


def change(report: Any) -> float:
    """By how much the attention weight of an edge's head changed."""
    (effect,) = report.effects
    return float(effect.attention_after - effect.attention_before)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = example_options(__doc__, "recall")
    parser.add_argument(
        "--no-training", action="store_true", help="take the model that comes with the package"
    )
    parser.add_argument("--prompts", type=int, default=6, help="prompts to trace (default 6)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; returns the numbers that it prints."""
    options = options_of(argv)
    model = load_model("recall") if options.no_training else trained(options.out.parent)
    streams, circuits = zip(*(traced(model, seed) for seed in range(options.prompts)), strict=True)
    measured = [effects(*pair) for pair in zip(streams, circuits, strict=True)]
    from_heads = [
        edge.weight
        for circuit in circuits
        for edge in circuit.edges
        if edge.side == "src" and edge.up.kind == edge.down.kind == "head"
    ]
    numbers = {
        "weight of the source edge": mean(from_heads),
        "attention after ablating, change": mean([drop for drops, _ in measured for drop in drops]),
        "the same for random vectors": mean([null for _, nulls in measured for null in nulls]),
    }
    for row in sparsity(list(streams), greedy=False):
        numbers[f"{row.statistic}, singular"] = row.singular
        numbers[f"{row.statistic}, rotated (null)"] = row.rotated
    show(
        options.out,
        "Associative recall",
        Table(["", "mean"], [[name, value] for name, value in numbers.items()]),
        Heading("The circuit of the first prompt"),
        circuit_view(circuits[0]),
        edge_table(circuits[0]),
    )
    return numbers


if __name__ == "__main__":
    main()
