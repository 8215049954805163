"""Contexts shared out among several processes, each of which goes through all places."""

from typing_extensions import override

from lorsa_lens.data.contexts import Context, Contexts, State, TokenBatch


class SharedContexts(Contexts):
    """The share of one process: of `n` batches that follow one another, the one of its number.

    The place is that after the batches of all processes, so it is the same for all of them, and a
    run can go on with another number of processes.

    Args:
        contexts: what to share out; each process has its own, and reads all of it.
        rank: which process this is.
        n: how many there are.
    """

    def __init__(self, contexts: Contexts, rank: int, n: int) -> None:
        if not 0 <= rank < n:
            raise ValueError(f"rank = {rank} must be from 0 to n - 1 = {n - 1}")
        self.contexts, self.rank, self.n = contexts, rank, n
        self.context_size, self.padded = contexts.context_size, contexts.padded
        self.description = contexts.description

    @override
    def next_batch(self, batch_size: int) -> TokenBatch | None:
        whole = self.contexts.next_batch(batch_size * self.n)
        if whole is None or whole.tokens.shape[0] < batch_size * self.n:
            return None  # too few for all: no process goes on
        rows = slice(self.rank * batch_size, (self.rank + 1) * batch_size)
        return TokenBatch(*(tensor[rows] for tensor in whole))

    @override
    def __next__(self) -> Context:
        return [next(self.contexts) for _ in range(self.n)][self.rank]

    @override
    def state_dict(self) -> State:
        return self.contexts.state_dict()

    @override
    def load_state_dict(self, state: State) -> None:
        self.contexts.load_state_dict(state)

    @override
    def limit_vocabulary(self, d_vocab: int) -> None:
        self.contexts.limit_vocabulary(d_vocab)
