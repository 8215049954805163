"""What is read from a host's attention layer reproduces that layer, by an independent attention."""

import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lorsa_lens.config import AttentionSpec
from lorsa_lens.hosts import read_bridge, read_hooked
from lorsa_lens.hosts.base import AttentionWeights, UnsupportedAttentionError
from lorsa_lens.hosts.reading import frequencies_unless_plain, table_frequencies


def naive_attention(weights: AttentionWeights, x: Tensor, qk_input: Tensor | None = None) -> Tensor:
    """Attention as the spec says it, densely, with nothing of lorsa_lens in it.

    Args:
        weights: what was read.
        x: what the attention module receives [batch, pos, d_model].
        qk_input: what queries and keys read, where that is not `x`.
    """
    spec, n = weights.spec, x.shape[1]
    qk_input = x if qk_input is None else qk_input
    q = torch.einsum("bpm,hmd->bhpd", qk_input, weights.W_Q) + weights.b_Q[:, None]
    k = torch.einsum("bpm,hmd->bhpd", qk_input, weights.W_K) + weights.b_K[:, None]
    v = torch.einsum("bpm,hmd->bhpd", x, weights.W_V) + weights.b_V[:, None]
    if spec.qk_norm is not None:
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        dims = 3 if spec.qk_norm == "head" else (1, 3)
        q = q / (q.pow(2).mean(dims, keepdim=True) + spec.qk_norm_eps).sqrt()
        k = k / (k.pow(2).mean(dims, keepdim=True) + spec.qk_norm_eps).sqrt()
        q, k = q * weights.q_norm[:, None], k * weights.k_norm[:, None]
    if spec.positional_embedding_type == "rotary":
        q, k = naive_rotation(q, weights), naive_rotation(k, weights)
    scores = q @ k.transpose(2, 3) / (spec.attn_scale or math.sqrt(q.shape[-1]))
    if spec.attn_scores_soft_cap is not None:
        scores = torch.tanh(scores / spec.attn_scores_soft_cap) * spec.attn_scores_soft_cap
    for query in range(n):
        for key in range(n):
            if spec.alibi_slopes is not None and key < query:
                slopes = torch.tensor(spec.alibi_slopes, dtype=x.dtype)
                scores[:, :, query, key] -= slopes * (query - key)
            ahead = spec.attention_dir == "causal" and key > query
            if ahead or (spec.window_size is not None and key <= query - spec.window_size):
                scores[:, :, query, key] = -math.inf
    z = scores.softmax(dim=-1) @ v
    return torch.einsum("bhpd,hdm->bpm", z, weights.W_O) + weights.b_O


def naive_rotation(q: Tensor, weights: AttentionWeights) -> Tensor:
    """Rotate each pair of dimensions by position times its frequency."""
    spec = weights.spec
    n = q.shape[-1] if spec.rotary_dim is None else spec.rotary_dim
    frequencies = spec.rotary_frequencies
    if frequencies is None:
        frequencies = tuple(spec.rotary_base ** (-2 * i / n) for i in range(n // 2))
    dtype = torch.float64 if spec.rotary_dtype == "float64" else torch.float32
    rotated = q.clone()
    for i, frequency in enumerate(frequencies):
        first, second = (2 * i, 2 * i + 1) if spec.rotary_adjacent_pairs else (i, i + n // 2)
        angle = torch.arange(q.shape[2], dtype=dtype) * torch.tensor(frequency, dtype=dtype)
        cos = (angle.cos() * spec.rotary_scale).to(q.dtype)
        sin = (angle.sin() * spec.rotary_scale).to(q.dtype)
        rotated[..., first] = q[..., first] * cos - q[..., second] * sin
        rotated[..., second] = q[..., second] * cos + q[..., first] * sin
    return rotated


# ------------------------------------------------------------------------ reproducing the host

ENDS = ("in", "out")


def captured_calls(kind: zoo.Kind, model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """What each layer's attention received (`x`, `qk`) and returned (`out`); its `resid_pre`."""
    calls: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    with torch.no_grad():
        if kind.host == "hooked_transformer":
            for block, call in zip(model.blocks, calls, strict=True):
                block.attn.forward = recording(block.attn.forward, call)
        _, cache = model.run_with_cache(tokens)
    for i, (block, call) in enumerate(zip(model.blocks, calls, strict=True)):
        call["resid_pre"] = cache[f"blocks.{i}.hook_resid_pre"]
        if kind.host == "bridge":
            call["x"], call["out"] = (cache[f"blocks.{i}.attn.hook_{end}"] for end in ENDS)
            call["qk"] = call["x"]
        else:
            del block.attn.forward
    return calls


def recording(forward: Any, call: dict[str, Tensor]) -> Any:
    """A `forward` of a HookedTransformer's attention that notes what passes."""

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(("query_input", "key_input", "value_input"), args, strict=False)) | kwargs
        call["qk"], call["x"] = given["query_input"], given["value_input"]
        assert torch.equal(given["query_input"], given["key_input"])
        call["out"] = forward(*args, **kwargs)
        return call["out"]

    return wrapper


def reader(kind: zoo.Kind) -> Any:
    return read_bridge if kind.host == "bridge" else read_hooked


EXACT = 1e-12
ROUNDED_TABLE = 1e-7
"""Weight processing in TransformerLens 3.x rounds a float64 model to float32, its table of sines
and cosines included."""
FLOAT32_SOFTMAX = 5e-7
"""The softmax is taken in float32."""
FLOAT32_SCORES = 2e-6
"""Queries and keys are cast to float32 before the scores."""
FLOAT64_TOLERANCE = {
    "rotary-adjacent-processed": ROUNDED_TABLE,
    "llama-processed": ROUNDED_TABLE,
    "gemma2-processed": ROUNDED_TABLE,
    **dict.fromkeys(("bridge-gptj", "bridge-gptneo"), FLOAT32_SCORES),
    "bridge-opt": FLOAT32_SOFTMAX,  # exact where TransformerLens leaves it on sdpa
    **dict.fromkeys(("bridge-llama", "bridge-llama-yarn", "bridge-mistral"), FLOAT32_SOFTMAX),
    **dict.fromkeys(("bridge-gemma", "bridge-gemma2", "bridge-gemma3"), FLOAT32_SOFTMAX),
    **dict.fromkeys(("bridge-qwen2", "bridge-qwen3", "bridge-olmo2"), FLOAT32_SOFTMAX),
    **dict.fromkeys(("bridge-phi", "bridge-starcoder2"), FLOAT32_SOFTMAX),
}
"""Models in float64: by how much the naive attention may differ from the host, as a share of the
largest output. What is not named computes in float64: sines and cosines of rotary positions too
in a HookedTransformer; of float32 angles in a bridge, which are read as such."""


def tolerance(kind: zoo.Kind, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 2e-5
    unprocessed = kind.name.removesuffix("-processed")
    named = FLOAT64_TOLERANCE.get(kind.name) or FLOAT64_TOLERANCE.get(unprocessed)
    return named or EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", zoo.kind_params)
def test_what_is_read_reproduces_the_layer(kind: zoo.Kind, dtype: torch.dtype) -> None:
    model = kind.build(dtype)
    for layer, call in enumerate(captured_calls(kind, model, zoo.tokens(batch=2, pos=24))):
        weights = reader(kind).read_attention(model, layer)
        out = naive_attention(weights, call["x"], call["qk"])
        error = float((out - call["out"]).abs().max() / call["out"].abs().max())
        assert out.dtype == dtype
        assert error < tolerance(kind, dtype), f"layer {layer}: {error}"


QUARTERS = (0.25, 0.025, 0.0025, 0.00025)
SPECS: list[tuple[str, int, dict[str, Any]]] = [
    ("rotary", 0, {"rotary_dim": None, "rotary_base": 10000.0, "rotary_frequencies": None}),
    ("rotary-partial", 0, {"rotary_dim": 4, "rotary_base": 1000.0, "attn_scale": 12**0.5}),
    ("rotary-linear", 0, {"rotary_frequencies": pytest.approx(QUARTERS), "rotary_scale": 1.0}),
    ("rotary-yarn", 0, {"rotary_scale": 1.2}),
    ("alibi", 0, {"alibi_slopes": (0.25, 0.0625, 0.015625, 0.00390625)}),
    ("gemma3", 0, {"rotary_base": 100.0, "rotary_frequencies": None, "window_size": 5}),
    ("gemma3", 1, {"rotary_base": 10000.0, "rotary_frequencies": None, "window_size": None}),
    ("inverse-layer-scale", 1, {"attn_scale": 2 * 8**0.5}),
    ("gpt-neo", 1, {"attn_scale": 1.0, "window_size": 5}),
    ("olmo2", 0, {"qk_norm": "full", "qk_norm_eps": 1e-5}),
    ("bridge-gpt2", 0, {"positional_embedding_type": "standard", "attn_scale": 8**0.5}),
    ("bridge-gptj", 0, {"rotary_dim": 4, "rotary_adjacent_pairs": True}),
    ("bridge-gptj", 0, {"rotary_base": 10000.0, "rotary_frequencies": None}),
    ("bridge-gemma3", 0, {"rotary_base": 100.0, "rotary_frequencies": None, "window_size": 5}),
    ("bridge-gemma3", 1, {"window_size": None, "qk_norm": "head", "qk_norm_eps": 1e-6}),
    ("bridge-gemma2", 0, {"attn_scores_soft_cap": 2.0, "attn_scale": 4.0, "window_size": 5}),
    ("bridge-llama-yarn", 0, {"rotary_scale": pytest.approx(0.1 * math.log(4.0) + 1)}),
    ("bridge-native-bidirectional", 0, {"attention_dir": "bidirectional"}),
]
"""Fields of specs, from the configurations in the zoo."""


@pytest.mark.parametrize(("name", "layer", "expected"), SPECS)
def test_specs_say_what_the_configuration_says(
    name: str, layer: int, expected: dict[str, Any]
) -> None:
    kind = zoo.by_name(name)
    spec = asdict(reader(kind).read_attention(kind.build(torch.float32), layer).spec)
    assert {field: spec[field] for field in expected} == {
        field: pytest.approx(value) if isinstance(value, float) else value
        for field, value in expected.items()
    }


def test_every_field_of_a_spec_changes_some_model() -> None:
    """The zoo has a model on which forgetting the field, whichever, shows."""
    defaults = asdict(AttentionSpec())
    matters: dict[str, float] = dict.fromkeys(defaults, 0.0)
    x = torch.randn(1, 24, zoo.D_MODEL, generator=torch.Generator().manual_seed(0)).double()
    for kind in zoo.KINDS:
        model = kind.build(torch.float64)
        for layer in range(len(model.blocks)):
            weights = reader(kind).read_attention(model, layer)
            out = naive_attention(weights, x)
            for name, default in defaults.items():
                if getattr(weights.spec, name) == default or name == "positional_embedding_type":
                    continue
                spec = replace(weights.spec, **{name: default})
                change = naive_attention(replace(weights, spec=spec), x) - out
                matters[name] = max(matters[name], float(change.abs().max()))
    del matters["positional_embedding_type"]  # the tests above would fail
    if not any(kind.host == "hooked_transformer" for kind in zoo.KINDS):
        for name in ("alibi_slopes", "rotary_dtype"):  # no bridge has them
            assert matters.pop(name) == 0
    if zoo.lacks("rotary-yarn") and zoo.lacks("bridge-llama-yarn"):
        assert matters.pop("rotary_scale") == 0
    too_little = {name: change for name, change in matters.items() if change < 1e-9}
    assert not too_little


ONE_OF_EACH = ["learned", "llama", "olmo2", "bert", "bridge-gpt2", "bridge-qwen3", "bridge-native"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_weights_are_copies(name: str) -> None:
    model = (kind := zoo.by_name(name)).build(torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = reader(kind).read_attention(model, 1)
    for field in fields(AttentionWeights):
        tensor = getattr(weights, field.name)
        if isinstance(tensor, Tensor):
            assert not tensor.requires_grad
            tensor.add_(1.0)
    norm = reader(kind).input_norm(model, 1)
    for tensor in norm or ():
        tensor.add_(1.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------- norms and layers

NORMALIZES_AFTER = {"olmo2", "bert", "bridge-olmo2"}
"""Models whose attention receives the residual stream as it is."""


@pytest.mark.parametrize("kind", zoo.kind_params)
def test_input_norm_is_between_the_normalized_residual_stream_and_attention(
    kind: zoo.Kind,
) -> None:
    model = kind.build(torch.float32)
    after = kind.name.removesuffix("-processed") in NORMALIZES_AFTER
    rms = str(model.cfg.normalization_type).startswith("RMS")
    for layer, call in enumerate(captured_calls(kind, model, zoo.tokens())):
        norm = reader(kind).input_norm(model, layer)
        assert (norm is None) == (kind.processed or after)
        expected = call["resid_pre"]
        if not after:
            centered = expected if rms else expected - expected.mean(dim=-1, keepdim=True)
            mean_square = centered.pow(2).mean(dim=-1, keepdim=True)
            expected = centered / (mean_square + model.cfg.eps).sqrt()
        if norm is not None:
            expected = expected * norm[0] + norm[1]
        torch.testing.assert_close(call["x"], expected, rtol=2e-5, atol=2e-5)


def test_an_opt_that_normalizes_after_attention_has_no_input_norm() -> None:
    zoo.by_name("bridge-opt")
    model = zoo.bridge(torch.float32, "OPT", do_layer_norm_before=False, word_embed_proj_dim=16)
    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_in"]
    _, cache = model.run_with_cache(zoo.tokens(), names_filter=lambda name: name in names)
    assert torch.equal(*(cache[name] for name in names))
    assert read_bridge.input_norm(model, 1) is None


def test_post_norm_of_a_hooked_transformer() -> None:
    for name, attribute in (("gemma2", "ln1_post"), ("olmo2", "ln1"), ("learned", None)):
        kind = zoo.by_name(name)
        block = (model := kind.build(torch.float32)).blocks[1]
        expected = None if attribute is None else getattr(block, attribute)
        assert read_hooked.post_norm(model, 1) is expected


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_layer_that_is_not_there(name: str) -> None:
    model: Any = (kind := zoo.by_name(name)).build(torch.float32)
    last = len(model.blocks) - 1
    for layer in (-1, last + 1):
        message = f"layer = {layer}: the model has layers 0 to {last}"
        with pytest.raises(ValueError, match=message):
            reader(kind).read_attention(model, layer)
        with pytest.raises(ValueError, match=message):
            reader(kind).input_norm(model, layer)


# --------------------------------------------------------------------------------- frequencies


def test_frequencies_are_read_from_a_rounded_table() -> None:
    frequencies = torch.tensor([1.0, 0.7, 0.01, 1e-5], dtype=torch.float64)
    angles = torch.arange(1000, dtype=torch.float64)[:, None] * frequencies
    read = table_frequencies(angles.sin().float(), angles.cos().float())
    # The angle at position 512 is right to 1e-7, so these are to 2e-10.
    torch.testing.assert_close(read, frequencies, rtol=0.0, atol=3e-10)
    shortest = table_frequencies(angles[:2].sin(), angles[:2].cos())
    torch.testing.assert_close(shortest, frequencies, rtol=1e-14, atol=0.0)


def test_frequencies_of_the_plain_series_are_left_out() -> None:
    plain = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert frequencies_unless_plain(plain, 10000.0, 64, eps=1e-12) is None
    nearly = plain * (1 + 1e-10)
    assert frequencies_unless_plain(nearly, 10000.0, 64, eps=1e-7) is None
    assert frequencies_unless_plain(nearly, 10000.0, 64, eps=1e-12) == tuple(nearly.tolist())
    assert frequencies_unless_plain(plain / 2, 10000.0, 64, 1e-7) == (0.5, 0.05, 0.005, 0.0005)


def test_a_model_cast_to_float64_keeps_its_float32_angles() -> None:
    zoo.by_name("rotary")
    model = zoo.hooked(torch.float32, positional_embedding_type="rotary")
    model.to(torch.float64)
    assert read_hooked.read_attention(model, 0).spec.rotary_dtype == "float32"
    model = zoo.hooked(torch.float64, positional_embedding_type="rotary")
    assert read_hooked.read_attention(model, 0).spec.rotary_dtype == "float64"


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("load_in_4bit", True, "quantized to 4 bits .*: load the model without load_in_4bit"),
        ("use_attention_sinks", True, "part of every softmax goes to a learned logit"),
        ("clip_qkv", 8.0, r"clamps queries, keys and values \(clip_qkv\)"),
        ("use_logn_attn", True, "scales queries by the logarithm of their position"),
        ("use_dynamic_ntk_rope", True, "changes its rotary frequencies with the length"),
        ("positional_embedding_type", "relative_positional_bias", "'relative_positional_bias'"),
    ],
)
def test_a_hooked_transformer_is_refused(field: str, value: object, message: str) -> None:
    model: Any = zoo.by_name("learned").build(torch.float32)
    setattr(model.cfg, field, value)
    with pytest.raises(UnsupportedAttentionError, match=f"layer 1: attention .*{message}") as error:
        read_hooked.read_attention(model, 1)
    assert "A Lorsa cannot stand in for it" in str(error.value)


def test_an_attention_class_of_somebody_else_is_refused() -> None:
    model: Any = zoo.by_name("learned").build(torch.float32)
    attn = model.blocks[0].attn
    attn.__class__ = type("LinearAttention", (type(attn),), {})
    with pytest.raises(UnsupportedAttentionError, match="layer 0: LinearAttention is no attention"):
        read_hooked.read_attention(model, 0)


def test_an_encoder_decoder_is_refused() -> None:
    zoo.by_name("learned")

    class HookedEncoderDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()

    with pytest.raises(UnsupportedAttentionError, match="a HookedEncoderDecoder has no stack of"):
        read_hooked.read_attention(HookedEncoderDecoder(), 0)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
REFUSED = [
    ("Bloom", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4},
     "BloomAttention: its output already contains the residual stream"),
    ("Granite", "ForCausalLM", SMALL, "GraniteAttention: the block scales its output"),
    ("GptOss", "ForCausalLM", {**SMALL, "head_dim": 8, "num_local_experts": 2},
     "GptOssAttention: part of every softmax goes to a learned logit"),
    ("DeepseekV3", "ForCausalLM", {**SMALL, **LATENT}, "DeepseekV3Attention: it is latent"),
    ("Cohere", "ForCausalLM", SMALL, "CohereAttention: .* a LayerNorm, which is no RMS norm"),
    ("Olmo", "ForCausalLM", {**SMALL, "clip_qkv": 8.0}, r"OlmoAttention: it may clamp .*clip_qkv"),
    ("Phi3", "ForCausalLM", SMALL, r"Phi3Attention: .* length of the text \(longrope\)"),
    ("StableLm", "ForCausalLM", SMALL, "StableLmAttention: lorsa_lens is not tested against it"),
    ("Bart", "ForConditionalGeneration", BART, "no stack of decoder blocks .*encoder-decoder"),
    ("Llama", "ForCausalLM", {**SMALL, "rope_parameters": LONGROPE}, "rotary type 'longrope'"),
    ("Llama", "ForCausalLM",
     {**SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "rotary type 'dynamic' changes frequencies with the length of the text"),
]  # fmt: skip
"""Models, by name, class and configuration, and what their refusal says."""


@pytest.mark.parametrize(
    ("name", "suffix", "config", "message"),
    REFUSED,
    ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)],
)
def test_a_bridge_is_refused(name: str, suffix: str, config: dict[str, Any], message: str) -> None:
    zoo.by_name("bridge-gpt2")
    import transformers

    wrapped = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**config))
    wrapped.config.architectures = [name + suffix]
    with zoo.quiet():
        model = zoo.boot(wrapped)
    with pytest.raises(UnsupportedAttentionError, match=f"layer 0: .*{message}") as error:
        read_bridge.read_attention(model, 0)
    assert "A Lorsa cannot stand in for this attention truthfully: " in str(error.value)
    assert len(str(error.value)) < 700  # no model is printed in it


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "message"),
    [
        ("wrapped", "sinks", torch.zeros(4), r"attention sinks, .*\(sinks\)"),
        ("wrapped", "qk_layernorm", True, r"LayerNorms .*\(qk_layernorm\)"),
        ("wrapped", "key_multiplier", 0.5, r"\(key_multiplier\)"),
        ("wrapped", "is_cross_attention", True, r"keys from another text"),
        ("wrapped", "is_causal", False, r"queries that see later keys"),
        ("config", "clip_qkv", 8.0, r"\(clip_qkv\)"),
        ("bridge", "gated_q_proj", True, r"\(gated_q_proj\)"),
        ("bridge", "qk_norm_after_rope", True, r"norms of queries and keys after rotation"),
    ],
)
def test_an_option_of_a_bridge_is_refused(
    owner: str, attribute: str, value: object, message: str
) -> None:
    model: Any = zoo.by_name("bridge-llama").build(torch.float32)
    attn = model.blocks[1].attn
    wrapped = attn.original_component
    setattr({"wrapped": wrapped, "config": wrapped.config, "bridge": attn.config}[owner],
            attribute, value)  # fmt: skip
    with pytest.raises(UnsupportedAttentionError, match=f"layer 1: .*LlamaAttention.*{message}"):
        read_bridge.read_attention(model, 1)


def test_queries_scaled_by_position_are_refused() -> None:
    model: Any = zoo.by_name("bridge-llama").build(torch.float32)
    config = model.blocks[0].attn.original_component.config
    config.rope_parameters["llama_4_scaling_beta"] = 0.1
    with pytest.raises(UnsupportedAttentionError, match="llama_4_scaling_beta"):
        read_bridge.read_attention(model, 0)


@pytest.mark.parametrize("how", ["8 bits", "meta", "adapter"])
def test_a_layer_whose_weights_are_not_there_is_refused(how: str) -> None:
    model: Any = zoo.by_name("bridge-llama").build(torch.float32)
    projection = model.blocks[0].attn.k
    if how == "meta":
        projection.original_component.to("meta")
    else:
        kind, dtype = ("Linear", torch.int8) if how == "8 bits" else ("LoraLinear", torch.float32)
        weight = nn.Parameter(torch.zeros(24, 32, dtype=dtype), requires_grad=False)
        fake = type(kind, (nn.Module,), {})()
        fake.weight, fake.bias = weight, None
        projection.__dict__.pop("_original_component", None)
        projection._modules["_original_component"] = fake
    with pytest.raises(UnsupportedAttentionError, match=r"layer 0: its projection k is a .*Linear"):
        read_bridge.read_attention(model, 0)


def test_a_norm_of_queries_that_is_no_rms_norm_is_refused() -> None:
    model: Any = zoo.by_name("bridge-qwen3").build(torch.float32)
    norm = model.blocks[0].attn.q_norm
    norm._modules["_original_component"] = nn.LayerNorm(12)
    with pytest.raises(UnsupportedAttentionError, match="layer 0: a LayerNorm in it is no RMS"):
        read_bridge.read_attention(model, 0)


def test_attention_wrapped_in_another_way_is_refused() -> None:
    model: Any = zoo.by_name("bridge-llama").build(torch.float32)
    attn = model.blocks[0].attn
    attn.__class__ = type("GatedAttentionBridge", (type(attn),), {})
    with pytest.raises(UnsupportedAttentionError, match="wraps it in a GatedAttentionBridge here"):
        read_bridge.read_attention(model, 0)


def test_a_block_without_attention_is_refused() -> None:
    model: Any = zoo.by_name("bridge-llama").build(torch.float32)
    del model.blocks[0]._modules["attn"]
    with pytest.raises(UnsupportedAttentionError, match=r"BlockBridge.* has no softmax attention"):
        read_bridge.read_attention(model, 0)


def test_a_bridge_without_modules_is_refused() -> None:
    remote = type("RemoteBridge", (), {})()
    with pytest.raises(UnsupportedAttentionError, match="a RemoteBridge has no modules in this"):
        read_bridge.read_attention(remote, 0)
