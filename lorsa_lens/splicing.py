"""Put Lorsas in the place of attention layers, and take them out again.

A splice overrides `forward` on the attention module, nothing else: parameters, `state_dict`,
`W_Q` and its kin, and every other hook of the model stay as they are. The Lorsa's hook points
appear under `blocks.{layer}.attn.lorsa.`, next to the model's own.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorsa_lens.hook_points import HookPoint, fire
from lorsa_lens.hosts import AttentionCall, Host, host_of
from lorsa_lens.lorsa import Lorsa, LorsaState

HOLDER = "lorsa"
"""Name under the attention module at which the Lorsa's hook points appear."""


def splice(
    model: nn.Module, lorsas: Lorsa | Iterable[Lorsa], *, error_term: bool = False
) -> "Splice":
    """Put Lorsas in the place of the attention layers that their `cfg.layer` names.

    The original attention is not computed, unless the error term asks for it. Use it as a context
    manager, or keep the handle and call its `remove()`.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsas: one, or several for different layers. Splices of different layers can be nested
            and removed in any order.
        error_term: add what the Lorsas miss, so that the model's outputs stay exact. The error is
            measured against a pass without hooks on the Lorsa, so interventions on `lorsa.hook_*`
            still change the output. It has a hook point of its own, `hook_error`, and carries no
            gradient.

    Raises:
        ValueError: if a Lorsa does not fit the model, or its layer is spliced already.
        UnsupportedAttentionError: if a Lorsa cannot stand in for a layer's attention.

    Example:
        >>> with splice(model, lorsa):  # doctest: +SKIP
        ...     logits, cache = model.run_with_cache(tokens)
        >>> cache["blocks.5.attn.lorsa.hook_acts_post"]  # doctest: +SKIP
    """
    return Splice(model, lorsas, error_term=error_term)


class Splice:
    """Lorsas in place in a model, until `remove()` or the end of the `with` block."""

    def __init__(
        self, model: nn.Module, lorsas: Lorsa | Iterable[Lorsa], *, error_term: bool = False
    ) -> None:
        host = host_of(model)
        chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
        _check_all(host, chosen)
        self.model = model
        self.error_term = error_term
        self._sites: list[_Site] = []
        self._removed = False
        try:
            for lorsa in chosen:
                site = _Site(host, lorsa, error_term)
                site.attach()
                self._sites.append(site)
        except BaseException:
            self.remove()
            raise

    @property
    def lorsas(self) -> dict[int, Lorsa]:
        """The Lorsas in place, by layer."""
        return {site.layer: site.lorsa for site in self._sites}

    def remove(self) -> None:
        """Restore the model; its hooks on the Lorsas go with them. Again does nothing."""
        while self._sites:
            self._sites[-1].detach()
            self._sites.pop()
        self._removed = True

    def __enter__(self) -> "Splice":
        if self._removed:
            raise RuntimeError("this splice was removed: make another with splice(model, lorsas)")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        layers = ", ".join(str(site.layer) for site in self._sites)
        return f"Splice(layers=[{layers}], error_term={self.error_term})"


def spliced_lorsas(model: nn.Module) -> dict[int, Lorsa]:
    """The Lorsas in place in a model, by layer."""
    host = host_of(model)
    sites = ((layer, _site_at(host, layer)) for layer in range(host.n_layers))
    return {layer: site.lorsa for layer, site in sites if site is not None}


def run_with_lorsas(
    model: nn.Module,
    *args: Any,
    lorsas: Lorsa | Iterable[Lorsa],
    error_term: bool = False,
    **kwargs: Any,
) -> Any:
    """`model(*args, **kwargs)` with Lorsas in place for this one call."""
    with splice(model, lorsas, error_term=error_term):
        return model(*args, **kwargs)


def run_with_cache_with_lorsas(
    model: nn.Module,
    *args: Any,
    lorsas: Lorsa | Iterable[Lorsa],
    error_term: bool = False,
    **kwargs: Any,
) -> Any:
    """`model.run_with_cache(*args, **kwargs)` with Lorsas in place for this one call."""
    with splice(model, lorsas, error_term=error_term):
        return cast(Any, model).run_with_cache(*args, **kwargs)


def run_with_hooks_with_lorsas(
    model: nn.Module,
    *args: Any,
    lorsas: Lorsa | Iterable[Lorsa],
    error_term: bool = False,
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
    bwd_hooks: Sequence[tuple[Any, Any]] = (),
    **kwargs: Any,
) -> Any:
    """`model.run_with_hooks(*args, **kwargs)` with Lorsas in place for this one call."""
    with splice(model, lorsas, error_term=error_term):
        return cast(Any, model).run_with_hooks(
            *args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs
        )


class _Holder(nn.Module):
    """Makes hook points children of an attention module without giving it parameters."""

    def __init__(self, hook_points: dict[str, HookPoint]) -> None:
        super().__init__()
        for name, hook_point in hook_points.items():
            self.add_module(name, hook_point)


class _Site:
    """One Lorsa in the place of one attention layer."""

    def __init__(self, host: Host, lorsa: Lorsa, error_term: bool) -> None:
        assert lorsa.cfg.layer is not None  # checked before
        self.host, self.lorsa, self.layer = host, lorsa, lorsa.cfg.layer
        self.error_term = error_term
        self.attention = host.attention(self.layer)
        self.input_norm = host.input_norm(self.layer) if _reads_normalized(lorsa) else None
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
        if not spliced_lorsas(self.host.model):
            for name in self.host.forbidden:
                self.host.model.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention module's `forward`."""
        call = self.host.receive(self.layer, args, kwargs)
        target = None
        if self.error_term:
            target = self.host.run_original(self._original, call, args, kwargs)
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
        out, state = self.lorsa.step(
            x,
            qk_input=qk_input,
            positions=call.positions.to(like.device),
            keep=None if call.keep is None else call.keep.to(like.device),
            past=self._past(call, state_name),
        )
        if call.cache is not None:
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


def _site_at(host: Host, layer: int) -> _Site | None:
    forward = getattr(host.block(layer), "attn", None)
    forward = None if forward is None else forward.__dict__.get("forward")
    site = getattr(forward, "__self__", None)
    return site if isinstance(site, _Site) else None


def _reads_normalized(lorsa: Lorsa) -> bool:
    return lorsa.cfg.input_site == "ln1_normalized" or lorsa.cfg.fold_ln is True


def _check_all(host: Host, lorsas: list[Lorsa]) -> None:
    """Refuse what cannot be spliced, before anything is touched."""
    layers = [lorsa.cfg.layer for lorsa in lorsas if isinstance(lorsa, Lorsa)]
    for lorsa in lorsas:
        if not isinstance(lorsa, Lorsa):
            raise TypeError(f"lorsas holds a {type(lorsa).__name__}: give Lorsas")
        layer = lorsa.cfg.layer
        if layer is None:
            raise ValueError(
                "a Lorsa's cfg.layer is None: say which layer it replaces, with "
                "lorsa.cfg = lorsa.cfg.replace(layer=...)"
            )
        if layers.count(layer) > 1:
            raise ValueError(f"lorsas holds {layers.count(layer)} Lorsas for layer {layer}")
        host.check_layer(layer)
        if _site_at(host, layer) is not None:
            raise ValueError(f"layer {layer} is spliced already: remove that splice first")
        if lorsa.hook_q.name != "hook_q":
            raise ValueError(f"this Lorsa is in place already, at {lorsa.hook_q.name}")
        _check_fit(host, lorsa, layer)


def _check_fit(host: Host, lorsa: Lorsa, layer: int) -> None:
    if lorsa.cfg.d_model != host.d_model:
        raise ValueError(
            f"the Lorsa for layer {layer} has d_model = {lorsa.cfg.d_model}, but the model has "
            f"d_model = {host.d_model}"
        )
    norm = host.input_norm(layer)
    if lorsa.cfg.fold_ln is False and lorsa.cfg.input_site == "attn_in" and norm is None:
        raise ValueError(
            f"the Lorsa for layer {layer} was made on a model whose layer norms were not folded, "
            "but those of this model are (or it has none before attention): load the model "
            "without folding, or make a Lorsa for the folded one"
        )
    if _reads_normalized(lorsa) and norm is not None and not bool((norm.gain.abs() > 1e-6).all()):
        raise ValueError(
            f"the norm before layer {layer} has a gain of zero, so what the Lorsa reads cannot "
            "be recovered: fold the model's layer norms"
        )
    if _reads_normalized(lorsa) and norm is not None and host.shortformer:
        raise ValueError(
            f"the Lorsa for layer {layer} reads the normalized residual stream, but this model "
            "adds positions to it before queries and keys: fold the model's layer norms"
        )
    host.read_attention(layer)  # refuses attention that cannot be replaced
