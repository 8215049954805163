"""Put Lorsas in the place of attention layers, and take them out again.

A splice overrides `forward` on the attention module, nothing else: parameters, `state_dict`,
`W_Q` and its kin, and every other hook of the model stay as they are. The Lorsa's hook points
appear under `blocks.{layer}.attn.lorsa.`, next to the model's own.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from lorsa_lens.hosts import Host, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.site import Site, reads_normalized, site_at


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
        self._sites: list[Site] = []
        self._removed = False
        try:
            for lorsa in chosen:
                site = Site(host, lorsa, error_term)
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
    sites = ((layer, site_at(host, layer)) for layer in range(host.n_layers))
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
        if site_at(host, layer) is not None:
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
    if reads_normalized(lorsa) and norm is not None and not bool((norm.gain.abs() > 1e-6).all()):
        raise ValueError(
            f"the norm before layer {layer} has a gain of zero, so what the Lorsa reads cannot "
            "be recovered: fold the model's layer norms"
        )
    if reads_normalized(lorsa) and norm is not None and host.shortformer:
        raise ValueError(
            f"the Lorsa for layer {layer} reads the normalized residual stream, but this model "
            "adds positions to it before queries and keys: fold the model's layer norms"
        )
    host.read_attention(layer)  # refuses attention that cannot be replaced
