"""Documents in text files and in files of JSON lines."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from typing_extensions import override

from lorsa_lens.data.documents import Document, Documents, Ids, checked_ids

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""

COLUMNS = ("tokens", "input_ids", "text")
"""Where documents are looked for when nothing is said."""

_CHUNK = 1 << 20
"""Characters read at once."""


def encoder(tokenizer: Any) -> Encode:
    """A function from text to ids, which adds no special tokens: that is left to `pack`.

    Args:
        tokenizer: one of Hugging Face's (`model.tokenizer`), or any function from text to ids.

    Raises:
        TypeError: if it is neither.
    """
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "all_special_ids"):

        def encode(text: str) -> Sequence[int]:
            # `verbose`: documents are longer than the model's context, and are cut later.
            ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return ids

        return encode
    if callable(tokenizer):
        return cast(Encode, tokenizer)
    raise TypeError(
        f"tokenizer is a {type(tokenizer).__name__}: give model.tokenizer, or a function from "
        "text to ids"
    )


def special_token_ids(tokenizer: Any) -> list[int]:
    """BOS, EOS, PAD and all other special tokens of a tokenizer, but the one for unknown text.

    Args:
        tokenizer: one of Hugging Face's, such as `model.tokenizer`.
    """
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | _named(tokenizer))


def _named(tokenizer: Any) -> set[int]:
    """The three special tokens that count also where one of them is the unknown token (GPT-2)."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = (getattr(tokenizer, name, None) for name in names)
    return {token_id for token_id in ids if token_id is not None}


def encoded(value: Any, encode: Encode | None, where: str) -> Ids:
    """Ids of a document that is given as text or as ids.

    Raises:
        ValueError: if it is neither, or text and there is no tokenizer.
    """
    if isinstance(value, str):
        if encode is None:
            raise ValueError(f"{where} is text: give the tokenizer, as tokenizer=model.tokenizer")
        return checked_ids(encode(value), where)
    if value is None or isinstance(value, int | float | dict):
        raise ValueError(f"{where} holds {value!r:.50}: documents are text or lists of token ids")
    return checked_ids(value, where)


def column_of(names: Sequence[str], column: str | None, where: str) -> str:
    """The column with the documents: the one asked for, or the first usual one.

    Raises:
        ValueError: if it is not there; those that are there are named.
    """
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    there = ", ".join(repr(name) for name in names)
    raise ValueError(
        f"{where} has no {' or '.join(repr(name) for name in wanted)}, but {there}: say which "
        "holds the documents, as column='...'"
    )


class TextDocuments(Documents):
    """Text files: every file one document, or several with a separator between them.

    Args:
        paths: the files, read in this order, as UTF-8.
        tokenizer: see `encoder`.
        separator: text between documents, which belongs to none of them. All else is kept,
            line ends around a separator too.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Any, separator: str | None = None) -> None:
        if separator == "":
            raise ValueError("separator = '' is empty: give the text between documents, or None")
        self.paths, self.encode, self.separator = paths, encoder(tokenizer), separator
        self.description = ", ".join(str(path) for path in paths)

    @override
    def read(self, start: int = 0, epoch: int = 0) -> Iterator[Document]:
        texts = (text for path in self.paths for text in self._texts(path))
        for index, text in enumerate(islice(texts, start, None), start):
            yield Document(index, checked_ids(self.encode(text), f"document {index}"))

    def _texts(self, path: Path) -> Iterator[str]:
        try:
            with open(path, encoding="utf-8") as file:
                if self.separator is None:
                    yield file.read()
                    return
                rest = ""
                while chunk := file.read(_CHUNK):
                    *whole, rest = (rest + chunk).split(self.separator)
                    yield from whole
                yield rest
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from error


class JsonLines(Documents):
    """Files with one JSON object per line; blank lines are no documents.

    Args:
        paths: the files, read in this order.
        column: key of the text or of the token ids; by default the first of `COLUMNS` that the
            first object has.
        tokenizer: see `encoder`; needed for text.
    """

    def __init__(
        self, paths: Sequence[Path], column: str | None = None, tokenizer: Any = None
    ) -> None:
        self.paths, self.column = paths, column
        self.encode = None if tokenizer is None else encoder(tokenizer)
        self.description = ", ".join(str(path) for path in paths)

    @override
    def read(self, start: int = 0, epoch: int = 0) -> Iterator[Document]:
        lines = (line for path in self.paths for line in _lines(path))
        for index, (where, line) in enumerate(islice(lines, start, None), start):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a {type(row).__name__}: give one object per line")
            key = column_of(list(row), self.column, where)
            yield Document(index, encoded(row[key], self.encode, f"{where}, {key!r}"))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and what to call each."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
