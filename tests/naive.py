"""A Lorsa in plain loops over heads: slow, dense, and easy to check against the paper."""

import math

import torch


def rotated(x, positions, cfg):
    """Rotate each pair (a, b) of a query or key by position * frequency."""
    n = cfg.rotated_dim // 2
    out = x.clone()
    for i in range(n):
        a, b = (2 * i, 2 * i + 1) if cfg.rotary_adjacent_pairs else (i, i + n)
        frequency = cfg.rotary_base ** (-2 * i / cfg.rotated_dim)
        angle = (positions * frequency).to(x.dtype)
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


def naive_z(p, cfg, x):
    """z_pre of every head [batch, pos, n_ov_heads]; `p` holds the parameters by name."""
    n_pos, heads = x.shape[1], []
    positions = torch.arange(n_pos, dtype=torch.float64)
    distance = positions[:, None] - positions[None, :]
    hidden = torch.zeros(n_pos, n_pos, dtype=torch.bool)
    if cfg.attention_dir == "causal":
        hidden |= distance < 0
    if cfg.window_size is not None:
        hidden |= distance >= cfg.window_size
    for i in range(cfg.n_ov_heads):
        h = i // cfg.group_size
        q, k = x @ p["W_Q"][h] + p["b_Q"][h], x @ p["W_K"][h] + p["b_K"][h]
        if cfg.qk_norm == "head":
            q = q / (q.pow(2).mean(-1, keepdim=True) + cfg.qk_norm_eps).sqrt() * p["q_norm"][h]
            k = k / (k.pow(2).mean(-1, keepdim=True) + cfg.qk_norm_eps).sqrt() * p["k_norm"][h]
        q, k = rotated(q, positions, cfg), rotated(k, positions, cfg)
        scores = q @ k.mT / (cfg.attn_scale or math.sqrt(cfg.d_qk_head))
        if cfg.attn_scores_soft_cap:
            scores = cfg.attn_scores_soft_cap * torch.tanh(scores / cfg.attn_scores_soft_cap)
        if cfg.positional_embedding_type == "alibi":
            scores = scores - 2.0 ** (-8 * (h + 1) / cfg.n_qk_heads) * distance.clamp(min=0)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads.append(torch.einsum("bqk,bk->bq", pattern, x @ p["W_V"][i] + p["b_V"][i]))
    return torch.stack(heads, dim=-1)


def naive_selection(z, p, cfg):
    """z with 0 for every head that does not stay, token by token."""
    norms = p["W_O"].detach().norm(dim=-1)
    if cfg.act_fn == "relu":
        return z * (z > 0)
    if cfg.act_fn == "jumprelu":
        return z * (z * norms > p["log_threshold"].exp())
    if cfg.act_fn == "topk_relu":
        z = z * (z > 0)
    scores = (z * norms).abs().detach()
    if cfg.act_fn == "batchtopk":
        limit = scores.flatten().sort(descending=True).values[cfg.k * z.shape[0] * z.shape[1] - 1]
        return z * (scores >= limit)
    order = scores.argsort(-1, descending=True).argsort(-1)
    return z * (order < (cfg.k or cfg.n_ov_heads))


def naive_lorsa(p, cfg, x):
    """The output [batch, pos, d_model]."""
    return naive_selection(naive_z(p, cfg, x), p, cfg) @ p["W_O"] + p["b_O"]
