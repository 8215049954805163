"""Tiny random models of every kind of attention that TransformerLens has, for all its versions.

Every parameter is random, those included that models start at 0 or 1 (biases, gains of norms), so
that forgetting one of them shows. Nothing is downloaded, and the global random state is left as
it was. `KINDS` has what the installed TransformerLens can build.
"""

import atexit
import copy
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

D_MODEL, N_HEADS, D_VOCAB, N_CTX = 32, 4, 64, 64
BOS, EOS, PAD = 0, 1, 2


@dataclass(frozen=True)
class Kind:
    """A kind of model: `kind.build(torch.float32)` makes one, always the same."""

    name: str
    host: Literal["hooked_transformer", "bridge"]
    build: Callable[[torch.dtype], nn.Module]
    processed: bool = False
    """Whether its weights are folded and centered, as TransformerLens does by default."""
    generates: bool = True
    """Whether it has `generate` (bidirectional models have not)."""


# ---------------------------------------------------------------------------------- tokenizer


@functools.cache
def _tokenizer_dir() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(D_VOCAB - 4))]
    word_level = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    folder = tempfile.mkdtemp(prefix="zoo-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer(padding_side: Literal["left", "right"] = "right") -> Any:
    """A tokenizer of one's own: words `w0` to `w59` are tokens 4 to 63; no BOS is prepended."""
    from transformers import AutoTokenizer

    # From a folder, since a HookedTransformer loads its tokenizer once more, by its path.
    return AutoTokenizer.from_pretrained(_tokenizer_dir(), padding_side=padding_side)


def tokens(batch: int = 2, pos: int = 12, seed: int = 0) -> Tensor:
    """Random tokens [batch, pos], no special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, D_VOCAB, (batch, pos), generator=generator)


# ----------------------------------------------------------------------------------- building


def scramble(parameters: Iterable[tuple[str, nn.Parameter]], seed: int = 0) -> None:
    """Make every parameter random: matrices by themselves, vectors around what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.add_((0.3 * noise).to(parameter.dtype))
            elif name.split(".")[-1].startswith(("b_", "_b_")):
                parameter.copy_((0.3 * noise).to(parameter.dtype))
            else:
                parameter.copy_((0.25 * noise).to(parameter.dtype))


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings that TransformerLens gives while building these models, and nothing else, pass."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        for message, category in (
            (r"Hooked(Transformer|Encoder) is deprecated", DeprecationWarning),
            (r"Olmo2ArchitectureAdapter does not support fold_ln", UserWarning),
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def _config_fields() -> set[str]:
    """What a HookedTransformerConfig has here; empty where the class is gone (4.x)."""
    try:
        from transformer_lens import HookedTransformerConfig
    except ImportError:
        return set()
    return {field.name for field in fields(HookedTransformerConfig)}


def hooked(dtype: torch.dtype, *, processed: bool = False, **changes: Any) -> Any:
    """A HookedTransformer with 2 layers, or as `changes` of its configuration say."""
    from transformer_lens import HookedTransformer

    with quiet():
        model = HookedTransformer(_hooked_config(dtype, **changes), tokenizer=tokenizer())
        scramble(model.named_parameters())
        if processed:
            layer_norm = model.cfg.normalization_type == "LN"
            model.process_weights_(center_writing_weights=layer_norm)
    return model.eval()


def hooked_encoder(dtype: torch.dtype) -> Any:
    """A HookedEncoder (BERT)."""
    from transformer_lens import HookedEncoder

    with quiet():
        cfg = _hooked_config(dtype, attention_dir="bidirectional")
        model = HookedEncoder(cfg, tokenizer=tokenizer(), move_to_device=False)
        scramble(model.named_parameters())
    return model.eval()


def _hooked_config(dtype: torch.dtype, **changes: Any) -> Any:
    from transformer_lens import HookedTransformerConfig

    values: dict[str, Any] = {
        "n_layers": 2, "d_model": D_MODEL, "n_heads": N_HEADS, "d_head": 8, "d_mlp": 48,
        "n_ctx": N_CTX, "d_vocab": D_VOCAB, "act_fn": "gelu", "device": "cpu", "dtype": dtype,
        "init_weights": False,
    }  # fmt: skip
    return HookedTransformerConfig(**{**values, **changes})


def bridge(
    dtype: torch.dtype, family: str, *, processed: bool = False, seed: int = 0, **changes: Any
) -> Any:
    """A TransformerBridge around a random Hugging Face model, or a native one.

    Args:
        dtype: of the whole model.
        family: as `GPT2` (of GPT2Config), or `native`.
        processed: call `enable_compatibility_mode`.
        seed: for the parameters.
        **changes: of the configuration.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        if family == "native":
            model = TransformerBridge.boot_native(
                _native_config(**changes), tokenizer=tokenizer(), device="cpu", dtype=dtype
            )
            scramble(model.original_model.named_parameters(), seed)
        else:
            wrapped = hugging_face(dtype, family, seed=seed, **changes)
            if processed:
                # TransformerLens 3.9 leaves a model that it is given on sdpa: see both.
                wrapped.set_attn_implementation("eager")
            model = boot(wrapped)
        if processed:
            model.enable_compatibility_mode()
            if any(parameter.dtype != dtype for parameter in model.parameters()):
                model.to(dtype, print_details=False)  # 3.9 leaves biases that it adds in float32
    return model.eval()


def boot(wrapped: Any) -> Any:
    """A TransformerBridge around a Hugging Face model."""
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        return TransformerBridge.boot_transformers(
            "tiny", hf_model=wrapped, tokenizer=tokenizer(), device="cpu", dtype=wrapped.dtype
        )


def _native_config(rope_scaling: dict[str, Any] | None = None, **changes: Any) -> Any:
    from transformer_lens.config import TransformerBridgeConfig

    config = TransformerBridgeConfig.from_dict({**_NATIVE, **changes})
    config.rope_scaling = copy.deepcopy(
        rope_scaling
    )  # no field of the configuration, yet read from it
    return config


def hugging_face(dtype: torch.dtype, family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random Hugging Face model for causal language modelling."""
    import transformers

    config_name, model_name, values = _HUGGING_FACE[family]
    # Configurations keep, and change, the dictionaries that they are given.
    config = getattr(transformers, config_name)(**copy.deepcopy({**values, **changes}))
    model = getattr(transformers, model_name)(config).eval().to(dtype)
    scramble(model.named_parameters(), seed)
    model.config.architectures = [model_name]
    return model


# ------------------------------------------------------------------------------------- models

_ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary"}
_LLAMA: dict[str, Any] = {
    **_ROTARY, "normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "act_fn": "silu",
    "n_key_value_heads": 2, "d_head": 12,
}  # fmt: skip
_LOCAL: dict[str, Any] = {"use_local_attn": True, "window_size": 5}
_HOOKED: dict[str, dict[str, Any]] = {
    "learned": {},
    "attn-only": {"attn_only": True, "d_mlp": None, "act_fn": None},
    "rotary": {**_ROTARY},
    "rotary-partial": {**_ROTARY, "d_head": 12, "rotary_dim": 4, "rotary_base": 1000},
    "rotary-adjacent": {
        **_ROTARY, "rotary_dim": 4, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True,
    },
    "rotary-linear": {**_ROTARY, "rotary_scaling_factor": 4.0},
    "rotary-yarn": {
        **_LLAMA, "use_yarn_rope": True, "yarn_factor": 4.0, "yarn_attention_factor": 1.2,
        "yarn_original_max_position_embeddings": N_CTX,
    },
    "llama": {
        **_LLAMA, "use_NTK_by_parts_rope": True, "NTK_original_ctx_len": N_CTX,
    },
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi"},
    "qk-norm": {**_LLAMA, "use_qk_norm": True},
    "olmo2": {**_LLAMA, "d_head": 8, "original_architecture": "Olmo2ForCausalLM"},
    "gemma2": {
        **_LLAMA, **_LOCAL, "attn_types": ["local", "global"], "attn_scores_soft_cap": 2.0,
        "use_normalization_before_and_after": True, "attn_scale": 4.0,
    },
    "gemma3": {
        **_LLAMA, **_LOCAL, "n_layers": 3, "attn_types": ["local", "global", "local"],
        "use_qk_norm": True, "rotary_base": 10000, "rotary_base_local": 100,
        "use_normalization_before_and_after": True,
    },
    "window": {**_LLAMA, **_LOCAL, "attn_types": ["local", "local"]},
    "bidirectional": {"attention_dir": "bidirectional"},
    "inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True},
    "gpt-neo": {**_LOCAL, "use_attn_scale": False, "attn_types": ["global", "local"]},
}  # fmt: skip
"""HookedTransformers, by what is set otherwise than in a small GPT-2."""

_HOOKED_NEEDS = {"olmo2": "clip_qkv", "rotary-linear": "rotary_scaling_factor"}
"""A field of the configuration that came with what a model needs, where its own do not tell."""

_COMMON: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX, "intermediate_size": 48,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_OLD: dict[str, Any] = {
    "vocab_size": D_VOCAB, "n_embd": D_MODEL, "n_layer": 2, "n_head": N_HEADS,
    "n_positions": N_CTX, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_WIDE: dict[str, Any] = {**_GROUPED, "head_dim": 12}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": N_CTX,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", _OLD),
    "GPTNeoX": (
        "GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "rope_parameters": _HALF_ROTARY},
    ),
    "GPTJ": ("GPTJConfig", "GPTJForCausalLM", {**_OLD, "rotary_dim": 4}),
    "GPTNeo": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_layers": 2, "num_heads": N_HEADS,
        "max_position_embeddings": N_CTX, "intermediate_size": 48, "window_size": 5,
        "attention_types": [[["global", "local"], 1]], "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": PAD,
    }),
    "OPT": ("OPTConfig", "OPTForCausalLM", {
        **_COMMON, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL,
    }),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {**_WIDE, "rope_parameters": _LLAMA3}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**_WIDE, "sliding_window": 5}),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", _WIDE),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        **_WIDE, "sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **_WIDE, "num_hidden_layers": 3, "layer_types": _SLIDING, "sliding_window": 5,
        "query_pre_attn_scalar": 16, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {
        **_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    }),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _WIDE),
    "Olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "Phi": ("PhiConfig", "PhiForCausalLM", {
        **_COMMON, "num_key_value_heads": N_HEADS, "rope_parameters": _HALF_ROTARY,
    }),
    "Starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**_GROUPED, "sliding_window": 5}),
}  # fmt: skip
"""Hugging Face models: configuration class, model class, configuration."""

_NATIVE: dict[str, Any] = {
    "n_layers": 2, "d_model": D_MODEL, "n_heads": N_HEADS, "d_head": 12, "d_mlp": 48,
    "n_ctx": N_CTX, "d_vocab": D_VOCAB, "act_fn": "gelu", "normalization_type": "LN",
    "positional_embedding_type": "standard", "seed": 0,
}  # fmt: skip
_NATIVE_ROTARY: dict[str, Any] = {
    **_ROTARY, "normalization_type": "RMS", "n_key_value_heads": 2, "rotary_dim": 8,
    "attn_scores_soft_cap": 2.0, "rope_scaling": _LLAMA3,
}  # fmt: skip


# -------------------------------------------------------------------------------------- kinds


def _hooked_kinds() -> Iterator[Kind]:
    known = _config_fields()
    for name, changes in _HOOKED.items():
        if not known or not known >= {*changes, _HOOKED_NEEDS.get(name, "d_model")}:
            continue
        both_ways = changes.get("attention_dir") == "bidirectional"
        build = functools.partial(hooked, **changes)
        yield Kind(name, "hooked_transformer", build, generates=not both_ways)
        if name in ("learned", "rotary-adjacent", "llama", "gemma2"):
            build = functools.partial(hooked, processed=True, **changes)
            yield Kind(f"{name}-processed", "hooked_transformer", build, processed=True)
    if known:
        yield Kind("bert", "hooked_transformer", hooked_encoder, generates=False)


def _bridge_kinds() -> Iterator[Kind]:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return
    if not hasattr(TransformerBridge, "boot_native"):  # before 3.9
        return
    models: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in _HUGGING_FACE}
    models["native"] = ("native", {})
    models["native-rotary"] = ("native", _NATIVE_ROTARY)
    models["native-bidirectional"] = ("native", {"attention_dir": "bidirectional"})
    models["gpt2-inverse-layer-scale"] = ("GPT2", {"scale_attn_by_inverse_layer_idx": True})
    models["llama-yarn"] = ("Llama", {"rope_parameters": _YARN})
    for name, (family, changes) in models.items():
        for processed in (False, True):
            build = functools.partial(bridge, family=family, processed=processed, **changes)
            full_name = f"bridge-{name.lower()}" + "-processed" * processed
            generates = changes.get("attention_dir") != "bidirectional"
            yield Kind(full_name, "bridge", build, processed=processed, generates=generates)


KINDS: list[Kind] = [*_hooked_kinds(), *_bridge_kinds()]
"""Every kind of model that the installed TransformerLens can build.

Left out, since TransformerLens itself fails on them (3.9 and 4.3 alike): OPT that normalizes after
attention (OPT-350m: any hook on `ln2` makes the next layer raise, so `run_with_cache` does), and
Phi with qk_layernorm (refused at boot). All others bear `enable_compatibility_mode`; in 3.9 a
float64 GPT-J, GPT-Neo or Qwen 2 must be cast to float64 again after it, which `bridge` does.
"""

kind_params = [pytest.param(kind, id=kind.name) for kind in KINDS]
"""For `@pytest.mark.parametrize("kind", kind_params)`."""


def by_name(name: str) -> Kind:
    """The kind of that name; a test that needs it is skipped where it cannot be built."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    pytest.skip(f"the installed TransformerLens has no {name}")


def lacks(name: str) -> bool:
    """Whether the installed TransformerLens cannot build the kind of that name."""
    return all(kind.name != name for kind in KINDS)
