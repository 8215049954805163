"""One door to all kinds of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lorsa_lens.data import arrays, hugging_face, text
from lorsa_lens.data.documents import Documents, IndexedDocuments

_HUB = {"split", "config_name", "streaming"}
_OPTIONS = {
    "dataset object": {"tokenizer", "column"},
    "dataset": {"tokenizer", "column", *_HUB},
    "in memory": {"separator_token_id"},
    ".npy": {"separator_token_id"},
    ".bin": {"separator_token_id", "dtype"},
    ".txt": {"tokenizer", "separator"},
    ".jsonl": {"tokenizer", "column"},
}
"""What each kind of source understands."""


def open_documents(
    source: Any,
    *,
    tokenizer: Any = None,
    column: str | None = None,
    separator: str | None = None,
    separator_token_id: int | None = None,
    dtype: str | None = None,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool | None = None,
    shuffle_seed: int | None = None,
) -> Documents:
    """Documents from almost anything that holds text or token ids.

    Args:
        source: a dataset of Hugging Face, or its name or folder; a .txt, .jsonl, .npy or .bin file
            (or a list of .txt or of .jsonl files); a tensor or an array [document, pos] or [pos];
            a list of ids or of lists of ids; `Documents`, which are given back.
        tokenizer: for text: `model.tokenizer`, or a function from text to ids. Special tokens are
            left to `pack`.
        column: the column of a dataset or the key of JSON lines that holds text or token ids; by
            default `tokens`, `input_ids` or `text`.
        separator: text between the documents of a .txt file; otherwise each file is one.
        separator_token_id: the id between the documents of a flat array; otherwise it is one.
        dtype: of the ids in a .bin file; `uint16` by default.
        split: of a named dataset; `train` by default.
        config_name: of a named dataset.
        streaming: whether a named dataset is fetched as it is read (the default), which allows
            one order only.
        shuffle_seed: read in a random order, another one each epoch. Only for sources that can be
            read in any order; for the others, see `Contexts.shuffled`.

    Raises:
        ValueError: if the source is not there or holds something else, or an option means nothing
            for it.
        TypeError: if the source is of no kind listed above.
        ImportError: if a named dataset needs the package `datasets` (`lorsa-lens[datasets]`).
    """
    options = {
        name: value
        for name, value in {
            "tokenizer": tokenizer,
            "column": column,
            "separator": separator,
            "separator_token_id": separator_token_id,
            "dtype": dtype,
            "split": split,
            "config_name": config_name,
            "streaming": streaming,
        }.items()
        if value is not None
    }
    documents = source if isinstance(source, Documents) else _open(source, options)
    if shuffle_seed is None:
        return documents
    if not isinstance(documents, IndexedDocuments):
        raise ValueError(
            f"shuffle_seed = {shuffle_seed}, but {documents.description} can be read in one order "
            "only: shuffle contexts instead, as pack(...).shuffled(buffer_size, seed)"
        )
    return documents.shuffled(shuffle_seed)


def _open(source: Any, options: dict[str, Any]) -> Documents:
    if hugging_face.is_dataset(source):
        _check("dataset object", "a dataset object", options)
        return hugging_face.from_dataset(source, **options)
    if isinstance(source, str | Path):
        return _open_path(Path(source), str(source), options)
    if isinstance(source, Sequence) and source and isinstance(source[0], str | Path):
        return _open_files([Path(path) for path in source], options)
    if isinstance(source, Tensor | np.ndarray | list | tuple):
        _check("in memory", "what is in memory", options)
        return arrays.in_memory(source, **options)
    raise TypeError(
        f"documents cannot be read from a {type(source).__name__}: give a dataset or its name, a "
        ".txt, .jsonl, .npy or .bin file, a tensor, an array or a list"
    )


def _open_path(path: Path, name: str, options: dict[str, Any]) -> Documents:
    if path.suffix in (".txt", ".jsonl", ".npy", ".bin"):
        return _open_files([path], options)
    if path.is_file():
        raise ValueError(f"{path} is of no known kind: give a .txt, .jsonl, .npy or .bin file")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".")):
        raise ValueError(f"there is no folder {path}")
    _check("dataset", f"the dataset {name}", options)
    return hugging_face.load(name, **options)


def _open_files(paths: list[Path], options: dict[str, Any]) -> Documents:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    suffixes = sorted({path.suffix for path in paths})
    if len(suffixes) > 1:
        raise ValueError(f"the files are of several kinds, {', '.join(suffixes)}: give one kind")
    (suffix,) = suffixes
    if suffix not in _OPTIONS:
        raise ValueError(f"{paths[0]} is of no known kind: give .txt, .jsonl, .npy or .bin files")
    _check(suffix, f"a {suffix} file", options)
    if suffix == ".jsonl":
        return text.JsonLines(paths, **options)
    if suffix == ".txt":
        if "tokenizer" not in options:
            raise ValueError(
                f"{paths[0]} is text: give the tokenizer, as tokenizer=model.tokenizer"
            )
        return text.TextDocuments(paths, **options)
    if len(paths) > 1:
        raise ValueError(f"{len(paths)} {suffix} files: give one, or join them into one")
    return arrays.array_file(paths[0], **options)


def _check(kind: str, name: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in _OPTIONS[kind]:
            shown = "..." if option == "tokenizer" else repr(value)
            understood = ", ".join(sorted(_OPTIONS[kind]))
            raise ValueError(
                f"{option} = {shown} means nothing for {name}, which understands {understood}"
            )
