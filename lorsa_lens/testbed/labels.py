"""What a testbed language knows about a sequence, and the interface the languages share."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor


class LabelledTokens(NamedTuple):
    """Sequences with the rule that holds at each position, its source and its answer.

    Position ``q`` carries a rule when the token *after* ``q`` is determined by it. The three label
    tensors are -1 where the language determines nothing.

    Attributes:
        tokens: The sequences.
        rule: Index into ``language.rules`` of the rule at each query position.
        source: Position of the token the rule reads, at most the query position.
        answer: The next token the rule demands. -1 too for a rule that only names a source (the
            previous-token rule of `CyclicLanguage`).
    """

    tokens: Int[Tensor, "batch pos"]
    rule: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    answer: Int[Tensor, "batch pos"]

    def to(self, device: torch.device | str) -> "LabelledTokens":
        """The same labels with every tensor on ``device``."""
        return LabelledTokens(*(tensor.to(device) for tensor in self))


@runtime_checkable
class Language(Protocol):
    """What the training script and the scores ask of a language."""

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules; `LabelledTokens.rule` indexes this tuple."""
        ...

    @property
    def vocab(self) -> tuple[str, ...]:
        """Readable string of every token id; id 0 is ``<bos>``."""
        ...

    @property
    def families(self) -> dict[str, tuple[int, ...]]:
        """Token ids of each family of tokens."""
        ...

    @property
    def n_ctx(self) -> int:
        """Length of a sampled sequence, ``<bos>`` included."""
        ...

    def sample(self, n_sequences: int, *, seed: int) -> LabelledTokens:
        """Draw labelled sequences; the same seed gives the same sequences."""
        ...

    def label(self, tokens: Int[Tensor, "batch pos"]) -> LabelledTokens:
        """Label any sequences of the vocabulary, for example edited ones."""
        ...

    def str_tokens(self, tokens: Int[Tensor, "pos"]) -> list[str]:
        """The readable strings of one sequence."""
        ...


def recurrence(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position of each token's most recent earlier occurrence, -1 where there is none."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    query, key = rearrange(tokens, "b q -> b q 1"), rearrange(tokens, "b k -> b 1 k")
    earlier = rearrange(position, "k -> 1 k") < rearrange(position, "q -> q 1")
    return torch.where((query == key) & earlier, position, -1).amax(dim=2)


def token_strings(vocab: tuple[str, ...], tokens: Int[Tensor, "pos"]) -> list[str]:
    """Look the ids of one sequence up in a vocabulary.

    Raises:
        ValueError: if an id lies outside the vocabulary.
    """
    if tokens.numel() == 0:
        return []
    check_token_ids(tokens, len(vocab))
    return [vocab[token] for token in tokens.tolist()]


def check_token_ids(tokens: Int[Tensor, "*shape"], d_vocab: int) -> None:
    """Raise ValueError unless there are ids and every one lies in ``range(d_vocab)``."""
    if tokens.numel() == 0:
        raise ValueError(f"tokens must not be empty, got shape {list(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"tokens must be ids in 0..{d_vocab - 1}, the vocabulary of this language; "
            f"got ids from {low} to {high}"
        )


def check_n_sequences(n_sequences: int) -> None:
    """Raise ValueError unless at least one sequence is asked for."""
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be at least 1, got {n_sequences}")
