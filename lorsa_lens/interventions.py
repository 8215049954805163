"""Hooks that change chosen heads at chosen positions: for `hook_acts_post` of a Lorsa.

Each function returns a hook, to be given to `run_with_hooks`, `hooks()` or `add_hook`:

    name = f"blocks.{layer}.attn.lorsa.hook_acts_post"
    model.run_with_hooks(tokens, fwd_hooks=[(name, zero_heads([17, 42]))])

Activations are changed after selection, so a head that was not selected can be switched on. In a
splice with an error term, the output changes by exactly the change of the head's contribution
`z w_O`.
"""

from collections.abc import Callable, Sequence
from operator import index as as_int
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Hook = Callable[..., Tensor]
"""What TransformerLens calls with the activation and `hook=` the hook point."""

Positions = Sequence[int] | slice | None


def zero_heads(heads: Sequence[int], positions: Positions = None) -> Hook:
    """A hook that switches heads off.

    Args:
        heads: which rank-1 heads.
        positions: at which positions of the sequence; negative ones count from its end. None: all.
    """
    return scale_heads(heads, 0.0, positions)


def scale_heads(heads: Sequence[int], factor: float, positions: Positions = None) -> Hook:
    """A hook that multiplies the activations of heads by `factor`."""
    return _edit(heads, positions, lambda acts: acts * factor)


def set_heads(
    heads: Sequence[int], values: float | Float[Tensor, "..."], positions: Positions = None
) -> Hook:
    """A hook that sets the activations of heads.

    Args:
        heads: which rank-1 heads.
        values: a number, or a tensor that broadcasts to [batch, position, head] of those chosen.
        positions: as in `zero_heads`.
    """
    return _edit(heads, positions, lambda acts: _like(values, acts))


def steer_heads(
    heads: Sequence[int], amounts: float | Float[Tensor, "..."], positions: Positions = None
) -> Hook:
    """A hook that adds to the activations of heads, whether they were selected or not.

    Args:
        heads: which rank-1 heads.
        amounts: a number, or a tensor that broadcasts to [batch, position, head] of those chosen.
        positions: as in `zero_heads`.
    """
    return _edit(heads, positions, lambda acts: acts + _like(amounts, acts))


def _like(values: float | Tensor, acts: Tensor) -> Tensor:
    """Values broadcast to activations."""
    tensor = torch.as_tensor(values, dtype=acts.dtype, device=acts.device)
    try:
        return tensor.expand_as(acts)
    except RuntimeError:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} does not broadcast to the activations "
            f"chosen, [batch, position, head] = {list(acts.shape)}"
        ) from None


def _edit(heads: Sequence[int], positions: Positions, change: Callable[[Tensor], Tensor]) -> Hook:
    for name, given in (("heads", heads), ("positions", positions)):
        if isinstance(given, int):
            raise TypeError(f"{name} = {given} must be a sequence: give [{given}]")
    chosen = [as_int(head) for head in heads]

    def hook(acts: Float[Tensor, "batch pos ov_head"], hook: Any) -> Tensor:
        where = getattr(hook, "name", "this hook point")
        n_pos, n_heads = acts.shape[-2:]
        _check_range("heads", chosen, 0, n_heads, where)
        index = torch.arange(n_pos, device=acts.device)
        if isinstance(positions, slice):
            index = index[positions]
        elif positions is not None:
            wanted = [as_int(position) for position in positions]
            _check_range("positions", wanted, -n_pos, n_pos, where)
            index = index[wanted]
        edited = acts.clone()
        edited[:, index[:, None], chosen] = change(acts[:, index[:, None], chosen])
        return edited

    return hook


def _check_range(name: str, values: Sequence[int], low: int, high: int, where: str) -> None:
    for value in values:
        if not low <= value < high:
            raise ValueError(f"{name} holds {value}, but {where} has {low} to {high - 1}")
