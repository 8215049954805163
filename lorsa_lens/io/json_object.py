"""One JSON object in a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorsa_lens.io.atomic import atomic_write


def save_object(path: str | Path, values: Mapping[str, Any], *, indent: int | None = None) -> Path:
    """Write an object, atomically; returns the path."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def load_object(path: str | Path, kind: str) -> dict[str, Any]:
    """Read an object.

    Args:
        path: the file.
        kind: what the object should be, for messages.

    Raises:
        ValueError: if the file is no JSON, or holds no object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, no {kind}")
    return values
