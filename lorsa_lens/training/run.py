"""A whole training run as one file: which model, which text, which layers, and how."""

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorsa_lens.config import LorsaConfig
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.training.checkpoints import checkpoints
from lorsa_lens.training.folders import CHECKPOINTS, CONFIG_FILE, LORSAS, RUN_CONFIG_FILE
from lorsa_lens.training.loops import train
from lorsa_lens.training.ranks import Ranks
from lorsa_lens.training.run_config import RunConfig

PACKAGES = ("lorsa-lens", "torch", "transformer-lens", "transformers", "numpy")


def run(cfg: RunConfig, *, resume: bool = False, progress: bool = True) -> dict[int, Lorsa]:
    """Load the model, train, and leave a run directory that documents itself.

    The configuration, the versions of packages and the state of git are written before training,
    the card at the end.

    Args:
        cfg: the run.
        resume: go on from the newest checkpoint of `cfg.output_path`, if there is one.
        progress: show a progress bar.

    Returns:
        By layer, the trained Lorsas that this process has: see `lorsa_lens.training.train`.

    Raises:
        FileExistsError: if there is a run already, and `resume` is off.
    """
    folder = Path(cfg.output_path)
    resumed = resume and bool(checkpoints(folder / CHECKPOINTS))
    if not resume and (folder / CONFIG_FILE).exists():
        raise FileExistsError(f"{folder} holds a run already: resume it, or give another folder")
    device = join_processes(cfg.device)
    ranks = Ranks()
    ranks.wait()  # all have looked before one writes
    if ranks.is_first and not resumed:
        _write(folder / RUN_CONFIG_FILE, json.dumps(cfg.to_dict(), indent=2) + "\n")
        _write(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    model = load_host(cfg.model, device=device, dtype=getattr(torch, cfg.model_dtype))
    layers = list(range(host_of(model).n_layers)) if cfg.layers is None else list(cfg.layers)
    progress = progress and ranks.is_first
    lorsas = train(model, cfg.tokens, layers, cfg.training(), resume=resume, progress=progress)
    if not ranks.is_first:
        return lorsas
    saved = {layer: folder / LORSAS / f"blocks.{layer}" / "config.json" for layer in layers}
    configs = {layer: LorsaConfig.from_json(path) for layer, path in saved.items()}
    _write(folder / "README.md", model_card(cfg, configs))
    return lorsas


def join_processes(device: str) -> str:
    """Join the other processes of a run that `torchrun` or `accelerate launch` started.

    Returns:
        The device of this process: on CUDA, the one of its local rank.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        on_gpus = device.startswith("cuda")
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, and the commit of the working folder, if any."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"packages": versions, "git": _git_state()}


def _git_state() -> Mapping[str, Any] | None:
    try:
        commit, status = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "changed_files": len(status.splitlines())}


def model_card(cfg: RunConfig, lorsas: Mapping[int, LorsaConfig]) -> str:
    """A README for the run's directory: what was trained on what, and how to load it."""
    first = next(iter(lorsas))
    rows = "\n".join(
        f"| {layer} | {lorsa.n_qk_heads} | {lorsa.n_ov_heads} | {lorsa.k} |"
        f" `{LORSAS}/blocks.{layer}` |"
        for layer, lorsa in lorsas.items()
    )
    return f"""# Lorsas of {cfg.model}

Low-Rank Sparse Attention (arXiv 2504.20938), trained on {cfg.training_tokens:,} tokens of
`{cfg.tokens or cfg.cached_activations_path}` in contexts of {cfg.context_size} with lorsa_lens.

| layer | query-key circuits | heads | K | folder |
|---|---|---|---|---|
{rows}

```python
from lorsa_lens import Lorsa, splice

lorsa = Lorsa.from_pretrained("{cfg.output_path}/{LORSAS}/blocks.{first}")
with splice(model, lorsa):
    logits, cache = model.run_with_cache(tokens)
```

`run_config.json` is the configuration, `environment.json` says what it ran on, `metrics.jsonl` how
training went.
"""


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
