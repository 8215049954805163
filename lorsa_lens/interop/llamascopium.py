"""The Llamascopium (lm-saes) layout, in which the published Lorsas are: read and written.

A folder holds `config.json` (`sae_type: "lorsa"`) and `sae_weights` as safetensors (whole or in
shards), as a PyTorch file or as a distributed checkpoint. What that layout computes is this, with
`s_in = sqrt(d_model) / norm_in` and `s_out = sqrt(d_model) / norm_out` for norms per dataset, or 1:

    q = rot(rms(s_in x W_Q + b_Q)),  k alike,  A = softmax(causal(q k^T / attn_scale))
    z_pre^i = sum_k A^h(i) (s_in x w_V^i + b_V^i)
    z = the top_k largest relu(z_pre^i) ||w_O^i|| stay  (or relu, or JumpReLU of z_pre^i ||w_O^i||)
    out = (sum_i z^i w_O^i + b_D) / s_out

The scales are folded into the weights when read, so a loaded Lorsa works on raw activations.
"""

import json
import math
from pathlib import Path

import torch
from einops import repeat
from safetensors.torch import save_file
from torch import Tensor

from lorsa_lens import __version__
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.interop.llamascopium_config import (
    LlamascopiumConfig,
    exported_config,
    understand,
)
from lorsa_lens.interop.scales import fold_scales
from lorsa_lens.io.atomic import atomic_write
from lorsa_lens.io.dcp import DCPSource
from lorsa_lens.io.sources import (
    DTYPES,
    LoadError,
    SafetensorsSource,
    TensorSource,
    load_weights_only,
    only_tensors,
    read_json,
)
from lorsa_lens.io.weights import check_finite, load_weights
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.validation import ConfigError

STEMS = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
"""Where weights are looked for, in this order."""

NAMES = {
    "b_O": "b_D",
    "q_norm": "ln_q.w",
    "k_norm": "ln_k.w",
    "log_threshold": "activation_function.log_jumprelu_threshold",
}
"""Their names of our tensors, where they differ."""

BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""Tables for one context size, which follow from the configuration."""

NORM = "dataset_average_activation_norm."
"""Before the name of a hook point: the mean norm of its activations."""

PLAUSIBLE_NORMS = (1e-6, 1e6)
"""Where a norm lies that was ever set; others are what lay in uninitialised memory."""


def load_llamascopium(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Lorsa:
    """Load a Lorsa in this layout.

    Args:
        folder: holds `config.json` and the weights.
        device: where it goes.
        dtype: precision to convert to. None: as saved.

    Raises:
        FileNotFoundError: if there are no weights.
        LoadError: if the files are damaged, or mean something that a Lorsa cannot do.
    """
    values = read_json(folder / "config.json")
    try:
        theirs, cfg = understand(values)
    except ConfigError as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from None
    source = find_weights(folder)
    if "W_O" not in source.headers or source.headers["W_O"].dtype not in DTYPES:
        raise LoadError(f"{source.path} holds no floating-point W_O: no Lorsa's weights")
    dtype = dtype or DTYPES[source.headers["W_O"].dtype]
    x, out = _scales(theirs, source)
    lorsa = load_weights(
        cfg.replace(dtype=str(dtype).removeprefix("torch.")),
        source,
        device=device,
        names=NAMES,
        copies=_copies(theirs, source),
        zeros=frozenset() if theirs.use_decoder_bias else frozenset({"b_O"}),
        ignored=[name for name in source.headers if name in BUFFERS or name.startswith(NORM)],
    )
    if not theirs.sparsity_include_decoder_norm:
        _weigh_by_norms(lorsa, source)
    fold_scales(lorsa, x=x, out=out)
    return lorsa


def find_weights(folder: Path) -> TensorSource:
    """The weights in a folder, whatever form they have.

    Raises:
        FileNotFoundError: if there are none.
        LoadError: if they are damaged.
    """
    for stem in STEMS:
        for suffix in (".safetensors", ".safetensors.index.json"):
            if (folder / f"{stem}{suffix}").is_file():
                return SafetensorsSource(folder / f"{stem}{suffix}")
        if (path := folder / f"{stem}.pt").is_file():
            values = load_weights_only(path)
            return only_tensors(path, values.get("sae") if isinstance(values, dict) else values)
        if (path := folder / f"{stem}.dcp").is_dir():
            return DCPSource(path)
    raise FileNotFoundError(
        f"{folder} holds no weights: looked for sae_weights, checkpoints/pruned and "
        "checkpoints/final, each as .safetensors (or its .index.json), .pt or .dcp"
    )


def _copies(theirs: LlamascopiumConfig, source: TensorSource) -> dict[str, int]:
    """How often query-key weights are repeated: a file may hold fewer circuits than there are."""
    header = source.headers.get("W_Q")
    n_stored = header.shape[0] if header is not None and header.shape else theirs.n_qk_heads
    if not n_stored or theirs.n_qk_heads % n_stored:
        raise LoadError(
            f"{source.path} holds {n_stored} query-key circuits, of which n_qk_heads = "
            f"{theirs.n_qk_heads} in config.json is no multiple"
        )
    names = ("W_Q", "W_K", "b_Q", "b_K", "q_norm", "k_norm")
    return dict.fromkeys(names, theirs.n_qk_heads // n_stored)


def _scales(theirs: LlamascopiumConfig, source: TensorSource) -> tuple[float, float]:
    """What their encoder's input and decoder's output are multiplied by."""
    if theirs.norm_activation == "inference":
        return 1.0, 1.0
    root = math.sqrt(theirs.d_model)
    x, out = (_norm(source, name) for name in (theirs.hook_point_in, theirs.hook_point_out))
    return root / x, root / out


def _norm(source: TensorSource, hook_point: str) -> float:
    name, (lowest, highest) = NORM + hook_point, PLAUSIBLE_NORMS
    advice = (
        'norm_activation = "dataset-wise" needs it. Ask for a checkpoint that was saved after the '
        "norms were measured, or with fold_activation_scale=True; if its weights work on raw "
        'activations already, set norm_activation to "inference" in config.json'
    )
    header = source.headers.get(name)
    if header is None or header.shape != () or header.dtype not in DTYPES:
        raise LoadError(f"{source.path} holds no number {name}, but {advice}")
    value = float(source.read(name, ...))
    if not lowest <= value <= highest:
        raise LoadError(f"{source.path}: {name} is {value}, so it was never set, but {advice}")
    return value


@torch.no_grad()
def _weigh_by_norms(lorsa: Lorsa, source: TensorSource) -> None:
    """From a selection by z alone to the same one by `z ||w_O||`, where there is one.

    Raises:
        LoadError: if writing norms differ, and heads are ranked: that changes which ones stay.
    """
    norms = writing_norms(lorsa.W_O)
    if lorsa.cfg.act_fn == "jumprelu":
        lorsa.log_threshold.add_(norms.log())
    elif lorsa.cfg.k is not None and not torch.allclose(norms, norms.mean(), rtol=1e-5):
        raise LoadError(
            f"{source.path}: sparsity_include_decoder_norm is false, so heads are ranked by z "
            "alone, but their writing norms differ: a Lorsa ranks by z * ||w_O||"
        )


# ------------------------------------------------------------------------------------- export


def save_llamascopium(lorsa: Lorsa, folder: str | Path, *, n_ctx: int = 2048) -> Path:
    """Write a Lorsa as `config.json` and `sae_weights.safetensors` that Llamascopium reads.

    Scales are folded already (`norm_activation: "inference"`). The configuration also holds ours,
    which others ignore, so that `Lorsa.from_pretrained` gives back the same Lorsa. Rotary
    frequencies that no field of that layout gives are in its tables, up to `n_ctx`.

    Args:
        lorsa: what to write; its layer must be set.
        folder: where to.
        n_ctx: longest context that Llamascopium will run it on: it stores tables of that size.

    Raises:
        ConfigError: if that layout cannot say what the Lorsa computes; the message says what can
            be done.
        ValueError: if a weight is not finite; nothing is written then.

    Returns:
        The folder.
    """
    if n_ctx < 1:
        raise ConfigError(f"n_ctx = {n_ctx}: at least 1")
    values = exported_config(lorsa.cfg, n_ctx)
    tensors = {}
    for name, tensor in lorsa.state_dict().items():
        check_finite(name, tensor, "not saved")
        tensors[NAMES.get(name, name)] = tensor.contiguous()
    tensors |= _tables(lorsa, n_ctx)
    unit_norm = torch.tensor(math.sqrt(lorsa.cfg.d_model), dtype=lorsa.W_O.dtype)
    for hook_point in (values["hook_point_in"], values["hook_point_out"]):
        tensors[NORM + hook_point] = unit_norm.clone()
    folder = Path(folder)
    with (
        atomic_write(folder / "config.json") as new_config,
        atomic_write(folder / "sae_weights.safetensors") as new_weights,
    ):
        new_config.write_text(json.dumps(values, indent=4, allow_nan=False), encoding="utf-8")
        save_file(tensors, new_weights, metadata={"version": f"lorsa_lens {__version__}"})
    return folder


def _tables(lorsa: Lorsa, n_ctx: int) -> dict[str, Tensor]:
    """The buffers that Llamascopium expects among the weights."""
    cfg, like = lorsa.cfg, lorsa.W_O
    mask = torch.ones(n_ctx, n_ctx, dtype=torch.bool, device=like.device).tril()
    if cfg.window_size is not None:
        mask = mask.triu(1 - cfg.window_size)
    tables = {"mask": mask, "IGNORE": torch.tensor(-torch.inf, device=like.device)}
    if cfg.rotated_dim:
        pairs = "p pair -> p (pair two)" if cfg.rotary_adjacent_pairs else "p pair -> p (two pair)"
        cos, sin = lorsa._angles(torch.arange(n_ctx, device=like.device)[None])
        tables["rotary_cos"] = repeat(cos[0], pairs, two=2).to(like).contiguous()
        tables["rotary_sin"] = repeat(sin[0], pairs, two=2).to(like).contiguous()
    return tables


@torch.no_grad()
def split_signs(lorsa: Lorsa) -> Lorsa:
    """The same Lorsa with positive activations only: head i becomes heads 2i and 2i + 1.

    The first reads and writes as head i does, the second both with the opposite sign, so that one
    of them is positive whenever head i is active, whatever its sign. Their ranks are those of
    `|z| * ||w_O||`. So `topk` becomes `topk_relu` (or `relu`, where all heads stay), exactly.

    Raises:
        ConfigError: if `act_fn` is not `topk`.
    """
    cfg = lorsa.cfg
    if cfg.act_fn != "topk":
        raise ConfigError(f"act_fn = {cfg.act_fn!r}: only the signs of 'topk' are split")
    act_fn = "relu" if cfg.k is None else "topk_relu"
    new_cfg = cfg.replace(act_fn=act_fn, n_ov_heads=2 * cfg.n_ov_heads)
    positive = Lorsa(new_cfg, device=lorsa.W_O.device)
    positive.to(lorsa.W_O.dtype)
    for name, tensor in lorsa.state_dict().items():
        if name in ("W_V", "W_O", "b_V"):
            tensor = torch.stack((tensor, -tensor), dim=1).flatten(0, 1)
        getattr(positive, name).copy_(tensor)
    return positive
