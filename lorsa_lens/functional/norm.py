"""RMS norm of queries and keys."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def qk_rms_norm(
    x: Float[Tensor, "batch pos head dim"],
    gain: Float[Tensor, "head dim"],
    *,
    eps: float,
    over: Literal["head", "full"],
) -> Float[Tensor, "batch pos head dim"]:
    """Divide queries or keys by their root mean square, then multiply by `gain`.

    The mean square is taken in at least float32, over each head's dimensions (`head`: Qwen 3,
    Gemma 3), or over all heads' dimensions together (`full`: OLMo 2).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = (-1,) if over == "head" else (-2, -1)
    normalized = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    return (normalized * gain).to(x.dtype)
