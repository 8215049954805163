"""One Lorsa in the place of one attention layer: a host's call in, a Lorsa's output out."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorsa_lens.attention import LorsaState
from lorsa_lens.hook_points import HookPoint, fire
from lorsa_lens.hosts import AttentionCall, Host
from lorsa_lens.lorsa import Lorsa

HOLDER = "lorsa"
"""Name under the attention module at which the Lorsa's hook points appear."""


class _Holder(nn.Module):
    """Makes hook points children of an attention module without giving it parameters."""

    def __init__(self, hook_points: dict[str, HookPoint]) -> None:
        super().__init__()
        for name, hook_point in hook_points.items():
            self.add_module(name, hook_point)


class Site:
    """One Lorsa in the place of one attention layer."""

    def __init__(self, host: Host, lorsa: Lorsa, error_term: bool) -> None:
        assert lorsa.cfg.layer is not None  # checked before
        self.host, self.lorsa, self.layer = host, lorsa, lorsa.cfg.layer
        self.error_term = error_term
        self.attention = host.attention(self.layer)
        self.input_norm = host.input_norm(self.layer) if reads_normalized(lorsa) else None
        self.post_norm: Any = None
        if lorsa.cfg.output_site == "hook_attn_out":
            self.post_norm = host.post_norm(self.layer)
        names = {**dict(lorsa.named_children()), "hook_error": HookPoint()}
        points = {n: p for n, p in names.items() if isinstance(p, HookPoint)}
        self.hook_error = points["hook_error"]
        self.holder = _Holder(points)
        prefix = f"blocks.{self.layer}.attn.{HOLDER}"
        self.hook_points = {f"{prefix}.{name}": point for name, point in points.items()}
        self._pending: tuple[Tensor, Tensor] | None = None

    # -------------------------------------------------------------------------- in place and out

    def attach(self) -> None:
        """Override `forward`, show the hook points, forbid what would rewrite weights."""
        self._original = self.attention.forward
        self.attention.add_module(HOLDER, self.holder)
        # In the instance's dict, past the `__setattr__` of bridges; bound, so that copies of the
        # model rebind it to their own site.
        self.attention.__dict__["forward"] = self.forward
        if self.post_norm is not None:
            self._original_post_norm = self.post_norm.forward
            self.post_norm.__dict__["forward"] = self.forward_post_norm
        self.host.name_hooks(self.hook_points, self.holder)
        for name in self.host.forbidden:
            if hasattr(type(self.host.model), name):
                self.host.model.__dict__[name] = partial(_refuse, name)

    def detach(self) -> None:
        """Undo `attach`; hooks on the Lorsa go.

        Raises:
            RuntimeError: if something else overrode `forward` since; nothing is undone then.
        """
        if self.attention.__dict__.get("forward") != self.forward:
            raise RuntimeError(
                f"attention.forward of layer {self.layer} was overridden by something else after "
                "the splice: undo that first"
            )
        self.host.forget_hooks(self.hook_points)
        for hook_point in self.hook_points.values():
            hook_point.remove_hooks("both", including_permanent=True)
        _restore_forward(self.attention, self._original)
        if self.post_norm is not None:
            _restore_forward(self.post_norm, self._original_post_norm)
        del self.attention._modules[HOLDER]
        self.lorsa.setup()  # gives the hook points their own names again
        if not any(site_at(self.host, layer) for layer in range(self.host.n_layers)):
            for name in self.host.forbidden:
                self.host.model.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention module's `forward`."""
        call = self.host.receive(self.layer, args, kwargs)
        target = None
        if self.error_term:
            target = self.host.run_original(self.layer, self._original, call, args, kwargs)
        out = self._run(call, "lorsa")
        clean = out
        if self.error_term and (self.lorsa.has_hooks() or call.cache is not None):
            with torch.no_grad(), self.lorsa.hooks_muted():
                clean = self._run(call, "lorsa_clean")
        if call.cache is not None and not self.error_term:
            call.cache.advance(call.x)
        if self.post_norm is not None:  # the Lorsa replaces what comes after this norm
            self._pending = (out, clean)
            return self.host.respond(self.layer, out if target is None else target)
        return self.host.respond(self.layer, self._corrected(out, clean, target))

    def forward_post_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the `forward` of the norm after attention."""
        pending, self._pending = self._pending, None
        if pending is None:  # called from elsewhere
            return cast(Tensor, self._original_post_norm(*args, **kwargs))
        target = None
        if self.error_term:
            target = self.host.run_post_norm(self.layer, self._original_post_norm, args)
        return self.host.respond_post_norm(self.layer, self._corrected(*pending, target))

    def _run(self, call: AttentionCall, state_name: str) -> Tensor:
        """The Lorsa's output in the host's precision; its state goes to the cache."""
        like = self.lorsa.W_O
        x = self._normalized(call.x).to(like)
        qk_input = None if call.qk_input is None else self._normalized(call.qk_input).to(like)
        context = {
            "qk_input": qk_input,
            "positions": call.positions.to(like.device),
            "keep": None if call.keep is None else call.keep.to(like.device),
        }
        if call.cache is None:
            return cast(Tensor, self.lorsa(x, **context)).to(call.x)
        out, state = self.lorsa.step(x, **context, past=self._past(call, state_name))
        call.cache.store(state_name, state.k, state.v, n_new=x.shape[1])
        return out.to(call.x)

    def _normalized(self, x: Tensor) -> Tensor:
        """The input without the affine part of the norm, where the Lorsa was made without it."""
        if self.input_norm is None:
            return x
        return (x - self.input_norm.bias) / self.input_norm.gain

    def _past(self, call: AttentionCall, state_name: str) -> LorsaState | None:
        if call.cache is None or not call.n_past:
            return None
        stored = call.cache.load(state_name)
        if stored is None or stored[0].shape[1] != call.n_past:
            raise RuntimeError(
                f"the KV cache holds {call.n_past} tokens that layer {self.layer} saw without "
                "this splice: start from an empty cache"
            )
        return LorsaState(*stored)

    def _corrected(self, out: Tensor, clean: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return out
        return out + fire(self.hook_error, (target - clean).detach())


def site_at(host: Host, layer: int) -> Site | None:
    """The site at a layer, if a Lorsa is in place there."""
    forward = getattr(host.block(layer), "attn", None)
    forward = None if forward is None else forward.__dict__.get("forward")
    site = getattr(forward, "__self__", None)
    return site if isinstance(site, Site) else None


def reads_normalized(lorsa: Lorsa) -> bool:
    """Whether a Lorsa reads the normalized stream, without the affine part of the norm."""
    return lorsa.cfg.input_site == "ln1_normalized" or lorsa.cfg.fold_ln is True


def _restore_forward(module: Any, original: Any) -> None:
    del module.__dict__["forward"]
    if module.forward != original:  # something else had overridden it before the splice
        module.__dict__["forward"] = original


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    """Stands in for a method that would rewrite the weights of a spliced model."""
    del args, kwargs
    raise RuntimeError(
        f"{name} changes the model's weights, and the Lorsas in place would no longer fit: "
        "remove the splice first, and make or load Lorsas for the processed model"
    )
