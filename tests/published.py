"""Checkpoints as the published implementations write them, and what those compute, in plain loops.

Written from the description of the formats alone (the formulas are in the docstrings of
`lorsa_lens.interop`): nothing of `lorsa_lens` is used here, so it is an oracle.
"""

import json
import math

import torch
from safetensors.torch import save_file

LAYER = 3
HOOK_IN = f"blocks.{LAYER}.ln1.hook_normalized"
HOOK_OUT = f"blocks.{LAYER}.hook_attn_out"
NORMS = {HOOK_IN: 3.7, HOOK_OUT: 0.6}

DEFAULTS = {
    "sae_type": "lorsa", "d_model": 16, "expansion_factor": 4, "use_decoder_bias": True,
    "act_fn": "topk", "norm_activation": "inference", "sparsity_include_decoder_norm": True,
    "top_k": 5, "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
    "jumprelu_threshold_window": 2.0, "hook_point_in": HOOK_IN, "hook_point_out": HOOK_OUT,
    "n_qk_heads": 4, "d_qk_head": 8, "positional_embedding_type": "rotary", "rotary_dim": 8,
    "rotary_base": 10000, "rotary_adjacent_pairs": False, "rotary_scale": 1,
    "use_NTK_by_parts_rope": False, "NTK_by_parts_factor": 1.0,
    "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 1.0,
    "old_context_len": 2048, "n_ctx": 32, "attn_scale": 8**0.5, "use_post_qk_ln": False,
    "normalization_type": None, "eps": 1e-6,
}  # fmt: skip
"""Every key of a published `config.json`."""

QK_NORM = {"use_post_qk_ln": True, "normalization_type": "RMS", "eps": 1e-2}
NTK = {
    "use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 8.0, "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 4.0, "old_context_len": 64, "rotary_base": 5000,
}  # fmt: skip
PER_DATASET = {"norm_activation": "dataset-wise"}

CONFIGS = {
    "group 16, folded": {},
    "group 16, QK norm, norms per dataset": {**QK_NORM, **PER_DATASET},
    "group 128, NTK, no bias": {
        **NTK, **PER_DATASET, "n_qk_heads": 1, "expansion_factor": 8, "use_decoder_bias": False,
    },
    "group 1, QK norm, NTK": {**QK_NORM, **NTK, "n_qk_heads": 32, "expansion_factor": 2},
    "adjacent pairs, partly rotated, scale": {
        "rotary_adjacent_pairs": True, "rotary_dim": 4, "attn_scale": 1.5, **PER_DATASET,
    },
    "no positions, fractional expansion": {
        "positional_embedding_type": "none", "expansion_factor": 0.75, "n_qk_heads": 3,
    },
    "relu": {"act_fn": "relu", **PER_DATASET},
    "jumprelu": {"act_fn": "jumprelu", **PER_DATASET},
    "jumprelu by z alone": {
        "act_fn": "jumprelu", "sparsity_include_decoder_norm": False, **PER_DATASET,
    },
    "sliding window": {
        "attn_type": "local", "window_size": 3, "rotary_base_local": 100, **QK_NORM,
    },
    "K exceeds the positive heads": {"top_k": 60},
}  # fmt: skip
"""What is set otherwise."""


def config(**changes):
    return {**DEFAULTS, **changes}


def n_heads(cfg):
    return int(cfg["d_model"] * cfg["expansion_factor"])


def tensors(cfg, *, seed=0, n_stored=None, norms=NORMS, dtype=torch.float32):
    """Random weights with every buffer, `n_stored` query-key circuits of them (None: all)."""
    generator = torch.Generator().manual_seed(seed)
    d, n, h = cfg["d_model"], n_heads(cfg), n_stored or cfg["n_qk_heads"]

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    out = {
        "W_Q": normal(h, d, cfg["d_qk_head"], scale=0.4),
        "W_K": normal(h, d, cfg["d_qk_head"], scale=0.4),
        "W_V": normal(n, d, scale=0.3),
        "W_O": normal(n, d, scale=0.3) * torch.rand(n, 1, generator=generator).to(dtype),
        "b_Q": normal(h, cfg["d_qk_head"], scale=0.5),
        "b_K": normal(h, cfg["d_qk_head"], scale=0.5),
        "b_V": normal(n, scale=0.3),
        "mask": torch.ones(cfg["n_ctx"], cfg["n_ctx"], dtype=torch.bool).tril(),
        "IGNORE": torch.tensor(-torch.inf),
    }
    if cfg["use_decoder_bias"]:
        out["b_D"] = normal(d)
    if cfg["use_post_qk_ln"]:
        out["ln_q.w"] = 1 + normal(h, cfg["d_qk_head"], scale=0.3)
        out["ln_k.w"] = 1 + normal(h, cfg["d_qk_head"], scale=0.3)
    if cfg["act_fn"] == "jumprelu":
        out["activation_function.log_jumprelu_threshold"] = normal(n, scale=0.5) - 2
    if cfg["positional_embedding_type"] == "rotary":  # for one context size: not to be relied on
        out["rotary_sin"] = normal(cfg["n_ctx"], cfg["rotary_dim"])
        out["rotary_cos"] = normal(cfg["n_ctx"], cfg["rotary_dim"])
    for hook_point, norm in norms.items():
        out[f"dataset_average_activation_norm.{hook_point}"] = torch.tensor(norm, dtype=dtype)
    return out


def write(folder, cfg, weights, name="sae_weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg, indent=4))
    save_file(weights, folder / f"{name}.safetensors", {"version": "2.0.0b34"})
    return folder


def frequencies(cfg):
    """Radians per position of each rotated pair."""
    base = cfg["rotary_base"]
    if cfg.get("attn_type") == "local":
        base = cfg["rotary_base_local"]
    out = []
    for i in range(cfg["rotary_dim"] // 2):
        frequency = 1 / base ** (2 * i / cfg["rotary_dim"])
        if cfg["use_NTK_by_parts_rope"]:
            low = cfg["NTK_by_parts_low_freq_factor"]
            high, wavelength = cfg["NTK_by_parts_high_freq_factor"], 2 * math.pi / frequency
            if wavelength > cfg["old_context_len"] / low:
                frequency /= cfg["NTK_by_parts_factor"]
            elif wavelength >= cfg["old_context_len"] / high:
                smooth = (cfg["old_context_len"] / wavelength - low) / (high - low)
                slow = frequency / cfg["NTK_by_parts_factor"]
                frequency = (1 - smooth) * slow + smooth * frequency
        out.append(frequency)
    return out


def rotated(x, cfg):
    """Queries or keys of one circuit [batch, pos, d_qk_head], rotated by their positions."""
    out, n = x.clone(), cfg["rotary_dim"] // 2
    for i, frequency in enumerate(frequencies(cfg)):
        a, b = (2 * i, 2 * i + 1) if cfg["rotary_adjacent_pairs"] else (i, i + n)
        for position in range(x.shape[1]):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[:, position, a] = x[:, position, a] * cos - x[:, position, b] * sin
            out[:, position, b] = x[:, position, b] * cos + x[:, position, a] * sin
    return out


def forward(cfg, weights, x, norms=NORMS):
    """Output, codes and pre-activations of raw activations x [batch, pos, d_model], in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, root = x.double(), math.sqrt(cfg["d_model"])
    per_dataset = cfg["norm_activation"] == "dataset-wise"
    if per_dataset:
        x = x * (root / norms[cfg["hook_point_in"]])
    n_qk, group = cfg["n_qk_heads"], n_heads(cfg) // cfg["n_qk_heads"]
    n_copies = n_qk // w["W_Q"].shape[0]
    z = torch.zeros(*x.shape[:2], n_heads(cfg), dtype=torch.float64)
    for circuit in range(n_qk):
        stored = circuit // n_copies
        q = x @ w["W_Q"][stored] + w["b_Q"][stored]
        k = x @ w["W_K"][stored] + w["b_K"][stored]
        if cfg["use_post_qk_ln"]:
            q = q / (q.pow(2).mean(-1, keepdim=True) + cfg["eps"]).sqrt() * w["ln_q.w"][stored]
            k = k / (k.pow(2).mean(-1, keepdim=True) + cfg["eps"]).sqrt() * w["ln_k.w"][stored]
        if cfg["positional_embedding_type"] == "rotary":
            q, k = rotated(q, cfg), rotated(k, cfg)
        heads = slice(circuit * group, (circuit + 1) * group)
        v = x @ w["W_V"][heads].T + w["b_V"][heads]
        for query in range(x.shape[1]):
            first = 0
            if cfg.get("attn_type") == "local":
                first = max(0, query - cfg["window_size"] + 1)
            keys = k[:, first : query + 1]
            scores = (q[:, query, None] * keys).sum(-1) / cfg["attn_scale"]
            pattern = scores.softmax(-1)[:, :, None]
            z[:, query, heads] = (pattern * v[:, first : query + 1]).sum(1)
    code = selected(cfg, z, w)
    out = code @ w["W_O"]
    if cfg["use_decoder_bias"]:
        out = out + w["b_D"]
    if per_dataset:
        out = out * (norms[cfg["hook_point_out"]] / root)
    return out, code, z


def selected(cfg, z, w):
    """z with 0 for every head that does not stay."""
    scores = z * w["W_O"].norm(dim=1) if cfg["sparsity_include_decoder_norm"] else z
    if cfg["act_fn"] == "jumprelu":
        return z * (scores > w["activation_function.log_jumprelu_threshold"].exp())
    positive = scores * (scores > 0)
    if cfg["act_fn"] == "relu":
        return z * (positive > 0)
    stays = torch.zeros_like(z, dtype=torch.bool)
    stays.scatter_(-1, positive.topk(cfg["top_k"], dim=-1).indices, True)
    return z * (stays & (positive > 0))
