"""A Lorsa's inference forward pass beside the published dense recipe, alternating in one process.

    python -m benchmarks.forward --shape A

The baseline is plain PyTorch: einsum projections, `scaled_dot_product_attention(is_causal=True,
enable_gqa=True)`, codes weighed by the writing norms, top-k, a dense mask, and a dense decode.
Rotary positions are left out on both sides.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from benchmarks.memory import peak_mb
from lorsa_lens import Lorsa, LorsaConfig

SHAPES = {
    # d_model, n_qk_heads, d_qk_head, n_ov_heads, k, pos, batch
    "A": (768, 48, 64, 6144, 64, 256, 4),
    "B": (128, 8, 32, 1024, 16, 128, 16),
    "C": (768, 48, 64, 6144, 64, 2048, 1),
    "D": (128, 256, 32, 256, 16, 128, 16),
    "E": (2048, 16, 128, 16384, 64, 512, 1),
}


@torch.no_grad()
def dense_forward(lorsa: Lorsa, x: torch.Tensor) -> torch.Tensor:
    """The same maths, nothing sparse about it."""
    cfg = lorsa.cfg
    q = torch.einsum("bsm,hmd->bhsd", x, lorsa.W_Q) + lorsa.b_Q[:, None]
    k = torch.einsum("bsm,hmd->bhsd", x, lorsa.W_K) + lorsa.b_K[:, None]
    v = torch.einsum("bsm,im->bsi", x, lorsa.W_V) + lorsa.b_V
    v = rearrange(v, "b s (h g) -> b h s g", h=cfg.n_qk_heads)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    z = rearrange(z, "b h s g -> b s (h g)")
    weighed = z * lorsa.W_O.norm(dim=-1)
    kept = torch.zeros_like(z, dtype=torch.bool)
    kept.scatter_(-1, weighed.abs().topk(cfg.k, dim=-1).indices, True)
    return torch.einsum("bsi,im->bsm", z * kept, lorsa.W_O) + lorsa.b_O


def build(shape: str) -> tuple[Lorsa, torch.Tensor]:
    """A random Lorsa and input of one of the shapes."""
    d_model, n_qk, d_qk, n_ov, k, pos, batch = SHAPES[shape]
    torch.manual_seed(0)
    cfg = LorsaConfig(d_model=d_model, n_qk_heads=n_qk, d_qk_head=d_qk, n_ov_heads=n_ov, k=k)
    return Lorsa(cfg), torch.randn(batch, pos, d_model)


def peak_memory(shape: str, which: str) -> float:
    """MB above the weights that one forward pass needs, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.forward", "--shape", shape, "--memory", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(shape: str, which: str) -> float:
    """As `peak_memory`, for this process."""
    lorsa, x = build(shape)
    run = lorsa if which == "sparse" else partial(dense_forward, lorsa)
    with torch.no_grad():
        run(x[:, :8])
        return peak_mb(lambda: run(x))


def measure(shape: str, repeats: int) -> dict[str, object]:
    """Times of both, in turn."""
    lorsa, x = build(shape)
    n_tokens = x.shape[0] * x.shape[1]
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    with torch.no_grad():
        error = (lorsa(x) - dense_forward(lorsa, x)).abs().max().item()
        for _ in range(repeats):
            for name in times:
                start = time.perf_counter()
                lorsa(x) if name == "sparse" else dense_forward(lorsa, x)
                times[name].append(time.perf_counter() - start)
    ratios = [dense / sparse for sparse, dense in zip(times["sparse"], times["dense"], strict=True)]
    return {
        "shape": shape,
        "max_abs_difference": error,
        "sparse_tokens_per_s_best": n_tokens / min(times["sparse"]),
        "sparse_tokens_per_s_median": n_tokens / statistics.median(times["sparse"]),
        "dense_tokens_per_s_best": n_tokens / min(times["dense"]),
        "dense_tokens_per_s_median": n_tokens / statistics.median(times["dense"]),
        "speed_ratio_median_of_pairs": statistics.median(ratios),
        "sparse_peak_mb": peak_memory(shape, "sparse"),
        "dense_peak_mb": peak_memory(shape, "dense"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", choices=("sparse", "dense"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(options.shape, options.memory))
        return
    result = measure(options.shape, options.repeats)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:30} {value:.4g}" if isinstance(value, float) else f"{name:30} {value}")


if __name__ == "__main__":
    main()
