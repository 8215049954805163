"""A Lorsa read while it works: patterns, values and code of one pass."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.functional.code import Code
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord


class Reading(NamedTuple):
    """What a Lorsa computed for some sequences."""

    pattern: Float[Tensor, "batch qk_head query key"]
    values: Float[Tensor, "batch key ov_head"]
    code: Code


@torch.no_grad()
def read(lorsa: Lorsa, part: AttentionRecord) -> Reading:
    """Run a Lorsa and keep its patterns and values.

    Args:
        lorsa: not in place in a model.
        part: from `AttentionRecord.seen_by(lorsa)`.
    """
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    names = ("hook_pattern", "hook_values")
    with lorsa.hooks(fwd_hooks=[(name, keep) for name in names]):
        code = lorsa.encode(part.x, **part.context)
    return Reading(kept["hook_pattern"], kept["hook_values"], code)
