"""A Lorsa beside dense recipes and the limit of the arithmetic, alternating in one process.

    python -m benchmarks.lorsa --shape A --mode infer --dtype float32 --json

`published` is the published recipe in plain PyTorch, `lean` the leanest dense one
(`benchmarks/baselines.py`). Memory is measured in processes of their own. A training step is
forward, squared error, backward and Adam.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.arithmetic import Gemm, flop
from benchmarks.baselines import lean, published
from benchmarks.memory import peak_mb
from benchmarks.shapes import SHAPES, Shape
from lorsa_lens import Lorsa

RECIPES: dict[str, Callable[[Lorsa, torch.Tensor], torch.Tensor]] = {
    "ours": lambda lorsa, x: lorsa(x),
    "published": published,
    "lean": lean,
}


def job(
    recipe: str, lorsa: Lorsa, x: torch.Tensor, mode: str, dtype: torch.dtype
) -> Callable[[], None]:
    """One pass or training step of a recipe, as a function of nothing."""
    run = RECIPES[recipe]
    autocast = dtype == torch.bfloat16
    if mode == "infer":

        @torch.no_grad()
        def infer() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                run(lorsa, x)

        return infer
    target = torch.randn_like(x)
    kind = {"fused": True} if recipe == "ours" else {"foreach": True}
    optimizer = torch.optim.Adam(lorsa.parameters(), lr=1e-6, **kind)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(lorsa, x)
        (out.float() - target).square().mean().backward()
        optimizer.step()

    return train


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape asked for, its length changed if asked for."""
    shape = SHAPES[options.shape]
    return shape.changed(pos=options.pos) if options.pos else shape


def peak_memory(options: argparse.Namespace, recipe: str) -> float:
    """MB above weights and input that one run needs, in a process of its own."""
    given = ["--shape", options.shape, "--mode", options.mode, "--dtype", options.dtype]
    given += ["--pos", str(shape_of(options).pos), "--threads", str(options.threads)]
    command = [sys.executable, "-m", "benchmarks.lorsa", *given, "--memory", recipe]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(options: argparse.Namespace) -> float:
    """As `peak_memory`, for this process."""
    lorsa, x = shape_of(options).build()
    dtype = getattr(torch, options.dtype)
    job(options.memory, lorsa, x[:1, :2], "infer", dtype)()  # what a first call sets up
    return peak_mb(job(options.memory, lorsa, x, options.mode, dtype))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of all recipes, in turn."""
    mode, dtype = options.mode, getattr(torch, options.dtype)
    jobs, times = {}, {}
    for recipe in RECIPES:
        lorsa, x = shape_of(options).build()  # each with weights and optimizer of its own
        jobs[recipe], times[recipe] = job(recipe, lorsa, x, mode, dtype), list[float]()
        jobs[recipe]()
    gemm, speeds = Gemm(dtype), list[float]()
    for _ in range(options.repeats):
        speeds.append(gemm.flop_per_s())
        for recipe, run in jobs.items():
            start = time.perf_counter()
            run()
            times[recipe].append(time.perf_counter() - start)
    with torch.no_grad():
        lorsa, x = shape_of(options).build()
        difference = (lorsa(x) - published(lorsa, x)).abs().max().item()
    batch, pos, _ = x.shape
    limit = flop(lorsa.cfg, pos, batch, train=mode == "train") / max(speeds)
    given = {"shape": options.shape, "mode": mode, "dtype": options.dtype, "pos": pos}
    result: dict[str, Any] = given | {"float32_max_abs_difference": difference}
    for recipe in RECIPES:
        result[f"{recipe}_tokens_per_s_best"] = batch * pos / min(times[recipe])
        result[f"{recipe}_tokens_per_s_median"] = batch * pos / statistics.median(times[recipe])
        result[f"{recipe}_peak_mb"] = peak_memory(options, recipe)
    for recipe in ("published", "lean"):
        pairs = [b / a for a, b in zip(times["ours"], times[recipe], strict=True)]
        result[f"ratio_to_{recipe}_median"] = statistics.median(pairs)
        result[f"ratio_to_{recipe}_spread"] = [min(pairs), max(pairs)]
        result[f"ratio_to_{recipe}_best"] = min(times[recipe]) / min(times["ours"])
    result["gemm_gflop_per_s_best"] = max(speeds) / 1e9
    result["share_of_limit_best"] = limit / min(times["ours"])
    result |= {"repeats": options.repeats, "threads": torch.get_num_threads()}
    return result | {"torch": torch.__version__, "machine": platform.machine()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pos", type=int, help="another length than the shape's own")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", choices=RECIPES, help="only the peak memory of one recipe, MB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(options))
        return
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")


if __name__ == "__main__":
    main()
