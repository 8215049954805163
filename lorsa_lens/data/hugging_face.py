"""Documents in datasets of Hugging Face, in memory, on disk or streamed."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from typing_extensions import override

from lorsa_lens.data.documents import Document, Documents, Ids, IndexedDocuments
from lorsa_lens.data.text import column_of, encoded, encoder


class TableDocuments(IndexedDocuments):
    """The rows of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, column: str | None, tokenizer: Any, description: str) -> None:
        self.column = column_of(dataset.column_names, column, description)
        self.table = dataset.select_columns([self.column]).with_format(None)
        self.encode = None if tokenizer is None else encoder(tokenizer)
        self.description = f"{description}, {self.column!r}"

    @override
    def __len__(self) -> int:
        return len(self.table)

    @override
    def take(self, indices: Sequence[int]) -> list[Ids]:
        values = self.table[list(indices)][self.column]
        return [
            encoded(value, self.encode, f"document {index}")
            for index, value in zip(indices, values, strict=True)
        ]


class StreamedDocuments(Documents):
    """The rows of a `datasets.IterableDataset`."""

    def __init__(self, dataset: Any, column: str | None, tokenizer: Any, description: str) -> None:
        self.dataset, self.column = dataset, column
        self.encode = None if tokenizer is None else encoder(tokenizer)
        self.description = description

    @override
    def read(self, start: int = 0, epoch: int = 0) -> Iterator[Document]:
        rows = self.dataset.skip(start) if start else self.dataset
        for index, row in enumerate(rows, start):
            key = column_of(list(row), self.column, self.description)
            yield Document(index, encoded(row[key], self.encode, f"document {index}"))


def is_dataset(source: Any) -> bool:
    """Whether something is an object of the package `datasets`; does not import it."""
    return any(kind.__module__.split(".")[0] == "datasets" for kind in type(source).__mro__)


def from_dataset(
    dataset: Any, *, column: str | None = None, tokenizer: Any = None, description: str = ""
) -> Documents:
    """Documents from a dataset object.

    Args:
        dataset: a `Dataset`, or an `IterableDataset`.
        column: the column with text or token ids; by default `tokens`, `input_ids` or `text`.
        tokenizer: Hugging Face's, or a function from text to ids; needed for text.
        description: what to call it.

    Raises:
        ValueError: if it is several splits, or the column is not there.
    """
    if isinstance(dataset, dict):
        splits = ", ".join(repr(str(name)) for name in dataset)
        raise ValueError(f"the dataset has the splits {splits}: give one, as dataset['...']")
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        name = description or f"dataset {getattr(dataset.info, 'dataset_name', None) or 'object'}"
        return TableDocuments(dataset, column, tokenizer, name)
    return StreamedDocuments(dataset, column, tokenizer, description or "a streamed dataset")


def load(
    name: str,
    *,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = True,
    column: str | None = None,
    tokenizer: Any = None,
) -> Documents:
    """Documents from a dataset on the hub, or from a folder.

    Args:
        name: an id on the hub, a folder with data files, or one that `save_to_disk` wrote.
        split: which part; `train` by default.
        config_name: which configuration, where there are several.
        streaming: fetch as it is read. Otherwise fetch all first, and then any order of reading
            is possible. What `save_to_disk` wrote is never streamed.
        column: see `from_dataset`.
        tokenizer: see `from_dataset`.

    Raises:
        ImportError: if the package `datasets` is not there.
        ValueError: if there is no such dataset.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "datasets of Hugging Face need the package datasets: pip install 'lorsa-lens[datasets]'"
        ) from error
    split = split or "train"
    described = " ".join(filter(None, [name, config_name, split]))
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(name)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        else:
            dataset = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"the dataset {described} cannot be loaded: {reason}") from error
    return from_dataset(dataset, column=column, tokenizer=tokenizer, description=described)
