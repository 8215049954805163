"""Dense ways to compute a Lorsa, in plain PyTorch, on a Lorsa's own parameters."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lorsa_lens import Lorsa
from lorsa_lens.functional.rotary import plain_frequencies, rotary_angles


def _angles(lorsa: Lorsa, n_pos: int) -> tuple[Tensor, Tensor]:
    cfg = lorsa.cfg
    frequencies = plain_frequencies(cfg.rotated_dim, cfg.rotary_base)
    positions = torch.arange(n_pos)[None]
    cos, sin = rotary_angles(positions, frequencies, scale=1.0, dtype=torch.float32)
    return torch.cat((cos, cos), -1)[:, :, None], torch.cat((sin, sin), -1)[:, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By slices and concatenation."""
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    flipped = torch.cat((-turned[..., n // 2 :], turned[..., : n // 2]), dim=-1)
    return torch.cat((turned * cos.to(x.dtype) + flipped * sin.to(x.dtype), rest), dim=-1)


def published(lorsa: Lorsa, x: Tensor) -> Tensor:
    """The published recipe: its passes over [tokens, n_ov], with autograd through all of them."""
    cfg = lorsa.cfg
    q = torch.einsum("bsm,hmd->bshd", x, lorsa.W_Q) + lorsa.b_Q
    k = torch.einsum("bsm,hmd->bshd", x, lorsa.W_K) + lorsa.b_K
    v = torch.einsum("bsm,im->bsi", x, lorsa.W_V) + lorsa.b_V
    cos, sin = _angles(lorsa, x.shape[1])
    q, k = (rearrange(_rotate(t, cos, sin), "b s h d -> b h s d") for t in (q, k))
    v = rearrange(v, "b s (h g) -> b h s g", h=cfg.n_qk_heads)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    z = F.relu(rearrange(z, "b h s g -> b s (h g)"))
    norms = lorsa.W_O.norm(dim=-1)
    weighed = z * norms
    assert cfg.k is not None
    mask = torch.zeros_like(weighed)
    mask.scatter_(-1, weighed.detach().topk(cfg.k, dim=-1).indices, 1.0)
    codes = weighed * mask / norms
    return torch.einsum("bsi,im->bsm", codes, lorsa.W_O) + lorsa.b_O


def lean(lorsa: Lorsa, x: Tensor) -> Tensor:
    """The leanest dense way: one projection, no passes for norms, a dense decode."""
    cfg = lorsa.cfg
    flat = "h m d -> (h d) m"
    weight = torch.cat((rearrange(lorsa.W_Q, flat), rearrange(lorsa.W_K, flat), lorsa.W_V))
    bias = torch.cat((lorsa.b_Q.flatten(), lorsa.b_K.flatten(), lorsa.b_V))
    n_qk = cfg.n_qk_heads * cfg.d_qk_head
    q, k, v = F.linear(x, weight, bias).split((n_qk, n_qk, cfg.n_ov_heads), dim=-1)
    cos, sin = _angles(lorsa, x.shape[1])
    by_head = "b s (h d) -> b s h d"
    q, k = (_rotate(rearrange(t, by_head, h=cfg.n_qk_heads), cos, sin) for t in (q, k))
    q, k = (rearrange(t, "b s h d -> b h s d") for t in (q, k))
    v = rearrange(v, "b s (h g) -> b h s g", h=cfg.n_qk_heads)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    z = rearrange(z, "b h s g -> b s (h g)")
    assert cfg.k is not None
    norms = lorsa.W_O.detach().norm(dim=-1)
    chosen = (z.detach() * norms).topk(cfg.k, dim=-1, sorted=False).indices
    codes = torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen).relu())
    return F.linear(codes, lorsa.W_O.t(), lorsa.b_O)
