"""All shapes beside the dense recipes, as the table of the documentation.

    python -m benchmarks.table --write docs/performance.md

Each row is a run of `benchmarks.lorsa` in a process of its own. With `--write`, the table takes the
place of the one between the marks in that file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES

BEGIN, END = "<!-- benchmarks.table: begin -->", "<!-- benchmarks.table: end -->"

HEAD = """\
| shape | | tokens/s | to published | to lean dense | of the limit | memory | published |
|---|---|---|---|---|---|---|---|
"""


def measured(shape: str, mode: str, dtype: str, repeats: int) -> dict[str, Any]:
    """What `benchmarks.lorsa` finds."""
    given = ["--shape", shape, "--mode", mode, "--dtype", dtype, "--repeats", str(repeats)]
    command = [sys.executable, "-m", "benchmarks.lorsa", *given, "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(out)
    return result


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = result["ratio_to_published_spread"]
    lean_low, lean_high = result["ratio_to_lean_spread"]
    kind = "inference" if result["mode"] == "infer" else "training step"
    cells = [
        result["shape"],
        kind + (", bfloat16" if result["dtype"] == "bfloat16" else ""),
        f"{result['ours_tokens_per_s_median']:,.0f}",
        f"{result['ratio_to_published_median']:.2f}x ({low:.2f} to {high:.2f})",
        f"{result['ratio_to_lean_median']:.2f}x ({lean_low:.2f} to {lean_high:.2f})",
        f"{result['share_of_limit_best']:.0%}",
        f"{result['ours_peak_mb']:.0f} MB",
        f"{result['published_peak_mb']:.0f} MB",
    ]
    return "| " + " | ".join(cells) + " |\n"


def table(shapes: str, repeats: int) -> str:
    """The whole table, with the machine and the versions."""
    rows, gemm = "", 0.0
    for shape in shapes:
        for mode in ("infer", "train"):
            result = measured(shape, mode, "float32", repeats)
            gemm = max(gemm, result["gemm_gflop_per_s_best"])
            rows += row(result)
            print(rows.splitlines()[-1], flush=True)
    torch_version = torch.__version__.partition("+")[0]
    told = (
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, PyTorch {torch_version}, 2 threads, float32, "
        f"{repeats} runs in turn. A matrix product reaches {gemm:.0f} GFLOP/s here.\n\n"
    )
    return told + HEAD + rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="".join(SHAPES), help="letters, as AB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    options = parser.parse_args()
    if options.write is None:
        print(table(options.shapes, options.repeats))
        return
    before, begin, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"--write: {options.write} lacks {BEGIN} or {END}")
    text = table(options.shapes, options.repeats)
    options.write.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
