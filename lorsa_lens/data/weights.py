"""Recognize a model by its weights."""

import hashlib

import torch
from torch import nn

SAMPLED = 256
"""Entries of each parameter that are looked at."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A short name for the weights of a model, which changes with any of its parameters.

    Of every parameter, name, shape and `SAMPLED` evenly spaced entries are hashed (in float32), so
    it costs little for a model of any size. Another class of host, folded weights or another
    precision of the same model give another fingerprint: the activations differ, too.

    Args:
        model: any module.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        entries = flat[::step][:SAMPLED].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()[:16]
