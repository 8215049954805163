"""How time and memory of a forward pass grow with each size, as a plot.

    python -m benchmarks.growth --out growth.svg

Sizes other than the one that grows are those of shape B. The published recipe is left out where its
scores alone would take more than 2 GB.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.lorsa import job
from benchmarks.memory import peak_mb
from benchmarks.shapes import SHAPES, Shape

GROWN = {
    "pos": (256, 1024, 4096, 16384),
    "n_ov_heads": (256, 1024, 4096, 16384),
    "k": (4, 16, 64, 256),
    "batch": (1, 4, 16, 64),
}
SCORES_MB = 2048


def sizes(name: str) -> list[Shape]:
    """Shape B with one size growing; one text, where that is its length."""
    base = SHAPES["B"].changed(batch=1) if name == "pos" else SHAPES["B"]
    return [base.changed(**{name: size}) for size in GROWN[name]]


def fits(shape: Shape, recipe: str) -> bool:
    """Whether a recipe is measured at a shape."""
    scores_mb = 4 * shape.batch * shape.n_qk_heads * shape.pos**2 / 2**20
    return recipe == "ours" or scores_mb <= SCORES_MB


def measured(shape: Shape, recipe: str, repeats: int, threads: int) -> tuple[float, float]:
    """Milliseconds (best) and peak MB of a forward pass, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(measured_here, shape, recipe, repeats, threads).result()


def measured_here(shape: Shape, recipe: str, repeats: int, threads: int) -> tuple[float, float]:
    """`measured`, in this process."""
    torch.set_num_threads(threads)
    lorsa, x = shape.build()
    job(recipe, lorsa, x[:1, :2], "infer", torch.float32)()  # what a first call sets up
    run = job(recipe, lorsa, x, "infer", torch.float32)
    peak, times = peak_mb(run), []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), peak


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a picture: .svg, .png, .pdf")
    parser.add_argument("--grow", choices=GROWN, nargs="+", default=list(GROWN))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(options.grow), 5.6), layout="constrained")
    panels = figure.subplots(2, len(options.grow), squeeze=False)
    for column, name in enumerate(options.grow):
        for recipe in ("ours", "published"):
            found = [
                (getattr(shape, name), *measured(shape, recipe, options.repeats, options.threads))
                for shape in sizes(name)
                if fits(shape, recipe)
            ]
            for line in found:
                print(f"{name} {line[0]:6}  {recipe:9}  {line[1]:9.1f} ms  {line[2]:7.0f} MB")
            for axis, at in ((panels[0][column], 1), (panels[1][column], 2)):
                grown, values = [point[0] for point in found], [point[at] for point in found]
                axis.loglog(grown, values, marker="o", label=recipe)
        panels[0][column].set(title=name, ylabel="ms")
        panels[1][column].set(xlabel=name, ylabel="MB above the weights")
    panels[0][0].legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
