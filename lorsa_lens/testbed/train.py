"""Train the testbed's models: ``python -m lorsa_lens.testbed.train``.

Without arguments this reproduces the committed weights. Everything random comes from the seeds of
the recipe and the run uses float32 on one CPU thread: on one machine with one version of torch the
weights repeat bit for bit; elsewhere rounding differs and only the accuracies can be expected to.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.testbed.labels import LabelledTokens, Language
from lorsa_lens.testbed.models import MODEL_NAMES, WEIGHTS_DIR, ModelName, load_language
from lorsa_lens.testbed.network import NetworkConfig, initial_weights, run_network
from lorsa_lens.testbed.scores import rule_accuracy, rule_cross_entropy, source_mass


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        n_layers: Attention layers of the model.
        n_steps: Optimiser steps.
        batch_size: Sequences per step; every step sees new ones.
        n_heads: Heads per layer.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        learning_rate: Peak learning rate; linear warm-up, then a cosine down to 0.
        n_warmup: Steps of warm-up.
        weight_decay: AdamW's decoupled decay, on every parameter.
        betas: AdamW's moment decays.
        max_grad_norm: Gradients are scaled down to this norm.
        other_weight: Weight of the cross-entropy at positions where no rule holds (1 where one
            does).
        seed: Seed of the initial weights and of the training sequences.
    """

    n_layers: int
    n_steps: int
    batch_size: int
    n_heads: int = 3
    d_model: int = 64
    d_head: int = 16
    learning_rate: float = 4e-3
    n_warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    other_weight: float = 0.2
    seed: int = 0


RECIPES: dict[ModelName, Recipe] = {
    "rules": Recipe(n_layers=1, n_steps=1000, batch_size=96),
    "induction": Recipe(n_layers=2, n_steps=400, batch_size=96, n_warmup=50),
    "recall": Recipe(
        n_layers=2,
        n_steps=1200,
        batch_size=64,
        n_heads=1,
        d_model=128,
        d_head=32,
        learning_rate=5e-3,
        n_warmup=50,
        weight_decay=0.01,
        other_weight=0.02,
    ),
}

# Training draws its sequences with seeds from here up, so that sequences drawn with small seeds are
# held out.
_TRAINING_SEED = 1_000_000_000
EVALUATION_SEED = 0
_BATCHES_PER_DRAW = 50


class Evaluation(NamedTuple):
    """Scores of a trained model on held-out sequences.

    Attributes:
        accuracy: Accuracy at each rule's queries; NaN for a rule without an answer.
        cross_entropy: Cross-entropy of the answers in nats.
        mass: Mean attention on the true source, per layer.
    """

    accuracy: Float[Tensor, "rule"]
    cross_entropy: Float[Tensor, "rule"]
    mass: Float[Tensor, "layer rule head"]


def network_config(recipe: Recipe, language: Language) -> NetworkConfig:
    """Shape of the network of a recipe for a language."""
    return NetworkConfig(
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        d_model=recipe.d_model,
        d_head=recipe.d_head,
        n_ctx=language.n_ctx,
        d_vocab=len(language.vocab),
    )


def train(language: Language, recipe: Recipe, *, show_progress: bool = False) -> dict[str, Tensor]:
    """Train a network on a language.

    Args:
        language: Source of the sequences.
        recipe: Shape, optimiser and seeds.
        show_progress: Draw a progress bar on stderr.

    Returns:
        The weights by HookedTransformer name.

    Raises:
        ValueError: if ``n_steps`` or ``batch_size`` is below 1.
    """
    for name in ("n_steps", "batch_size"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"recipe.{name} must be at least 1, got {getattr(recipe, name)}")
    config = network_config(recipe, language)
    weights = {
        name: weight.requires_grad_()
        for name, weight in initial_weights(config, seed=recipe.seed).items()
    }
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    steps = range(recipe.n_steps)
    for step in track(steps, console=Console(stderr=True)) if show_progress else steps:
        draw, batch = divmod(step, _BATCHES_PER_DRAW)
        if batch == 0:
            n_batches = min(_BATCHES_PER_DRAW, recipe.n_steps - step)
            seed = _TRAINING_SEED + 1_000_000 * recipe.seed + draw
            pool = language.sample(n_batches * recipe.batch_size, seed=seed)
        rows = slice(batch * recipe.batch_size, (batch + 1) * recipe.batch_size)
        labels = LabelledTokens(*(tensor[rows] for tensor in pool))
        loss = weighted_loss(
            run_network(weights, labels.tokens, config).logits, labels, recipe.other_weight
        )
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, recipe.n_warmup))
    return warm * 0.5 * (1 + cos(pi * step / recipe.n_steps))


def weighted_loss(
    logits: Float[Tensor, "batch pos vocab"], labels: LabelledTokens, other_weight: float
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy, weighted 1 where a rule demands it, else ``other_weight``.

    The target is the rule's answer, else the token that follows. The last position counts too where
    a rule holds there: its answer is known although the sequence ends, and without it the last
    position embedding would never be trained as a query.
    """
    following = torch.nn.functional.pad(labels.tokens[:, 1:], (0, 1), value=-1)
    target = torch.where(labels.answer >= 0, labels.answer, following)
    weight = torch.where(labels.answer >= 0, 1.0, other_weight).masked_fill(target < 0, 0.0)
    loss = torch.nn.functional.cross_entropy(
        rearrange(logits, "batch pos vocab -> batch vocab pos"),
        target,
        ignore_index=-1,
        reduction="none",
    )
    return (loss * weight).sum() / weight.sum()


@torch.no_grad()
def evaluate(
    weights: Mapping[str, Tensor], language: Language, config: NetworkConfig, labels: LabelledTokens
) -> Evaluation:
    """Score a network on labelled sequences."""
    n_rules = len(language.rules)
    output = run_network(weights, labels.tokens, config)
    return Evaluation(
        rule_accuracy(output.logits, labels, n_rules),
        rule_cross_entropy(output.logits, labels, n_rules),
        torch.stack([source_mass(pattern, labels, n_rules) for pattern in output.patterns]),
    )


def save_model(
    folder: Path, name: str, weights: Mapping[str, Tensor], config: NetworkConfig, recipe: Recipe
) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json``, each atomically."""
    description = {"network": asdict(config), "recipe": asdict(recipe)}
    ordered = {key: weights[key].contiguous() for key in sorted(weights)}
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(ordered, temporary)
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _score_table(
    name: str, language: Language, labels: LabelledTokens, scores: Evaluation
) -> Table:
    """Accuracy, cross-entropy and attention on the true source, one row per rule."""
    n_layers, _, n_heads = scores.mass.shape
    heads = [f"{layer}.{head}" for layer in range(n_layers) for head in range(n_heads)]
    table = Table(
        title=f"{name}: {len(labels.tokens)} held-out sequences",
        box=SIMPLE,
        collapse_padding=True,
        caption="CE in nats; per layer.head the attention on the true source",
    )
    for column in ("rule", "queries", "acc.", "CE", *heads):
        table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    for index, rule in enumerate(language.rules):
        n_queries = int((labels.rule == index).sum())
        if n_queries == 0:
            continue
        mass = rearrange(scores.mass[:, index], "layer head -> (layer head)").tolist()
        accuracy, loss = float(scores.accuracy[index]), float(scores.cross_entropy[index])
        cells = (f"{accuracy:.3f}", f"{loss:.4f}", *(f"{share:.2f}" for share in mass))
        table.add_row(rule, str(n_queries), *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Command line: train, save and print the scores."""
    parser = argparse.ArgumentParser(prog="python -m lorsa_lens.testbed.train", description=__doc__)
    parser.add_argument("--model", choices=[*MODEL_NAMES, "all"], default="all")
    parser.add_argument(
        "--output",
        type=Path,
        default=WEIGHTS_DIR,
        help="folder for the weights; default: the committed ones, which are replaced",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the recipe's")
    parser.add_argument("--seed", type=int, help="seed instead of the recipe's")
    parser.add_argument("--sequences", type=int, default=2048, help="held-out sequences to score")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in MODEL_NAMES if options.model == "all" else (options.model,):
        recipe, language = RECIPES[name], load_language(name)
        if options.steps is not None:
            recipe = replace(recipe, n_steps=options.steps)
        if options.seed is not None:
            recipe = replace(recipe, seed=options.seed)
        weights = train(language, recipe, show_progress=True)
        config = network_config(recipe, language)
        save_model(options.output, name, weights, config, recipe)
        labels = language.sample(options.sequences, seed=EVALUATION_SEED)
        Console().print(
            _score_table(name, language, labels, evaluate(weights, language, config, labels))
        )


if __name__ == "__main__":
    main()
