"""Documents of any length packed into contexts of one length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lorsa_lens.data.contexts import PADDING, Context, Contexts, State
from lorsa_lens.data.documents import Document, Documents


def pack(
    documents: Documents,
    context_size: int,
    *,
    bos_token_id: int | None = None,
    separator_token_id: int | None = None,
    respect_documents: bool = False,
    special_token_ids: Iterable[int] = (),
    d_vocab: int | None = None,
    n_epochs: int | None = 1,
) -> "PackedContexts":
    """Pack documents into contexts.

    Documents follow one another, and one that is longer than what is left goes on in the next
    context. Empty documents are passed over. After the last document of an epoch comes the first
    of the next; what is left at the very end and fills no context is dropped.

    With `respect_documents`, a context holds one document, or a part of one, and padding after it.
    No mask is used for this, since no HookedTransformer takes one that depends on query and key,
    and what a Lorsa is to learn is what the language model really did: in causal attention no
    position sees the padding after it, on any host. Without it, the language model attends across
    documents, as it did when it was trained on packed text; `TokenBatch.document` says where each
    is.

    Args:
        documents: from `open_documents`.
        context_size: positions per context.
        bos_token_id: goes first in every context, unless the next token is it already.
        separator_token_id: goes before every document that starts within a context, unless the
            document begins with it (`<|endoftext|>` for GPT-2, BOS for Llama).
        respect_documents: whether a context holds one document only.
        special_token_ids: further tokens that do not count, see `special_token_ids(tokenizer)`;
            those put in here never do.
        d_vocab: size of the vocabulary; ids beyond it are refused. An `ActivationStream` sets it.
        n_epochs: times through the documents; None for no end.

    Raises:
        ValueError: if a number is out of range. Later, when contexts are read: if there are too
            few tokens for one context, or an id is not in the vocabulary.

    Example:
        >>> from lorsa_lens.data import open_documents, pack
        >>> contexts = pack(open_documents([[5, 6, 7], [], [8, 9]]), 3, bos_token_id=1)
        >>> [context.tokens.tolist() for context in contexts]
        [[1, 5, 6], [1, 7, 8]]
    """
    minimum = 1 if bos_token_id is None else 2
    if context_size < minimum:
        with_bos = "" if bos_token_id is None else " to hold more than the BOS"
        raise ValueError(f"context_size = {context_size} must be at least {minimum}{with_bos}")
    if n_epochs is not None and n_epochs < 1:
        raise ValueError(f"n_epochs = {n_epochs} must be positive, or None for no end")
    if respect_documents and separator_token_id is not None:
        raise ValueError(
            f"separator_token_id = {separator_token_id} means nothing with respect_documents: no "
            "document starts within a context"
        )
    added = {token for token in (bos_token_id, separator_token_id) if token is not None}
    packing = Packing(
        context_size=context_size,
        bos_token_id=bos_token_id,
        separator_token_id=separator_token_id,
        respect_documents=respect_documents,
        special_token_ids=tuple(sorted({*special_token_ids, *added})),
    )
    contexts = PackedContexts(documents, packing, n_epochs)
    if d_vocab is not None:
        contexts.limit_vocabulary(d_vocab)
    return contexts


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents are packed; see `pack`."""

    context_size: int
    bos_token_id: int | None
    separator_token_id: int | None
    respect_documents: bool
    special_token_ids: tuple[int, ...]


@dataclass
class _Place:
    """Where the next context begins."""

    epoch: int = 0
    document: int = 0
    """In the order of reading."""
    offset: int = 0
    """Tokens of this document that are in contexts already."""
    n_contexts: int = 0


@dataclass
class _Seen:
    """What was read since the beginning, to say so if it is too little."""

    n_documents: int = 0
    n_empty: int = 0
    n_tokens: int = 0
    in_epoch: int = 0

    def add(self, n_tokens: int) -> None:
        self.n_documents += 1
        self.n_empty += n_tokens == 0
        self.n_tokens += n_tokens
        self.in_epoch += n_tokens


@dataclass
class _Filling:
    """A context while it is being filled."""

    tokens: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    n: int = 0

    def put(self, tokens: Any, document: int, n: int) -> None:
        self.tokens[self.n : self.n + n] = tokens
        self.document[self.n : self.n + n] = document
        self.n += n


@dataclass
class PackedContexts(Contexts):
    """What `pack` gives."""

    documents: Documents
    packing: Packing
    n_epochs: int | None = 1
    d_vocab: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.context_size = self.packing.context_size
        self.padded = self.packing.respect_documents
        how = ", ".join(
            f"{name} {value}"
            for name, value in self._settings().items()
            if name != "special_token_ids" and value is not None
        )
        self.description = f"{self.documents.description}; {how}"
        self._special = np.array(self.packing.special_token_ids, dtype=np.int64)
        # Any id does for padding, which nothing that counts can see.
        self._pad = self.packing.bos_token_id or 0
        self._place = _Place()
        self._rewind()

    def _settings(self) -> State:
        return {**vars(self.packing), "special_token_ids": list(self.packing.special_token_ids)}

    def _rewind(self) -> None:
        """Read again from `self._place`."""
        self._seen = _Seen()
        self._current: Document | None = None
        self._reader: Iterator[Document] | None = None

    # ------------------------------------------------------------------------------------ state

    @override
    def state_dict(self) -> State:
        return {**vars(self._place), "settings": self._settings()}

    @override
    def load_state_dict(self, state: State) -> None:
        for name, mine in self._settings().items():
            theirs = state["settings"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"the state is of contexts made with {name} = {theirs}, and these are made "
                    f"with {name} = {mine}: pack as before to go on, or start anew"
                )
        self._place = _Place(**{name: state[name] for name in vars(_Place())})
        self._rewind()

    @override
    def limit_vocabulary(self, d_vocab: int) -> None:
        for name, token in vars(self.packing).items():
            if name.endswith("_token_id") and token is not None and not 0 <= token < d_vocab:
                raise ValueError(
                    f"{name} = {token}, but the vocabulary has the ids 0 to {d_vocab - 1}"
                )
        self.d_vocab = d_vocab if self.d_vocab is None else min(d_vocab, self.d_vocab)

    # ---------------------------------------------------------------------------------- reading

    @override
    def __next__(self) -> Context:
        place = _Place(**vars(self._place))
        size = self.context_size
        filling = _Filling(np.full(size, self._pad), np.full(size, PADDING))
        try:
            while filling.n < size and (document := self._document(place)):
                self._fill(filling, document, place)
                if self.packing.respect_documents:
                    break
        except BaseException:
            self._rewind()
            raise
        if filling.n == 0 or (filling.n < size and not self.packing.respect_documents):
            self._refuse_too_few()
            self._rewind()
            raise StopIteration
        place.n_contexts += 1
        self._place = place
        counted = (filling.document != PADDING) & ~np.isin(filling.tokens, self._special)
        return Context(filling.tokens, counted, filling.document)

    def _document(self, place: _Place) -> Document | None:
        """The document that the next token is of, None at the end."""
        while self._current is None:
            if self._reader is None:
                self._reader = self.documents.read(place.document, place.epoch)
            document = next(self._reader, None)
            if document is not None:
                self._seen.add(len(document.ids) - place.offset)
                if len(document.ids) > place.offset:
                    self._current = document
                else:
                    place.document, place.offset = place.document + 1, 0
            elif self._is_last(place):
                return None
            else:
                place.epoch, place.document, self._reader = place.epoch + 1, 0, None
                self._seen.in_epoch = 0
        return self._current

    def _is_last(self, place: _Place) -> bool:
        """Whether the end of this epoch is the end of all."""
        if place.document == 0 or (self._seen.in_epoch == 0 and self._place.n_contexts == 0):
            return True  # an epoch without a single token: so are all
        return self.n_epochs is not None and place.epoch + 1 >= self.n_epochs

    def _fill(self, filling: _Filling, document: Document, place: _Place) -> None:
        """Put as much of a document as there is room for."""
        bos, separator = self.packing.bos_token_id, self.packing.separator_token_id
        first = int(document.ids[place.offset])
        if filling.n == 0 and bos is not None and first != bos:
            filling.put(bos, document.number, 1)
        elif filling.n and place.offset == 0 and separator is not None and first != separator:
            filling.put(separator, document.number, 1)
        n = min(self.context_size - filling.n, len(document.ids) - place.offset)
        ids = np.asarray(document.ids[place.offset : place.offset + n])
        self._check_vocabulary(ids, document.number)
        filling.put(ids, document.number, n)
        place.offset += n
        if place.offset == len(document.ids):
            place.document, place.offset, self._current = place.document + 1, 0, None

    def _check_vocabulary(self, ids: npt.NDArray[Any], number: int) -> None:
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.d_vocab is not None and high >= self.d_vocab):
            known = "" if self.d_vocab is None else f" to {self.d_vocab - 1}"
            raise ValueError(
                f"document {number} has the id {low if low < 0 else high}, but the vocabulary has "
                f"the ids from 0{known}: it was made with another tokenizer, or for another model "
                f"({self.documents.description})"
            )

    def _refuse_too_few(self) -> None:
        """Say so if there was not even one context.

        Raises:
            ValueError: if so.
        """
        if self._place.n_contexts:
            return
        seen = self._seen
        raise ValueError(
            f"too few tokens for one context of {self.context_size}: {self.documents.description} "
            f"has {seen.n_documents} documents, {seen.n_empty} of them empty, with {seen.n_tokens} "
            "tokens together"
        )
