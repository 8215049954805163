"""What a training loop costs beside its two parts: the language model's pass and the step.

    python -m benchmarks.training --model PATH_OR_HUB_ID --tokens TOKENS.npy

CPU seconds of one process, so that other work on the machine does not count: of the whole loop, of
the same passes of the language model by themselves, and of the same optimizer steps on activations
that are there already. The three take turns. Of the loop, what its second half takes, so that its
start (Lorsas made from the layers, scales) does not count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lorsa_lens.data import ActivationStream, contexts_for_model
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.layer import LayerTrainer
from lorsa_lens.training.loops import initial_lorsa, train
from lorsa_lens.training.parts import Part
from lorsa_lens.training.scaling import estimate_scales


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all its threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(model: Any, tokens: str, cfg: TrainingConfig, repeats: int) -> dict[str, float]:
    """Seconds per step: best of the repeats; and what the loop adds, by the median."""
    layers = list(range(host_of(model).n_layers))
    n_steps, batch_size = cfg.n_steps, cfg.batch_size
    longer = cfg.replace(training_tokens=2 * cfg.training_tokens)
    contexts = contexts_for_model(model, tokens, cfg.context_size, n_epochs=None)
    texts = [contexts.next_batch(batch_size).tokens for _ in range(n_steps)]
    stream = ActivationStream(model, contexts, layers, batch_size=batch_size)
    batch = next(iter(stream))
    trainers = {}
    for layer in layers:
        lorsa = initial_lorsa(host_of(model), layer, cfg)
        record = batch.records[layer]
        trainers[layer] = LayerTrainer(lorsa, estimate_scales(record, batch.counted), cfg)

    @torch.no_grad()
    def forward() -> None:
        for text in texts:
            model(text, return_type=None)

    def steps() -> None:
        for step in range(n_steps):
            for layer, trainer in trainers.items():
                trainer.step([Part(batch.records[layer], batch.counted)], step)

    def activations() -> None:
        stream = ActivationStream(model, contexts, layers, batch_size=batch_size)
        for _, _ in zip(range(n_steps), stream, strict=False):
            pass

    works = {
        "language_model": forward,
        "optimizer_steps": steps,
        "activations": activations,
        "whole_loop": lambda: train(model, tokens, layers, cfg, progress=False),
        "twice_as_long": lambda: train(model, tokens, layers, longer, progress=False),
    }
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(cpu_seconds(work) / n_steps)
        times["whole_loop"][-1] = times["twice_as_long"][-1] - times["whole_loop"][-1]
    del times["twice_as_long"]
    overhead = [
        loop / (model_pass + step) - 1
        for loop, model_pass, step in zip(
            times["whole_loop"], times["language_model"], times["optimizer_steps"], strict=True
        )
    ]
    pipeline = [
        (given - model_pass) / loop
        for given, model_pass, loop in zip(
            times["activations"], times["language_model"], times["whole_loop"], strict=True
        )
    ]
    best = {f"{name}_s": min(values) for name, values in times.items()}
    return {
        **best,
        "loop_overhead": statistics.median(overhead),
        "pipeline_share": statistics.median(pipeline),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--n-ov-heads", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cfg = TrainingConfig(
        n_ov_heads=arguments.n_ov_heads, k=arguments.k, training_tokens=arguments.steps * 4096
    )
    model = load_host(arguments.model)
    print(json.dumps(measure(model, arguments.tokens, cfg, arguments.repeats), indent=2))


if __name__ == "__main__":
    main()
