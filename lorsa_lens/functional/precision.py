"""What products are computed in."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def has_bfloat16_products(device_type: str) -> bool:
    """Whether a kind of device multiplies bfloat16 matrices faster than float32 ones.

    Processors without units for it emulate it, several times slower than float32.
    """
    if device_type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def native_products(device: torch.device) -> AbstractContextManager[object]:
    """Within, autocast to bfloat16 is off where the device would only emulate it.

    Results are then those of float32: at least as exact, and faster.
    """
    kind = device.type
    asked_for = torch.is_autocast_enabled(kind)
    asked_for = asked_for and torch.get_autocast_dtype(kind) == torch.bfloat16
    emulated = asked_for and not has_bfloat16_products(kind)
    return torch.autocast(kind, enabled=False) if emulated else nullcontext()


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision to compute in, given `x`: its own, or float32 where that is only emulated."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not has_bfloat16_products(x.device.type) else x.dtype
