"""What to evaluate on what, from a run's directory or from single Lorsas."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.folders import CONFIG_FILE, LORSAS, RUN_CONFIG_FILE, saved_lorsas
from lorsa_lens.validation import read_fields

RUN_CONFIGS = (RUN_CONFIG_FILE, CONFIG_FILE)
"""Where a run's directory says how it was trained; the first one also says on which model."""

DEFAULT_OUT = Path("lorsa_eval")
"""Where an evaluation of single Lorsas goes."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Lorsas, their model, and how text is put to it."""

    lorsas: tuple[str, ...]
    """Folders, or ids on the hub."""

    model: str
    """A folder or an id on the hub."""

    out: Path
    """Where the evaluation goes."""

    context_size: int
    """Tokens of a context."""

    prepend_bos: bool
    """Whether contexts begin with BOS."""

    exclude_special_tokens: bool
    """Whether special tokens do not count."""


def find_subject(
    paths: Sequence[str],
    *,
    model: str | None = None,
    context_size: int | None = None,
    out: Path | None = None,
) -> Subject:
    """Find out what is not said.

    Args:
        paths: a run's directory, whose Lorsas are all meant, or Lorsas.
        model: None: the run's.
        context_size: None: the run's, or the default of `TrainingConfig`.
        out: None: the run's directory, or `DEFAULT_OUT`.

    Raises:
        ValueError: if a run's directory is not the only path, holds no Lorsas, or nothing says
            which model it is.
    """
    runs = [Path(path) for path in paths if any((Path(path) / n).is_file() for n in RUN_CONFIGS)]
    if runs and len(paths) > 1:
        raise ValueError(f"{runs[0]} is a run's directory: give it alone, or Lorsas only")
    fields: dict[str, Any] = {}
    chosen = tuple(paths)
    if runs:
        fields = _run_fields(runs[0])
        chosen = tuple(str(path) for path in _by_layer(runs[0] / LORSAS))
    model = model or fields.get("model")
    if model is None:
        raise ValueError("nothing says which model the Lorsas belong to: give --model")
    default = TrainingConfig()
    return Subject(
        lorsas=chosen,
        model=model,
        out=out or (runs[0] if runs else DEFAULT_OUT),
        context_size=context_size or fields.get("context_size", default.context_size),
        prepend_bos=fields.get("prepend_bos", default.prepend_bos),
        exclude_special_tokens=fields.get("exclude_special_tokens", default.exclude_special_tokens),
    )


def _run_fields(run: Path) -> dict[str, Any]:
    for name in RUN_CONFIGS:
        if (run / name).is_file():
            return read_fields(run / name)
    return {}


def _by_layer(folder: Path) -> list[Path]:
    """The folders `blocks.N` in a folder, in the order of N."""
    found = saved_lorsas(folder)
    if not found:
        raise ValueError(f"{folder} holds no Lorsas yet: has the run ended?")
    return list(found.values())
