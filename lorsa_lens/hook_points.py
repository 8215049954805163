"""TransformerLens's hook points, wherever the installed release keeps them."""

from torch import Tensor
from transformer_lens.hook_points import HookPoint

try:
    from transformer_lens import HookedRootModule  # 3.0 and later
except ImportError:  # pragma: no cover - depends on the installed release
    from transformer_lens.hook_points import HookedRootModule

__all__ = ["HookPoint", "HookedRootModule", "is_hooked"]


def is_hooked(hook_point: HookPoint) -> bool:
    """Whether anything looks at a hook point: TransformerLens's hooks or PyTorch's own."""
    return bool(
        hook_point.fwd_hooks
        or hook_point.bwd_hooks
        or hook_point._forward_hooks
        or hook_point._forward_pre_hooks
        or hook_point._backward_hooks
    )


def fire(hook_point: HookPoint, tensor: Tensor) -> Tensor:
    """Show a tensor to a hook point; what comes back goes on in its place."""
    shown: Tensor = hook_point(tensor)
    return shown
