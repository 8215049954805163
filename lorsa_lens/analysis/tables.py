"""Tables: pandas DataFrames that are saved as CSV and JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_lens.io.atomic import atomic_write

if TYPE_CHECKING:
    from pandas import DataFrame


def table(columns: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> "DataFrame":
    """A DataFrame of columns by name, or of rows.

    Raises:
        ImportError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "tables need pandas: pip install 'lorsa-lens[analysis]'", name="pandas"
        ) from error
    return pandas.DataFrame(columns)


def save_table(frame: "DataFrame", path: str | Path) -> list[Path]:
    """Write a table as `PATH.csv` and `PATH.json` (a list of rows), each atomically.

    Args:
        frame: the table; its index is not written.
        path: without an ending.

    Returns:
        The two files.
    """
    path = Path(path)
    texts = {
        ".csv": frame.to_csv(index=False),
        ".json": (frame.to_json(orient="records", indent=1) or "[]") + "\n",
    }
    files = []
    for suffix, text in texts.items():
        file = path.with_name(path.name + suffix)
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        files.append(file)
    return files
