"""A run on tensors without contents: it computes nothing, and tells what it would hold."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within a `FakeTensorMode`: how many bytes tensors hold now, and held at most.

    Where a program asks for a number in a tensor, it gets a guess, since there is none: true, 1.0,
    or `assumed_count`. As many entries of a mask are taken to be true where their places are asked
    for, and all where a mask is an index.

    Args:
        device: the kind of device whose memory counts.
        assumed_count: for integers.
    """

    def __init__(self, device: str, assumed_count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.assumed_count = device, assumed_count
        self.now = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held since the last `mark`."""
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def mark(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = self._guessed(func, *args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _guessed(self, func: Any, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The result of an operation whose value or shape depends on contents."""
        if func in (_aten.equal.default, _aten.allclose.default):
            return True
        if func is _aten._local_scalar_dense.default:
            if first.dtype == torch.bool:
                return True
            return 1.0 if first.dtype.is_floating_point else self.assumed_count
        if func is _aten.nonzero.default:
            n_true = min(first.numel(), self.assumed_count)
            return first.new_empty((n_true, first.ndim), dtype=torch.long)
        if func is _aten.bincount.default:
            length = args[1] if len(args) > 1 else kwargs["minlength"]
            return first.new_empty((length,), dtype=torch.long)
        if func is _aten.index.Tensor:
            (mask,) = [index for index in args[0] if index is not None]
            return first.new_empty((mask.numel(), *first.shape[mask.ndim :]))
        raise NotImplementedError(f"{func}: its result depends on contents")

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != self.device or storage in self._known:
            return
        self._known[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, n_bytes: int) -> None:
        self.now -= n_bytes


@contextmanager
def without_contents(model: nn.Module, device: str) -> Iterator[None]:
    """Within, parameters and buffers of a model are tensors without contents on a device."""
    own: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    replaced.append((kind, name, tensor))
    for tensors, name, tensor in replaced:
        if id(tensor) not in own:
            empty = _empty_like(tensor, device)
            own[id(tensor)] = (
                nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            )
        tensors[name] = own[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same form: with its strides, unless it is a view that leaves gaps."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if span != tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
