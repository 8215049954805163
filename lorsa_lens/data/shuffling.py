"""Contexts in a random order, for sources that can be read in one order only."""

import numpy as np
from typing_extensions import override

from lorsa_lens.data.contexts import Context, Contexts, State


class ShuffledContexts(Contexts):
    """Contexts in a random order within stretches of `buffer_size`.

    A stretch is read whole and given out in an order that depends on the seed and its number. So
    the state is small, and exact: where the stretch began, and how many of it were given out. On
    loading it, the stretch is read once more.

    Args:
        contexts: what to shuffle.
        buffer_size: contexts per stretch, all of which are held in memory.
        seed: for the order.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, contexts: Contexts, buffer_size: int, seed: int) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size = {buffer_size} must be positive")
        if seed < 0:
            raise ValueError(f"seed = {seed} must not be negative")
        self.contexts, self.buffer_size, self.seed = contexts, buffer_size, seed
        self.context_size, self.padded = contexts.context_size, contexts.padded
        self.description = f"{contexts.description}; shuffled within {buffer_size}, seed {seed}"
        self._stretch, self._given = 0, 0
        self._began_at = contexts.state_dict()
        self._buffer: list[Context] | None = None

    @override
    def limit_vocabulary(self, d_vocab: int) -> None:
        self.contexts.limit_vocabulary(d_vocab)

    @override
    def __next__(self) -> Context:
        if self._buffer is None:
            self._read()
        assert self._buffer is not None
        if self._given == len(self._buffer):
            self._stretch, self._given = self._stretch + 1, 0
            self._began_at = self.contexts.state_dict()
            self._read()
        if not self._buffer:
            raise StopIteration
        self._given += 1
        return self._buffer[self._given - 1]

    def _read(self) -> None:
        """Read a stretch."""
        pairs = zip(range(self.buffer_size), self.contexts, strict=False)
        contexts = [context for _, context in pairs]
        order = np.random.default_rng([self.seed, self._stretch]).permutation(len(contexts))
        self._buffer = [contexts[i] for i in order]

    @override
    def state_dict(self) -> State:
        return {
            "stretch": self._stretch,
            "given": self._given,
            "began_at": self._began_at,
            "settings": {"buffer_size": self.buffer_size, "seed": self.seed},
        }

    @override
    def load_state_dict(self, state: State) -> None:
        for name in ("buffer_size", "seed"):
            theirs = state.get("settings", {}).get(name)
            if theirs != getattr(self, name):
                raise ValueError(
                    f"the state is of contexts shuffled with {name} = {theirs}, and these are "
                    f"shuffled with {name} = {getattr(self, name)}: shuffle as before to go on"
                )
        self.contexts.load_state_dict(state["began_at"])
        self._stretch, self._given = state["stretch"], state["given"]
        self._began_at, self._buffer = state["began_at"], None
