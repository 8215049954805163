"""Plots with matplotlib: each draws into the axes it is given, or new ones, and returns them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_STYLES = ("-", "--", ":", "-.")


def plot_training(
    run_dir: str | Path, metric: str = "losses/mse_loss", *, ax: "Axes | None" = None
) -> "Axes":
    """Plot a metric of a training run against the step, a line for each layer.

    Args:
        run_dir: A run that `train` or `lorsa-lens train` made, or its `metrics.jsonl`.
        metric: What stands after `blocks.N/` in that file.
        ax: Where to draw.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no layer has the metric.
        ImportError: If matplotlib is not installed.
    """
    path = Path(run_dir)
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    keys = {key: None for row in rows for key in row if key != "step"}
    chosen = [key for key in keys if key.partition("/")[2] == metric]
    if not chosen:
        names = sorted({key.partition("/")[2] for key in keys})
        raise ValueError(f"{path} has no metric {metric!r}; it has {', '.join(names)}")
    ax = _axes(ax, "step", metric, "Training")
    for number, key in enumerate(chosen):
        points = [(row["step"], row[key]) for row in rows if key in row]
        ax.plot(*zip(*points, strict=True), label=key.partition("/")[0], **_look(number))
    ax.legend()
    return ax


def plot_fvu_by_k(fvu: Mapping[str, Mapping[int, float]], *, ax: "Axes | None" = None) -> "Axes":
    """Plot the fraction of variance unexplained against K, a line for each name.

    Args:
        fvu: By name of a method, FVU by K.
        ax: Where to draw.

    Raises:
        ValueError: If there is nothing to plot.
        ImportError: If matplotlib is not installed.
    """
    if not fvu or not all(fvu.values()):
        raise ValueError("fvu must have a name, and for each name at least one K")
    ax = _axes(ax, "K (heads that stay per token)", "FVU", "Variance unexplained against K")
    for number, (name, points) in enumerate(fvu.items()):
        at = sorted(points)
        ax.plot(at, [points[k] for k in at], marker="o", label=name, **_look(number))
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


def plot_densities(
    densities: Mapping[str, Float[Tensor, " ov_head"]], *, ax: "Axes | None" = None
) -> "Axes":
    """Plot how many heads stay at which share of tokens, on a logarithmic axis.

    Args:
        densities: By name, share of tokens at which each head stays. Dead heads are counted in
            the legend.
        ax: Where to draw.

    Raises:
        ValueError: If there is nothing to plot, or a density is not within 0 to 1.
        ImportError: If matplotlib is not installed.
    """
    if not densities:
        raise ValueError("densities is empty")
    for name, values in densities.items():
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"densities[{name!r}] must lie within 0 to 1")
    ax = _axes(ax, "density", "heads", "Densities")
    edges = torch.logspace(-6, 0, 37).tolist()
    for number, (name, values) in enumerate(densities.items()):
        alive = values[values > 0].clamp(min=edges[0]).tolist()
        label = f"{name} ({int((values == 0).sum())} dead)"
        ax.hist(alive, bins=edges, histtype="step", label=label, **_look(number))
    ax.set_xscale("log")
    ax.legend()
    return ax


def plot_effective_heads(
    effective: Mapping[str, Float[Tensor, " ov_head"]], *, ax: "Axes | None" = None
) -> "Axes":
    """Plot how many attention heads stand behind each Lorsa head.

    Args:
        effective: By name, effective numbers of attention heads
            (`lorsa_lens.analysis.correspondence.effective_heads`); what is not a number, a head
            that is never active, is left out.
        ax: Where to draw.

    Raises:
        ValueError: If there is nothing to plot.
        ImportError: If matplotlib is not installed.
    """
    known = {name: values[~values.isnan()].tolist() for name, values in effective.items()}
    if not any(known.values()):
        raise ValueError("effective has no numbers")
    ax = _axes(ax, "effective attention heads", "Lorsa heads", "Attention heads behind each head")
    most = math.ceil(max(value for values in known.values() for value in values))
    edges = [1 + number / 4 for number in range(4 * max(1, most - 1) + 1)]
    for number, (name, values) in enumerate(known.items()):
        ax.hist(values, bins=edges, histtype="step", label=name, **_look(number))
    ax.legend()
    return ax


def plot_behaviours(named: "DataFrame", *, ax: "Axes | None" = None) -> "Axes":
    """Plot a map of how many heads of each layer have each behaviour.

    Args:
        named: From `named_heads`, with columns `behaviour`, `layer`, `kind` and `head`; rank-1
            heads (`ov`) are counted.
        ax: Where to draw.

    Raises:
        ValueError: If it names no rank-1 head.
        ImportError: If matplotlib is not installed.
    """
    heads = named[named["kind"] == "ov"].drop_duplicates(["behaviour", "layer", "head"])
    if not len(heads):
        raise ValueError("named names no rank-1 head (kind 'ov')")
    counts = heads.groupby(["behaviour", "layer"]).size().unstack(fill_value=0)
    layers = range(int(heads["layer"].min()), int(heads["layer"].max()) + 1)
    counts = counts.reindex(columns=layers, fill_value=0)
    ax = _axes(ax, "layer", "", "Heads by behaviour and layer", grid=False)
    image = ax.imshow(counts.to_numpy(), cmap="cividis", aspect="auto", vmin=0)
    ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_yticks(range(len(counts)), list(counts.index))
    ax.figure.colorbar(image, ax=ax, label="heads")
    return ax


def _axes(ax: "Axes | None", x: str, y: str, title: str, *, grid: bool = True) -> "Axes":
    """The given axes or new ones, with labels."""
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "plots need matplotlib: pip install 'lorsa-lens[plots]'", name="matplotlib"
            ) from error
        _, ax = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    ax.set(xlabel=x, ylabel=y, title=title)
    if grid:
        ax.grid(alpha=0.3)
    return ax


def _look(number: int) -> dict[str, Any]:
    """Colour and dashes of a line: neither alone has to tell lines apart."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
    }
