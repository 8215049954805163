"""What it costs a model to have a Lorsa in every layer.

    python -m benchmarks.splice

A HookedTransformer with random weights, its forward pass with and without random Lorsas in place of
all its attention layers, alternating in one process.
"""

import argparse
import json
import statistics
import time

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from lorsa_lens import Lorsa, splice


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of both, and their ratio."""
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=options.layers,
        d_model=options.d_model,
        n_heads=options.d_model // 64,
        d_head=64,
        d_mlp=4 * options.d_model,
        d_vocab=1000,
        n_ctx=options.pos,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=64,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    lorsas = [
        Lorsa.from_attention(
            model, layer, init="tied", n_qk_heads=cfg.n_heads, n_ov_heads=options.heads, k=options.k
        )
        for layer in range(cfg.n_layers)
    ]
    tokens = torch.randint(0, 1000, (options.batch, options.pos))
    times: dict[str, list[float]] = {"host": [], "spliced": []}
    with torch.no_grad():
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            model(tokens)
            times["host"].append(time.perf_counter() - start)
            with splice(model, lorsas):
                start = time.perf_counter()
                model(tokens)
                times["spliced"].append(time.perf_counter() - start)
    pairs = [b / a for a, b in zip(times["host"][1:], times["spliced"][1:], strict=True)]
    return {
        "host_s_median": statistics.median(times["host"][1:]),
        "spliced_s_median": statistics.median(times["spliced"][1:]),
        "spliced_to_host_median": statistics.median(pairs),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4096, help="rank-1 heads of each Lorsa")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pos", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options), indent=2))


if __name__ == "__main__":
    main()
