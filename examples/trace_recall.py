"""Circuit tracing on a model that we train ourselves: the previous token feeds induction.

A two-layer attention-only transformer learns to recall pairs: after "word3 word8 ... word3" comes
"word8". We trace its answers to the singular vectors that carry them. The trace finds the textbook
circuit: the head of the second layer attends to the value, since the head of the first layer has
written there which word came before.

    python examples/trace_recall.py
"""

from pathlib import Path

import torch

from lorsa_lens.singular import (
    intervene,
    logit_seeds,
    random_control,
    record_stream,
    save_page,
    sparsity,
    trace,
)
from lorsa_lens.testbed import RecallLanguage, load_model
from lorsa_lens.testbed.train import RECIPES, network_config, save_model, train

FOLDER = Path("lorsa_trace")


def main(retrain: bool = True, n_prompts: int = 6) -> dict[str, float]:
    """Run the example; returns the numbers that it prints.

    Args:
        retrain: train the model first; else take the one that comes along.
        n_prompts: how many prompts are traced.
    """
    model = trained() if retrain else load_model("recall")
    streams, circuits = [], []
    language = RecallLanguage()
    for number in range(n_prompts):
        prompt, answer = recall_prompt(seed=number)
        stream = record_stream(model, prompt)
        logits = stream.logits[-1].clone()
        logits[answer] = -torch.inf
        seeds = logit_seeds(stream, answer, int(logits.argmax()))
        circuit = trace(stream, seeds, tokens=language.str_tokens(prompt))
        streams.append(stream)
        circuits.append(circuit)
    save_page(circuits[0], FOLDER / "recall.html", title="Associative recall")

    print("edges into the induction head, prompt by prompt:")
    drops, controls, source_weights = [], [], []
    for stream, circuit in zip(streams, circuits, strict=True):
        for edge in circuit.edges:
            if edge.down.kind != "head":
                continue
            vectors = ", ".join(map(str, edge.vectors))
            print(
                f"  {edge.up.id:18} -> {edge.down.id:18} through the {edge.side:4} weight "
                f"{edge.weight:.3f} singular vectors {vectors}"
            )
            if edge.side == "src" and edge.up.kind == "head":
                source_weights.append(edge.weight)
            if edge.weight >= 0.3:
                drops.append(change(intervene(stream, edge)))
                random = [random_control(stream, edge, seed=seed) for seed in range(4)]
                controls += [change(intervene(stream, control)) for control in random]
    numbers = {
        "weight of the source edge": mean(source_weights),
        "attention after ablating, change": mean(drops),
        "the same for random vectors": mean(controls),
    }
    for row in sparsity(streams, greedy=False):
        numbers[f"{row.statistic}, singular"] = row.singular
        numbers[f"{row.statistic}, rotated (null)"] = row.rotated
    for name, value in numbers.items():
        print(f"{name:40} {value:.3g}")
    return numbers


def trained() -> object:
    """Train the model, in less than a minute, and load it."""
    recipe, language = RECIPES["recall"], RecallLanguage()
    weights = train(language, recipe, show_progress=True)
    save_model(FOLDER, "recall", weights, network_config(recipe, language), recipe)
    return load_model("recall", folder=FOLDER)


def recall_prompt(seed: int) -> tuple[torch.Tensor, int]:
    """Sixteen different pairs, then the key of one of them; and its value."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(32, generator=generator) + 1
    pair = 2 + seed % 12
    bos = torch.zeros(1, dtype=torch.int64)
    return torch.cat((bos, words, words[2 * pair : 2 * pair + 1])), int(words[2 * pair + 1])


def change(report) -> float:
    """By how much the attention weight of an edge's head changed."""
    (effect,) = report.effects
    return effect.attention_after - effect.attention_before


def mean(values: list[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
