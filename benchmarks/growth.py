"""How time and memory of a forward pass grow with each size, as a plot.

    python -m benchmarks.growth --out docs/growth.png

Sizes other than the one that grows are those of shape B. The published recipe is left out where its
scores alone would take more than 2 GB.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


class Point(NamedTuple):
    """A forward pass at one size."""

    size: int
    ms: float
    """The best run."""
    mb: float
    """Peak memory above the weights."""


Curve = list[Point]


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


def curve(name: str, recipe: str, repeats: int, threads: int) -> Curve:
    """A recipe's points as one size grows."""
    points = []
    for shape in sizes(name):
        if fits(shape, recipe):
            points.append(Point(getattr(shape, name), *measured(shape, recipe, repeats, threads)))
            print(f"{name} {points[-1].size:6}  {recipe:9}", end="  ")
            print(f"{points[-1].ms:9.1f} ms  {points[-1].mb:7.0f} MB")
    return points


def draw(curves: dict[str, dict[str, Curve]], out: Path) -> None:
    """A column for each size that grows: time above, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 5.6), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for (name, by_recipe), above, below in zip(curves.items(), *panels, strict=True):
        for recipe, points in by_recipe.items():
            grown, ms, mb = zip(*points, strict=True)
            above.loglog(grown, ms, marker="o", label=recipe)
            below.loglog(grown, mb, marker="o")
        above.set(title=name, ylabel="ms")
        below.set(xlabel=name, ylabel="MB above the weights")
    panels[0][0].legend()
    figure.savefig(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a picture: .svg, .png, .pdf")
    parser.add_argument("--grow", choices=GROWN, nargs="+", default=list(GROWN))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    curves = {
        name: {
            recipe: curve(name, recipe, options.repeats, options.threads)
            for recipe in ("ours", "published")
        }
        for name in options.grow
    }
    draw(curves, options.out)


if __name__ == "__main__":
    main()
