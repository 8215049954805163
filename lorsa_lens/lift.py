"""Lorsas made from attention layers: the exact lift, and starting points for training.

Any attention layer is a Lorsa: one query-key circuit per head, one rank-1 head per dimension of a
head's output, and all of them stay. That is the `exact` initialisation. The others copy the
query-key circuits and fill `n_ov_heads` rank-1 heads anew:

* `tied`: writing vectors random in the output subspace of the circuit's attention head, each
  reading what it writes, `w_V = W_V W_O w_O`;
* `svd`: the singular vectors of the attention head's `W_V W_O`, largest first; further heads tied;
* `random`: reading and writing vectors random in the whole residual stream.

Value biases move into `b_O`, which is exact since a pattern's rows sum to one.
"""

from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.config import LorsaConfig
from lorsa_lens.hosts import AttentionWeights, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.validation import ConfigError

Init = Literal["exact", "tied", "svd", "random"]

COPY_NOISE = 0.05
"""Noise on the second and further copies of a head's query-key circuit, relative to its weights."""


def exact_config(model: nn.Module, layer: int) -> LorsaConfig:
    """The configuration of the Lorsa that equals an attention layer."""
    host = host_of(model)
    return _config(host.read_attention(layer), layer, host.model_name, host.is_folded(layer))


def lift(
    model: nn.Module, layer: int, *, init: Init | None = None, seed: int = 0, **changes: Any
) -> Lorsa:
    """Make a Lorsa from an attention layer.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        layer: which layer.
        init: see the module's docstring. None: `exact` if `n_qk_heads` and `n_ov_heads` are the
            layer's own, else `tied`.
        seed: for what is drawn at random.
        **changes: fields of the configuration to set otherwise, such as `n_ov_heads=4096, k=64`.

    Raises:
        ConfigError: if the configuration cannot be, or does not fit the initialisation.
        UnsupportedAttentionError: if a Lorsa cannot stand in for this layer's attention.
    """
    if init is not None and init not in get_args(Init):
        raise ConfigError(f"init = {init!r} must be one of {get_args(Init)} or None")
    host = host_of(model)
    weights = host.read_attention(layer)
    own = _config(weights, layer, host.model_name, host.is_folded(layer))
    cfg = own.replace(**_repeated_slopes(own, changes), **changes)
    same_sizes = all(
        getattr(cfg, name) == getattr(own, name)
        for name in ("d_model", "n_qk_heads", "d_qk_head", "n_ov_heads")
    )
    if init is None:
        init = "exact" if same_sizes else "tied"
    _check_init(cfg, own, init, same_sizes)
    lorsa = Lorsa(cfg, device=weights.W_Q.device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        _copy_circuits(lorsa, weights, generator)
        lorsa.b_O.copy_(weights.b_O + einsum(weights.b_V, weights.W_O, "h d, h d m -> m"))
        lorsa.b_V.zero_()
        W_V, W_O = _ov_heads(weights, cfg, init, generator)
        lorsa.W_V.copy_(W_V)
        lorsa.W_O.copy_(W_O)
    return lorsa


def _config(
    weights: AttentionWeights, layer: int, model_name: str | None, fold_ln: bool
) -> LorsaConfig:
    n_heads, d_model, d_head = weights.W_Q.shape
    return LorsaConfig(
        **asdict(weights.spec),
        d_model=d_model,
        n_qk_heads=n_heads,
        d_qk_head=d_head,
        n_ov_heads=n_heads * weights.W_V.shape[-1],
        layer=layer,
        model_name=model_name,
        fold_ln=fold_ln,
        dtype=str(weights.W_Q.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )


def _repeated_slopes(own: LorsaConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """ALiBi's slopes for more circuits than heads: each copy keeps that of its head."""
    n_qk_heads = changes.get("n_qk_heads")
    if own.alibi_slopes is None or n_qk_heads is None or "alibi_slopes" in changes:
        return {}
    return {"alibi_slopes": tuple(own.alibi_slopes[c % own.n_qk_heads] for c in range(n_qk_heads))}


def _check_init(cfg: LorsaConfig, own: LorsaConfig, init: Init, same_sizes: bool) -> None:
    if init == "exact" and not same_sizes:
        raise ConfigError(
            f"init = 'exact' needs the layer's own sizes, n_qk_heads = {own.n_qk_heads} and "
            f"n_ov_heads = {own.n_ov_heads}: use 'tied' or 'svd' for others"
        )
    for name in ("d_model", "d_qk_head"):
        if getattr(cfg, name) != getattr(own, name):
            raise ConfigError(
                f"{name} = {getattr(cfg, name)}, but the layer has {getattr(own, name)}"
            )
    if cfg.n_qk_heads < own.n_qk_heads:
        raise ConfigError(
            f"n_qk_heads = {cfg.n_qk_heads}: at least {own.n_qk_heads}, one query-key circuit for "
            "each attention head"
        )
    if cfg.qk_norm == "full" and cfg.n_qk_heads % own.n_qk_heads:
        raise ConfigError(
            f"n_qk_heads = {cfg.n_qk_heads} must be a multiple of {own.n_qk_heads}: queries and "
            "keys of all heads are normalized together, so each must be there equally often"
        )


def _copy_circuits(lorsa: Lorsa, weights: AttentionWeights, generator: torch.Generator) -> None:
    """Circuit c gets head `c % n_heads`; every copy after the first is made a little different."""
    n_heads = weights.W_Q.shape[0]
    circuits = torch.arange(lorsa.cfg.n_qk_heads)
    heads = circuits % n_heads
    for name in ("W_Q", "W_K", "b_Q", "b_K", "q_norm", "k_norm"):
        original = getattr(weights, name)
        if original is None:
            continue
        copies = original[heads]
        if name in ("W_Q", "W_K"):
            noise = _normal(copies.shape, copies, generator) * copies.std() * COPY_NOISE
            copies = copies + noise * (circuits >= n_heads).to(copies)[:, None, None]
        getattr(lorsa, name).copy_(copies)


def _ov_heads(
    weights: AttentionWeights, cfg: LorsaConfig, init: Init, generator: torch.Generator
) -> tuple[Float[Tensor, "ov_head d_model"], Float[Tensor, "ov_head d_model"]]:
    """Reading and writing vectors of all rank-1 heads."""
    n_heads, d_model, d_head = weights.W_V.shape
    if init == "exact":
        return (
            rearrange(weights.W_V, "h m d -> (h d) m"),
            rearrange(weights.W_O, "h d m -> (h d) m"),
        )
    if init == "random":
        shape = (cfg.n_ov_heads, d_model)
        return tuple(_normal(shape, weights.W_V, generator) * d_model**-0.5 for _ in range(2))
    circuit_heads = torch.arange(cfg.n_qk_heads) % n_heads
    W_V, W_O = weights.W_V[circuit_heads], weights.W_O[circuit_heads]
    mixture = _normal((cfg.n_qk_heads, cfg.group_size, d_head), W_O, generator)
    write = nn.functional.normalize(einsum(mixture, W_O, "c g d, c d m -> c g m"), dim=-1)
    read = einsum(W_V, W_O, write, "c n d, c d m, c g m -> c g n")
    if init == "svd":
        left, singular, right = _ov_svd(W_V, W_O)
        n_singular = min(cfg.group_size, d_head)
        write[:, :n_singular] = right[:, :n_singular]
        read[:, :n_singular] = (left * singular[:, None, :]).mT[:, :n_singular]
    return rearrange(read, "c g m -> (c g) m"), rearrange(write, "c g m -> (c g) m")


def _ov_svd(
    W_V: Float[Tensor, "circuit d_model d_head"], W_O: Float[Tensor, "circuit d_head d_model"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of each `W_V W_O`, by way of the small triangular factors, in float64."""
    q_v, r_v = torch.linalg.qr(W_V.double())
    q_o, r_o = torch.linalg.qr(W_O.double().mT)
    u, singular, v = torch.linalg.svd(r_v @ r_o.mT)
    left, right = q_v @ u, v @ q_o.mT
    return left.to(W_V.dtype), singular.to(W_V.dtype), right.to(W_V.dtype)


def _normal(shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=generator).to(like)
