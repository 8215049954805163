"""The contexts kept for each head while a corpus goes by: a fixed number, whatever its length."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_CONTEXT = -1


@dataclass
class Kept:
    """For each head the contexts of highest rank so far, best first.

    Ranked by activation, these are the top contexts; ranked by a random number, a sample.
    """

    rank: Float[Tensor, "head slot"]
    context: Int[Tensor, "head slot"]
    """Number of the context in the corpus, `NO_CONTEXT` for an empty slot."""
    query: Int[Tensor, "head slot"]
    """Position of the head's largest activation there."""
    activation: Float[Tensor, "head slot"]
    """That activation, signed."""
    z_pattern: Float[Tensor, "head slot key"]
    """The z pattern at that position, in half precision."""

    @classmethod
    def empty(cls, n_heads: int, n_slots: int, n_pos: int) -> "Kept":
        """Nothing yet."""
        return cls(
            rank=torch.full((n_heads, n_slots), -torch.inf),
            context=torch.full((n_heads, n_slots), NO_CONTEXT),
            query=torch.zeros(n_heads, n_slots, dtype=torch.long),
            activation=torch.zeros(n_heads, n_slots),
            z_pattern=torch.zeros(n_heads, n_slots, n_pos, dtype=torch.float16),
        )

    def offer(
        self,
        rank: Float[Tensor, "context head"],
        first_context: int,
        query: Int[Tensor, "context head"],
        activation: Float[Tensor, "context head"],
    ) -> Bool[Tensor, "head slot"]:
        """Take in those of some contexts that rank high enough; ties go to earlier ones.

        Args:
            rank: minus infinity where a context is not to be kept for a head.
            first_context: number of the first of these contexts; the others follow.
            query: see `Kept`.
            activation: see `Kept`.

        Returns:
            Which slots are new; their z patterns are to be filled in.
        """
        n_slots = self.rank.shape[1]
        ranks = torch.cat((self.rank, rank.T), dim=1)
        order = ranks.sort(dim=1, descending=True, stable=True).indices[:, :n_slots]
        numbers = torch.arange(first_context, first_context + len(rank)).expand(len(ranks), -1)

        def merged(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat((old, new), dim=1).gather(1, order)

        self.rank = ranks.gather(1, order)
        self.context = merged(self.context, numbers)
        self.context = self.context.masked_fill(self.rank == -torch.inf, NO_CONTEXT)
        self.query = merged(self.query, query.T)
        self.activation = merged(self.activation, activation.T)
        new = (order >= n_slots) & (self.rank > -torch.inf)
        heads = torch.nonzero(new.any(1))[:, 0]  # others keep what they have, where it is
        old = order[heads].clamp(max=n_slots - 1)[..., None]
        rows = self.z_pattern[heads]
        self.z_pattern[heads] = rows.gather(1, old.expand(-1, -1, rows.shape[-1]))
        self.z_pattern[new] = 0.0
        return new

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "Kept":
        """What `tensors` gave."""
        names = ("rank", "context", "query", "activation", "z_pattern")
        return cls(**{name: tensors[f"{prefix}.{name}"] for name in names})
