"""Is a reading right? Heads against random heads of the same density and size."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours.catalogue import Behaviour
from lorsa_lens.analysis.causal.effects import To, head_effects
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention

NEIGHBOURS = 8
"""A random head is one of so many that are nearest to the head it stands for."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What switching heads off costs where a hypothesis says that they matter."""

    cost: float
    """Nats added to the loss at the queries of the hypothesis, on average."""

    cost_elsewhere: float
    """Nats added at all other positions."""

    random_costs: list[float]
    """The first, for random heads of the same density and size."""

    random_costs_elsewhere: list[float]
    """The second, for random heads."""

    n_queries: int
    """Queries of the hypothesis."""

    @property
    def p_value(self) -> float:
        """How often random heads cost at least as much there, the heads themselves included."""
        worse = sum(cost >= self.cost for cost in self.random_costs)
        return (1 + worse) / (1 + len(self.random_costs))

    @property
    def random_cost(self) -> float:
        """Mean cost of random heads at the queries of the hypothesis."""
        return sum(self.random_costs) / len(self.random_costs)


def validate(
    model: nn.Module,
    lorsa: Lorsa,
    heads: list[int],
    hypothesis: Behaviour | Bool[Tensor, "batch pos"],
    tokens: Int[Tensor, "batch pos"],
    *,
    n_random: int = 10,
    to: To = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Validation:
    """Switch heads off and compare the cost where they should matter with that of random heads.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsa: whose heads.
        heads: which of them the hypothesis is about.
        hypothesis: a behaviour, which matters at queries that have a source; or those queries.
        tokens: the text.
        n_random: how many groups of random heads.
        to: what the heads are set to, as in `head_effects`.
        seed: for the random heads.
        batch_size: sequences at a time.

    Raises:
        ValueError: if there are no heads, no such queries before the last position, or too few
            other heads.
    """
    if not heads:
        raise ValueError("heads is empty: name at least one")
    if not n_random >= 1:
        raise ValueError(f"n_random = {n_random} must be positive")
    where = hypothesis.sources(tokens).any(-1) if isinstance(hypothesis, Behaviour) else hypothesis
    where = where[:, :-1]
    if not bool(where.any()):
        raise ValueError("the hypothesis holds at no query before the last position of this text")
    density, size = density_and_size(model, lorsa, tokens, batch_size=batch_size)
    groups = [heads, *matched_heads(heads, density, size, n_random, seed)]
    costs = []
    for group in groups:
        effects = head_effects(
            model, lorsa, tokens, {_layer(lorsa): group}, to=to, batch_size=batch_size
        )
        cost = effects.cost.cpu()
        costs.append((float(cost[where].mean()), float(cost[~where].mean())))
    return Validation(
        cost=costs[0][0],
        cost_elsewhere=costs[0][1],
        random_costs=[cost for cost, _ in costs[1:]],
        random_costs_elsewhere=[cost for _, cost in costs[1:]],
        n_queries=int(where.sum()),
    )


@torch.no_grad()
def density_and_size(
    model: nn.Module, lorsa: Lorsa, tokens: Int[Tensor, "batch pos"], *, batch_size: int = 32
) -> tuple[Float[Tensor, " ov_head"], Float[Tensor, " ov_head"]]:
    """Share of tokens at which each head stays, and the root mean square of what it writes then.

    Args:
        model: as for `validate`.
        lorsa: as for `validate`.
        tokens: as for `validate`.
        batch_size: as for `validate`.
    """
    n_heads = lorsa.cfg.n_ov_heads
    n_active = torch.zeros(n_heads, dtype=torch.float64)
    energy = torch.zeros_like(n_active)
    for start in range(0, tokens.shape[0], batch_size):
        rows = tokens[start : start + batch_size]
        part = record_attention(model, rows, [_layer(lorsa)])[_layer(lorsa)].seen_by(lorsa)
        acts = to_dense(lorsa.encode(part.x, **part.context), n_heads)
        n_active += (acts != 0).double().sum((0, 1)).cpu()
        energy += (acts * writing_norms(lorsa.W_O)).double().square().sum((0, 1)).cpu()
    return n_active / tokens.numel(), (energy / n_active.clamp(min=1)).sqrt()


def matched_heads(
    heads: list[int],
    density: Float[Tensor, " ov_head"],
    size: Float[Tensor, " ov_head"],
    n_groups: int,
    seed: int = 0,
) -> list[list[int]]:
    """Random groups of other heads, each head of which is like one of `heads`.

    Args:
        heads: which heads to match; none of them is drawn.
        density: how often each head stays.
        size: how much it writes then.
        n_groups: how many groups.
        seed: for the draw.

    Raises:
        ValueError: if there are too few other heads that stay anywhere.
    """
    logs = torch.stack((density, size)).clamp(min=1e-12).log()
    pool = [head for head in range(len(density)) if density[head] > 0 and head not in set(heads)]
    if len(pool) < len(heads):
        raise ValueError(f"only {len(pool)} other heads are ever active, to match {len(heads)}")
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for _ in range(n_groups):
        free = list(pool)
        group = []
        for head in heads:
            distance = (logs[:, free] - logs[:, head, None]).square().sum(0)
            near = distance.argsort()[:NEIGHBOURS]
            pick = int(near[torch.randint(len(near), (), generator=generator)])
            group.append(free.pop(pick))
        groups.append(group)
    return groups


def _layer(lorsa: Lorsa) -> int:
    if lorsa.cfg.layer is None:
        raise ValueError("the Lorsa's cfg.layer is None: say which layer it belongs to")
    return lorsa.cfg.layer
