"""Published checkpoints load and compute what their formulas say; ours are written for them."""

import json
import math
import re

import jaxtyping
import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorsa_lens import ConfigError, LoadError, Lorsa, LorsaConfig
from lorsa_lens.interop import save_llamascopium, split_signs


def x_of(cfg, pos=9, batch=2, scale=3.0):
    return torch.randn(batch, pos, cfg["d_model"]) * scale


def check_equal(lorsa, cfg, weights, x, tolerance=1e-5, **kwargs):
    """Output, code values and selected heads are those of the naive forward pass."""
    out, code, _ = published.forward(cfg, weights, x, **kwargs)
    dense = torch.zeros_like(code)
    ours = lorsa.encode(x)
    dense.scatter_add_(-1, ours.indices, ours.values.double())
    assert (code != 0).any(-1).all()
    assert torch.equal(dense != 0, code != 0)
    torch.testing.assert_close(dense, code, rtol=0, atol=tolerance * code.abs().max().item())
    torch.testing.assert_close(
        lorsa(x).double(), out, rtol=0, atol=tolerance * out.abs().max().item()
    )


# ------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", published.CONFIGS)
def test_a_published_checkpoint_computes_what_its_formulas_say(tmp_path, name):
    cfg = published.config(**published.CONFIGS[name])
    weights = published.tensors(cfg)
    folder = published.write(tmp_path / "lorsa", cfg, weights)
    lorsa = Lorsa.from_pretrained(folder)
    check_equal(lorsa, cfg, weights, x_of(cfg))
    assert lorsa.cfg.layer == 3
    assert (lorsa.cfg.hook_in, lorsa.cfg.hook_out) == (published.HOOK_IN, published.HOOK_OUT)
    assert lorsa.W_O.dtype == torch.float32
    saved = lorsa.save_pretrained(tmp_path / "ours")
    assert torch.equal(Lorsa.from_pretrained(saved)(x := x_of(cfg)), lorsa(x))


def test_the_configurations_differ_where_it_matters():
    """So that forgetting one of their fields shows in the test above."""
    x = x_of(published.DEFAULTS)
    for name in ("group 16, QK norm, norms per dataset", "adjacent pairs, partly rotated, scale"):
        cfg = published.config(**published.CONFIGS[name])
        weights = published.tensors(cfg)
        right = published.forward(cfg, weights, x)[0]
        for key, value in published.CONFIGS[name].items():
            if value == published.DEFAULTS[key] or key == "normalization_type":
                continue
            if key == "rotary_dim" or key == "use_post_qk_ln":
                continue
            other = published.forward({**cfg, key: published.DEFAULTS[key]}, weights, x)[0]
            assert (right - other).abs().max() > 1e-4 * right.abs().max(), key


@pytest.mark.parametrize("n_stored", [1, 2])
def test_fewer_stored_circuits_are_repeated_one_after_the_other(tmp_path, n_stored, monkeypatch):
    from lorsa_lens.io import weights as loading

    cfg = published.config(**published.QK_NORM)
    weights = published.tensors(cfg, n_stored=n_stored)
    folder = published.write(tmp_path, cfg, weights)
    x = x_of(cfg)
    check_equal(Lorsa.from_pretrained(folder), cfg, weights, x)
    for elements in (1, 130, 300):  # pieces that begin within a run of copies
        monkeypatch.setattr(loading, "PIECE_ELEMENTS", elements)
        check_equal(Lorsa.from_pretrained(folder), cfg, weights, x)


def test_positions_far_beyond_the_stored_tables_are_exact(tmp_path):
    """Angles are those of the published tables, `position / period` with float32 periods."""
    cfg = published.config(**published.NTK)
    lorsa = Lorsa.from_pretrained(published.write(tmp_path, cfg, published.tensors(cfg)))
    positions = torch.arange(0, 100_000, 997)
    periods = torch.tensor([1 / f for f in published.frequencies(cfg)], dtype=torch.float32)
    expected = positions[:, None].double() / periods.double()
    cos, _ = lorsa._angles(positions[None])
    torch.testing.assert_close(cos[0].double(), expected.cos(), rtol=0, atol=2e-2)
    near = positions < 1000
    torch.testing.assert_close(cos[0][near].double(), expected.cos()[near], rtol=0, atol=2e-4)
    x = torch.randn(1, 70, cfg["d_model"])  # the tables stop at 32
    check_equal(lorsa, cfg, published.tensors(cfg), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_missing_dtype_is_that_of_the_weights(tmp_path, dtype):
    cfg = published.config()
    assert "dtype" not in cfg
    assert "device" not in cfg
    weights = published.tensors(cfg, dtype=dtype)
    folder = published.write(tmp_path, cfg, weights)
    lorsa = Lorsa.from_pretrained(folder)
    assert lorsa.W_O.dtype == lorsa.W_Q.dtype == dtype
    assert lorsa.cfg.dtype == str(dtype).removeprefix("torch.")
    check_equal(Lorsa.from_pretrained(folder, dtype=torch.float32), cfg, weights, x_of(cfg))


def test_norms_by_dataset_scale_activations(tmp_path):
    """The oracle itself: halving the stored input norm is doubling what the Lorsa reads."""
    cfg = published.config(**published.PER_DATASET)
    norms = {published.HOOK_IN: 1.1, published.HOOK_OUT: 42.0}
    weights = published.tensors(cfg, norms=norms)
    lorsa = Lorsa.from_pretrained(published.write(tmp_path, cfg, weights))
    x = x_of(cfg)
    check_equal(lorsa, cfg, weights, x, norms=norms)
    folded = published.config()  # the same weights, scaled by hand
    s_in, s_out = 4 / 1.1, 4 / 42.0
    for name, factor in {"W_Q": s_in, "W_K": s_in, "W_V": s_in}.items():
        weights[name] = weights[name] * factor
    for name in ("W_O", "b_D"):
        weights[name] = weights[name] / s_out
    check_equal(lorsa, folded, weights, x)


def test_norms_that_do_not_count_may_be_garbage(tmp_path):
    cfg = published.config()
    norms = {published.HOOK_IN: -1.1e9, published.HOOK_OUT: math.nan}
    weights = published.tensors(cfg, norms=norms)
    check_equal(
        Lorsa.from_pretrained(published.write(tmp_path, cfg, weights)), cfg, weights, x_of(cfg)
    )


# --------------------------------------------------------------------------------- forms of files


def test_shards_are_read_through_their_index(tmp_path):
    cfg = published.config(**published.QK_NORM)
    weights = published.tensors(cfg)
    folder = published.write(tmp_path, cfg, weights)
    (folder / "sae_weights.safetensors").unlink()
    names = sorted(weights)
    shards = {f"sae_weights-0000{i}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "sae_weights.safetensors.index.json").write_text(json.dumps(index))
    check_equal(Lorsa.from_pretrained(folder), cfg, weights, x_of(cfg))


def test_a_pytorch_file_is_read_as_weights_only(tmp_path):
    cfg = published.config()
    weights = published.tensors(cfg)
    folder = published.write(tmp_path, cfg, weights)
    (folder / "sae_weights.safetensors").unlink()
    torch.save({"sae": weights, "version": "2.0.0b34"}, folder / "sae_weights.pt")
    check_equal(Lorsa.from_pretrained(folder), cfg, weights, x_of(cfg))


@pytest.mark.parametrize("stem", ["checkpoints/pruned", "checkpoints/final"])
def test_weights_of_a_run_are_found(tmp_path, stem):
    cfg = published.config()
    weights = published.tensors(cfg)
    (tmp_path / "checkpoints").mkdir()
    folder = published.write(tmp_path, cfg, weights, name=stem)
    check_equal(Lorsa.from_pretrained(folder), cfg, weights, x_of(cfg))


# -------------------------------------------------------------------------------------- refused

REFUSED = {
    "token-wise": ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise' divides by"),
    "batchtopk": ({"act_fn": "batchtopk"}, "act_fn = 'batchtopk' selects among all tokens"),
    "layer norm": (
        {"use_post_qk_ln": True, "normalization_type": "LN"},
        "normalization_type = 'LN' for queries and keys: only 'RMS'",
    ),
    "rotary scale": ({"rotary_scale": 2}, "rotary_scale = 2: only 1 is read"),
    "no window": ({"attn_type": "local"}, "attn_type = 'local' needs a window_size"),
    "fraction of a head": (
        {"expansion_factor": 4.01},
        r"d_model \* expansion_factor = 64\.1\d+ must be a whole number of heads",
    ),
    "absurd size": ({"expansion_factor": 1e300}, r"d_model \* expansion_factor = 1\.6e\+301"),
    "ragged groups": ({"n_qk_heads": 5}, "n_ov_heads = 64 must be a multiple of n_qk_heads = 5"),
    "K": ({"top_k": 65}, "k = 65 exceeds n_ov_heads = 64"),
    "odd rotation": ({"rotary_dim": 3}, "rotary_dim = 3 must be even, and between 2 and d_qk_head"),
    "rotation": ({"rotary_dim": 10}, "rotary_dim = 10 must be even, and between 2 and d_qk_head"),
    "kind of value": ({"n_qk_heads": "4"}, "n_qk_heads = '4' must be a positive integer"),
    "input": (
        {"hook_point_in": "blocks.3.hook_resid_pre"},
        r"hook_point_in = 'blocks.3.hook_resid_pre' is not what attention reads: blocks\.N\.ln1",
    ),
    "output": (
        {"hook_point_out": "blocks.3.hook_mlp_out"},
        "hook_point_out = 'blocks.3.hook_mlp_out' is not what attention writes at layer 3",
    ),
    "other layer": (
        {"hook_point_out": "blocks.4.hook_attn_out"},
        "hook_point_out = 'blocks.4.hook_attn_out' is not what attention writes at layer 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lorsa_cannot_do_is_refused_by_name(tmp_path, case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    changes, message = REFUSED[case]
    cfg = published.config()
    folder = published.write(tmp_path, {**cfg, **changes}, published.tensors(cfg))
    where = re.escape(str(folder / "config.json"))
    with pytest.raises(LoadError, match=f"^{where}: {message}"):
        Lorsa.from_pretrained(folder)


def test_other_dictionaries_are_refused(tmp_path):
    folder = published.write(tmp_path, {"sae_type": "sae", "d_model": 4}, {"W": torch.ones(2)})
    with pytest.raises(LoadError, match=r"^sae_type = 'sae': this reads 'lorsa' only$"):
        Lorsa.from_pretrained(folder)


def test_unknown_keys_warn(tmp_path):
    cfg = {**published.config(), "attention_sink": True, "comment": None}
    folder = published.write(tmp_path, cfg, published.tensors(cfg))
    with pytest.warns(UserWarning, match=r"does not know, and ignores: attention_sink$"):
        Lorsa.from_pretrained(folder)


@pytest.mark.parametrize("value", [-1.1e9, 0.0, 1e-30, 1e30, math.nan, math.inf, None])
@pytest.mark.parametrize("hook_point", [published.HOOK_IN, published.HOOK_OUT])
def test_norms_that_were_never_set_are_refused_with_advice(tmp_path, value, hook_point):
    cfg = published.config(**published.PER_DATASET)
    norms = {**published.NORMS, hook_point: value}
    norms = {name: norm for name, norm in norms.items() if norm is not None}
    folder = published.write(tmp_path, cfg, published.tensors(cfg, norms=norms))
    with pytest.raises(LoadError) as caught:
        Lorsa.from_pretrained(folder)
    told = "holds no number" if value is None else "so it was never set"
    assert f"dataset_average_activation_norm.{hook_point}" in str(caught.value)
    assert told in str(caught.value)
    assert 'set norm_activation to "inference"' in str(caught.value)


def test_ranks_by_z_alone_are_read_where_norms_are_equal(tmp_path):
    cfg = published.config(sparsity_include_decoder_norm=False)
    weights = published.tensors(cfg)
    with pytest.raises(LoadError, match="heads are ranked by z alone, but their writing norms"):
        Lorsa.from_pretrained(published.write(tmp_path, cfg, weights))
    weights["W_O"] = weights["W_O"] / weights["W_O"].norm(dim=1, keepdim=True)
    lorsa = Lorsa.from_pretrained(published.write(tmp_path, cfg, weights))
    check_equal(lorsa, cfg, weights, x_of(cfg))


def test_circuits_that_do_not_divide_are_named(tmp_path):
    cfg = published.config()
    folder = published.write(tmp_path, cfg, published.tensors(cfg, n_stored=3))
    with pytest.raises(LoadError, match="holds 3 query-key circuits, of which n_qk_heads = 4"):
        Lorsa.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(W_X=torch.ones(2)), r"missing nothing, unknown \['W_X'\]"),
        (lambda w: w.pop("b_V"), r"missing \['b_V'\], unknown nothing"),
        (lambda w: w.pop("b_D"), r"missing \['b_D'\], unknown nothing"),
        (lambda w: w.pop("W_O"), "holds no floating-point W_O"),
        (lambda w: w.update(W_V=w["W_V"].T.contiguous()), r"W_V has shape \(16, 64\), but config"),
        (lambda w: w["W_K"].view(-1)[5:8].fill_(torch.nan), "W_K has 3 entries that are NaN"),
        (lambda w: w.update(b_V=torch.arange(64)), "b_V holds I64, not floating-point numbers"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    cfg = published.config()
    weights = published.tensors(cfg)
    change(weights)
    with pytest.raises(LoadError, match=message):
        Lorsa.from_pretrained(published.write(tmp_path, cfg, weights))


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published.config()))
    with pytest.raises(FileNotFoundError, match=r"holds no weights: looked for sae_weights, check"):
        Lorsa.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", published.CONFIGS)
def test_an_export_is_a_published_checkpoint_again(tmp_path, name):
    """It computes the same by the published formulas, and loads as the same Lorsa, bit by bit."""
    cfg = published.config(**published.CONFIGS[name])
    source = published.write(tmp_path / "theirs", cfg, published.tensors(cfg))
    lorsa = Lorsa.from_pretrained(source)
    folder = save_llamascopium(lorsa, tmp_path / "export", n_ctx=12)
    again = Lorsa.from_pretrained(folder)
    assert again.cfg == lorsa.cfg
    for key, tensor in lorsa.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    written, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "sae_weights.safetensors"),
    )
    assert set(published.DEFAULTS) <= set(written)
    assert int(written["d_model"] * written["expansion_factor"]) == lorsa.cfg.n_ov_heads
    if "NTK" in name:  # these frequencies are in the tables, which is where they are read from
        written = {**written, **published.CONFIGS[name], "norm_activation": "inference"}
    if "window" in name:
        written["rotary_base_local"] = cfg["rotary_base_local"]
    written["use_decoder_bias"] = True
    check_equal(lorsa, written, weights, x_of(cfg))


def test_the_tables_of_an_export_are_those_that_are_computed_with(tmp_path):
    cfg = published.config(**published.NTK, rotary_dim=6, rotary_adjacent_pairs=True)
    source = published.write(tmp_path / "theirs", cfg, published.tensors(cfg))
    folder = save_llamascopium(Lorsa.from_pretrained(source), tmp_path / "export", n_ctx=12)
    weights = load_file(folder / "sae_weights.safetensors")
    assert torch.equal(weights["mask"], torch.ones(12, 12).tril().bool())
    assert weights["IGNORE"] == -torch.inf
    for name, function in (("rotary_sin", math.sin), ("rotary_cos", math.cos)):
        table = [[function(p * f) for f in published.frequencies(cfg)] for p in range(12)]
        expected = torch.tensor(table).repeat_interleave(2, dim=1)
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6)
    for hook_point in published.NORMS:  # sqrt(d_model): a factor of 1, were it ever used
        assert weights[f"dataset_average_activation_norm.{hook_point}"] == 4.0


def test_a_lorsa_of_ours_goes_there_and_back(tmp_path):
    lorsa = Lorsa(
        LorsaConfig(
            d_model=49, n_qk_heads=2, d_qk_head=6, n_ov_heads=2, act_fn="jumprelu", layer=1,
            positional_embedding_type="rotary", rotary_frequencies=(0.3, 0.2, 0.1),
            rotary_scale=1.2, model_name="größe", fold_ln=True, dtype="bfloat16",
        )
    )  # fmt: skip
    folder = save_llamascopium(lorsa, tmp_path)
    again = Lorsa.from_pretrained(folder)
    assert again.cfg == lorsa.cfg
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in lorsa.state_dict().items())
    written = json.loads((folder / "config.json").read_text())
    assert written["hook_point_in"] == "blocks.1.ln1.hook_normalized"  # folded: it is the input
    assert written["hook_point_out"] == "blocks.1.attn.hook_out"
    assert int(49 * written["expansion_factor"]) == 2  # although int(49 * (2 / 49)) is 1
    written["n_qk_heads"] = 1
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(LoadError, match=r"the field lorsa_lens contradicts the others"):
        Lorsa.from_pretrained(folder)


SIZES = {"d_model": 4, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 6, "layer": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"act_fn = 'topk' keeps negative activations: export split_signs\(lorsa\)"),
        ({"act_fn": "batchtopk", "k": 2}, "act_fn = 'batchtopk' has a threshold for"),
        (
            {"act_fn": "relu", "attention_dir": "bidirectional"},
            "attention_dir = 'bidirectional': the Llamascopium layout has 'causal' only",
        ),
        (
            {"act_fn": "relu", "positional_embedding_type": "alibi"},
            "positional_embedding_type = 'alibi': .* has 'standard' or 'rotary' only",
        ),
        ({"act_fn": "relu", "attn_scores_soft_cap": 5.0}, "attn_scores_soft_cap = 5.0: the"),
        ({"act_fn": "relu", "qk_norm": "full"}, "qk_norm = 'full': .* has None or 'head' only"),
        ({"act_fn": "relu", "layer": None}, "layer = None, so no activation has a name"),
    ],
)
def test_what_the_layout_cannot_say_is_not_exported(tmp_path, changes, message):
    lorsa = Lorsa(LorsaConfig(**{**SIZES, **changes}))
    with pytest.raises(ConfigError, match=message):
        save_llamascopium(lorsa, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    lorsa = Lorsa(LorsaConfig(**SIZES, act_fn="relu"))
    lorsa.b_V.data[1] = torch.nan
    with pytest.raises(ValueError, match="b_V has 1 entries that are NaN or infinite: not saved"):
        save_llamascopium(lorsa, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    with pytest.raises(ConfigError, match="n_ctx = 0: at least 1"):
        save_llamascopium(lorsa, tmp_path / "export", n_ctx=0)


@pytest.mark.parametrize("k", [None, 1, 4])
def test_split_signs_computes_the_same_with_positive_activations(tmp_path, k):
    cfg = LorsaConfig(**SIZES, k=k, qk_norm="head", positional_embedding_type="rotary")
    lorsa = Lorsa(cfg)
    for tensor in lorsa.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    positive = split_signs(lorsa)
    x = torch.randn(3, 7, 4)
    torch.testing.assert_close(positive(x), lorsa(x), rtol=1e-5, atol=1e-5)
    assert positive.cfg.act_fn == ("relu" if k is None else "topk_relu")
    code, signed = positive.encode(x), lorsa.encode(x)
    assert (code.values >= 0).all()
    dense = torch.zeros(3, 7, 12).scatter_add(-1, code.indices, code.values)
    expected = torch.zeros(3, 7, 6).scatter_add(-1, signed.indices, signed.values)
    torch.testing.assert_close(dense[..., ::2] - dense[..., 1::2], expected)
    loaded = Lorsa.from_pretrained(save_llamascopium(positive, tmp_path))
    torch.testing.assert_close(loaded(x), lorsa(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="only the signs of 'topk' are split"):
        split_signs(positive)
