"""Which Lorsas a folder or a repository on the hub holds."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lorsa_lens.config import LorsaConfig
from lorsa_lens.io.hub import hub_id
from lorsa_lens.io.pretrained import CONFIG_FILE, read_config
from lorsa_lens.io.sources import LoadError, read_json
from lorsa_lens.validation import ConfigError

METRICS_FILE = "metrics.json"
"""Beside a Lorsa: figures by name, for the model card."""


@dataclass(frozen=True)
class Entry:
    """One Lorsa of a folder or repository."""

    name: str
    """Its folder, relative to the whole; empty for the whole itself."""

    layout: str
    """`lorsa_lens`, `llamascopium` or `paper`."""

    cfg: LorsaConfig | None
    """Its configuration, None if that cannot be."""

    problem: str | None = None
    """Why it cannot be loaded, as far as its configuration shows."""

    metrics: dict[str, float] | None = None
    """Figures that were stored with it."""


def list_lorsas(
    path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> list[Entry]:
    """The Lorsas in a folder or a repository, by layer; only their configurations are read.

    Args:
        path: a folder, or an id on the hub: `user/repo`, `user/repo/subfolder` or
            `user/repo:subfolder`.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept. None: the hub's own cache.
        token: for private repositories. None: that of the login.
        local_files_only: use the cache, and no network.

    Raises:
        FileNotFoundError: if there is no such folder, here or on the hub.
    """
    if Path(path).is_dir():
        return _entries(Path(path))
    repo, folder = hub_id(path)
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"*{CONFIG_FILE}", f"*{METRICS_FILE}"],
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is no folder here, and could not be loaded from the Hugging Face hub: {error}"
        ) from error
    return _entries(Path(root, folder))


def _entries(root: Path) -> list[Entry]:
    found = []
    for config in sorted(root.rglob(CONFIG_FILE)):
        name = str(PurePosixPath(config.parent.relative_to(root)))
        entry = _entry("" if name == "." else name, config)
        if entry is not None:
            found.append(entry)
    return sorted(found, key=by_layer)


def by_layer(entry: Entry) -> tuple[bool, int, str]:
    """For sorting: by layer, then by name; what cannot be read comes last."""
    layer = None if entry.cfg is None else entry.cfg.layer
    return entry.cfg is None, -1 if layer is None else layer, entry.name


def _entry(name: str, config: Path) -> Entry | None:
    """What a configuration says; None if it is not that of a Lorsa."""
    try:
        values = read_json(config)
    except LoadError as error:
        return Entry(name, "lorsa_lens", None, str(error))
    if not ({"d_qk_head", "n_qk_heads"} & values.keys() or values.get("architecture") == "lorsa"):
        return None
    try:
        layout, cfg = read_config(values)
    except (LoadError, ConfigError) as error:
        return Entry(name, "unknown", None, str(error))
    return Entry(name, layout, cfg, metrics=_metrics(config.parent / METRICS_FILE))


def _metrics(path: Path) -> dict[str, float] | None:
    if not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    return {str(n): float(v) for n, v in values.items() if isinstance(v, int | float)}
