"""Every configuration that cannot be is refused by name; the others survive JSON unchanged."""

import json
import math
import re
from dataclasses import FrozenInstanceError, fields

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens import AttentionSpec, ConfigError, LorsaConfig

SIZES = {"d_model": 6, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 10}
ROTARY = {"positional_embedding_type": "rotary"}
ALIBI = {"positional_embedding_type": "alibi"}


@pytest.fixture
def _unchecked(monkeypatch):
    """As users meet it: without the run-time type checker that these tests install."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def refusal(changes):
    """The message by which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        LorsaConfig(**{**SIZES, **changes})
    return str(caught.value)


# ------------------------------------------------------------------------------- one field alone

INTEGERS = ["d_model", "n_qk_heads", "d_qk_head", "n_ov_heads", "k", "window_size", "rotary_dim"]
NUMBERS = [
    "rotary_base",
    "rotary_scale",
    "attn_scale",
    "attn_scores_soft_cap",
    "qk_norm_eps",
    "jumprelu_bandwidth",
    "jumprelu_init_threshold",
]
CHOICES = {
    "act_fn": "'topk', 'topk_relu', 'batchtopk', 'jumprelu', 'relu'",
    "positional_embedding_type": "'standard', 'rotary', 'shortformer', 'alibi'",
    "attention_dir": "'causal', 'bidirectional'",
    "qk_norm": "'head', 'full'",
    "rotary_dtype": "'float32', 'float64'",
    "input_site": "'attn_in', 'ln1_normalized'",
    "output_site": "'attn_out', 'hook_attn_out'",
    "dtype": "'float32', 'float64', 'bfloat16', 'float16'",
}
OPTIONAL = {"k", "window_size", "rotary_dim", "attn_scale", "attn_scores_soft_cap", "qk_norm"}


def or_none(name):
    return " or None" if name in OPTIONAL else ""


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [0, -3, 4.0, "4", True, [4], math.nan, math.inf, 1 + 2j, torch.tensor(4)], ids=repr
)
def test_sizes_are_positive_integers(name, value):
    expected = f"{name} = {value!r} must be a positive integer{or_none(name)}"
    assert refusal({name: value}) == expected


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [0.0, -1.0, math.nan, math.inf, 10**400, "2", True, (1.0,), np.float32("nan")], ids=str
)
def test_scales_are_positive_numbers(name, value):
    expected = f"{name} = {value!r} must be a positive number{or_none(name)}"
    assert refusal({name: value}) == expected


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["Causal", "", 1, ["topk"], torch.float32], ids=str)
def test_choices_are_listed(name, value):
    expected = f"{name} = {value!r} must be one of ({CHOICES[name]}){or_none(name)}"
    assert refusal({name: value}) == expected


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("d_model", "a positive integer"),
        ("n_ov_heads", "a positive integer"),
        ("rotary_base", "a positive number"),
        ("jumprelu_bandwidth", "a positive number"),
        ("act_fn", f"one of ({CHOICES['act_fn']})"),
        ("rotary_adjacent_pairs", "True or False"),
    ],
)
def test_none_is_refused_where_there_is_no_default_to_mean(name, wanted):
    assert refusal({name: None}) == f"{name} = None must be {wanted}"


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("value", [-1, True, 2.0, "5"])
def test_layers_count_from_zero(value):
    assert refusal({"layer": value}) == f"layer = {value!r} must be an integer from 0 or None"
    assert LorsaConfig(**SIZES, layer=0).layer == 0


@pytest.mark.usefixtures("_unchecked")
def test_flags_are_true_or_false_and_names_are_strings():
    assert refusal({"fold_ln": "yes"}) == "fold_ln = 'yes' must be True or False or None"
    assert refusal({"fold_ln": 1}) == "fold_ln = 1 must be True or False or None"
    pairs = {"rotary_adjacent_pairs": 0}
    assert refusal(pairs) == "rotary_adjacent_pairs = 0 must be True or False"
    assert refusal({"model_name": 3}) == "model_name = 3 must be a string or None"


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", ["rotary_frequencies", "alibi_slopes"])
@pytest.mark.parametrize(
    "value", [(1.0, math.nan), (1.0, math.inf), (1.0, "0.1"), (True, False), 0.5, "ab", {1.0: 2}]
)
def test_series_hold_finite_numbers(name, value):
    kind = ROTARY if name == "rotary_frequencies" else ALIBI
    expected = f"{name} = {value!r} must be a tuple of finite numbers or None"
    assert refusal({**kind, name: value}) == expected


@pytest.mark.usefixtures("_unchecked")
def test_a_spec_is_checked_like_a_configuration():
    with pytest.raises(ConfigError, match=r"^attn_scale = nan must be a positive number or None$"):
        AttentionSpec(attn_scale=math.nan)
    with pytest.raises(ConfigError, match=r"^window_size = 2\.0 must be a positive integer"):
        AttentionSpec(window_size=2.0)


@pytest.mark.usefixtures("_unchecked")
def test_numbers_of_numpy_and_lists_become_plain_data():
    given = LorsaConfig(
        **{name: np.int64(value) for name, value in SIZES.items()},
        **ROTARY,
        attn_scale=2,
        rotary_base=np.float32(500.0),
        rotary_frequencies=[1, np.float64(0.25)],
        layer=np.int32(0),
    )
    plain = LorsaConfig(
        **SIZES,
        **ROTARY,
        attn_scale=2.0,
        rotary_base=500.0,
        rotary_frequencies=(1.0, 0.25),
        layer=0,
    )
    assert given == plain
    assert hash(given) == hash(plain)
    for field in fields(given):
        assert type(getattr(given, field.name)) is type(getattr(plain, field.name))
    assert [type(value) for value in given.rotary_frequencies] == [float, float]
    assert given.to_json() == plain.to_json()


# ------------------------------------------------------------------------ fields that must agree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_ov_heads": 11},
            "n_ov_heads = 11 must be a multiple of n_qk_heads = 2: for example 12",
        ),
        ({"n_ov_heads": 1}, "n_ov_heads = 1 must be a multiple of n_qk_heads = 2: for example 2"),
        (
            {"k": 11},
            "k = 11 exceeds n_ov_heads = 10: keep at most all heads, or give k = None for all",
        ),
        (
            {"k": 3, "act_fn": "jumprelu"},
            "k = 3 has no meaning with act_fn = 'jumprelu': give k = None",
        ),
        ({"k": 3, "act_fn": "relu"}, "k = 3 has no meaning with act_fn = 'relu': give k = None"),
        (
            {"act_fn": "batchtopk"},
            "k = None with act_fn = 'batchtopk': give the mean number of heads",
        ),
        (
            {**ROTARY, "rotary_dim": 3},
            "rotary_dim = 3 must be even, and between 2 and d_qk_head = 4",
        ),
        (
            {**ROTARY, "rotary_dim": 6},
            "rotary_dim = 6 must be even, and between 2 and d_qk_head = 4",
        ),
        (
            {**ROTARY, "d_qk_head": 5},
            "rotary_dim = 5 must be even, and between 2 and d_qk_head = 5",
        ),
        (
            {**ROTARY, "rotary_frequencies": (1.0, 0.5, 0.25)},
            "rotary_frequencies has 3 entries: give one for each of the 2 rotated pairs",
        ),
        (
            {**ROTARY, "rotary_dim": 2, "rotary_frequencies": ()},
            "rotary_frequencies has 0 entries: give one for each of the 1 rotated pairs",
        ),
        (
            {"rotary_dim": 2},
            "rotary_dim needs positional_embedding_type = 'rotary', which is 'standard': "
            "give rotary_dim = None",
        ),
        (
            {**ALIBI, "rotary_frequencies": (1.0, 0.5)},
            "rotary_frequencies needs positional_embedding_type = 'rotary', which is 'alibi': "
            "give rotary_frequencies = None",
        ),
        (
            {**ROTARY, "alibi_slopes": (0.5, 0.25)},
            "alibi_slopes needs positional_embedding_type = 'alibi', which is 'rotary': "
            "give alibi_slopes = None",
        ),
        (
            {**ALIBI, "alibi_slopes": (0.5,)},
            "alibi_slopes has 1 entries, but there are n_qk_heads = 2: give one slope for each, "
            "or None",
        ),
    ],
)
def test_contradictions_are_refused(changes, message):
    assert refusal(changes) == message


def test_a_configuration_without_a_layer_names_no_activation():
    cfg = LorsaConfig(**SIZES)
    for name in ("hook_in", "hook_out"):
        with pytest.raises(ConfigError, match=r"^layer = None, .*give a layer$"):
            getattr(cfg, name)


# --------------------------------------------------------------------- what follows from the fields


def test_defaults():
    cfg = LorsaConfig(**SIZES)
    assert cfg.group_size == 5
    assert cfg.rotated_dim == 0
    assert cfg.score_divisor == 2.0
    assert (cfg.k, cfg.act_fn, cfg.dtype, cfg.layer) == (None, "topk", "float32", None)


def test_derived_values():
    rotary = LorsaConfig(**{**SIZES, "d_qk_head": 8}, **ROTARY)
    assert rotary.rotated_dim == 8
    assert rotary.replace(rotary_dim=2).rotated_dim == 2
    assert rotary.score_divisor == pytest.approx(2.8284271247461903)
    assert rotary.replace(attn_scale=1.0).score_divisor == 1.0
    assert rotary.replace(n_ov_heads=2).group_size == 1


@pytest.mark.parametrize(
    ("input_site", "output_site", "hook_in", "hook_out"),
    [
        ("attn_in", "attn_out", "blocks.3.attn.hook_in", "blocks.3.attn.hook_out"),
        ("ln1_normalized", "hook_attn_out", "blocks.3.ln1.hook_normalized",
         "blocks.3.hook_attn_out"),
    ],
)  # fmt: skip
def test_hook_names(input_site, output_site, hook_in, hook_out):
    cfg = LorsaConfig(**SIZES, layer=3, input_site=input_site, output_site=output_site)
    assert (cfg.hook_in, cfg.hook_out) == (hook_in, hook_out)


def test_it_is_immutable_and_replace_validates_anew():
    cfg = LorsaConfig(**SIZES, k=3)
    with pytest.raises(FrozenInstanceError):
        cfg.k = 4
    assert cfg.replace(k=4) == LorsaConfig(**SIZES, k=4)
    assert cfg.k == 3
    assert {cfg: "hashable"}[LorsaConfig(**SIZES, k=3)] == "hashable"
    with pytest.raises(ConfigError, match=r"^k = 3 exceeds n_ov_heads = 2"):
        cfg.replace(n_ov_heads=2)
    with pytest.raises(TypeError, match="n_heads"):
        cfg.replace(n_heads=2)


# --------------------------------------------------------------------------------------------- JSON

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def valid_fields(draw):
    """Fields of configurations of every kind, as plain data."""
    n_qk_heads, d_qk_head = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 6))
    n_ov_heads = n_qk_heads * draw(st.integers(1, 9))
    act_fn = draw(st.sampled_from(["topk", "topk_relu", "batchtopk", "jumprelu", "relu"]))
    k = draw(st.integers(1, n_ov_heads)) if act_fn in ("topk", "batchtopk", "topk_relu") else None
    kind = draw(st.sampled_from(["standard", "rotary", "shortformer", "alibi"]))
    rotary_dim = frequencies = slopes = None
    if kind == "rotary":
        rotary_dim = 2 * draw(st.integers(1, d_qk_head // 2))
        frequencies = draw(st.none() | st.tuples(*[finite] * (rotary_dim // 2)))
    if kind == "alibi":
        slopes = draw(st.none() | st.tuples(*[finite] * n_qk_heads))
    numbers = {name: draw(positive) for name in NUMBERS}
    return dict(
        d_model=draw(st.integers(1, 2**40)),
        n_qk_heads=n_qk_heads,
        d_qk_head=d_qk_head,
        n_ov_heads=n_ov_heads,
        k=k,
        act_fn=act_fn,
        positional_embedding_type=kind,
        rotary_dim=rotary_dim,
        rotary_frequencies=frequencies,
        rotary_adjacent_pairs=draw(st.booleans()),
        rotary_dtype=draw(st.sampled_from(["float32", "float64"])),
        alibi_slopes=slopes,
        window_size=draw(st.none() | st.integers(1, 99)),
        attention_dir=draw(st.sampled_from(["causal", "bidirectional"])),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        layer=draw(st.none() | st.integers(0, 99)),
        model_name=draw(st.none() | st.text()),
        input_site=draw(st.sampled_from(["attn_in", "ln1_normalized"])),
        output_site=draw(st.sampled_from(["attn_out", "hook_attn_out"])),
        fold_ln=draw(st.sampled_from([None, True, False])),
        dtype=draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"])),
        **{**numbers, "attn_scale": draw(st.none() | positive)},
    )


@settings(max_examples=150, deadline=None)
@given(values=valid_fields())
def test_json_keeps_everything(tmp_path_factory, values):
    cfg = LorsaConfig(**values)
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(cfg.to_json(), encoding="utf-8")
    read = LorsaConfig.from_json(path)
    assert read == cfg
    assert {name: getattr(read, name) for name in values} == values
    assert set(values) == {field.name for field in fields(LorsaConfig)}
    assert LorsaConfig.from_dict(cfg.to_dict()) == cfg


def test_the_saved_form_says_what_it_is():
    saved = json.loads(LorsaConfig(**SIZES, **ALIBI, alibi_slopes=(0.5, 0.25)).to_json())
    assert (saved["architecture"], saved["format_version"]) == ("lorsa", 1)
    assert saved["alibi_slopes"] == [0.5, 0.25]
    assert list(saved)[:2] == ["architecture", "format_version"]
    assert LorsaConfig.from_dict(SIZES) == LorsaConfig(**SIZES)  # both may be left out
    assert list(SIZES) == ["d_model", "n_qk_heads", "d_qk_head", "n_ov_heads"]  # and are not taken


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_ov_head": 12},
            r"unknown key 'n_ov_head' in a LorsaConfig: did you mean n_ov_heads or .*\?",
        ),
        (
            {"rotary_freqencies": [1.0]},
            r"unknown key 'rotary_freqencies' in a LorsaConfig: did you mean rotary_frequencies.*",
        ),
        ({"zzz": 1}, "unknown key 'zzz' in a LorsaConfig"),
        ({7: 1}, "unknown key 7 in a LorsaConfig"),
        ({"architecture": "sae"}, "architecture = 'sae': this reads 'lorsa' only"),
        (
            {"format_version": 2},
            "format_version = 2: this release of lorsa_lens reads up to 1. "
            "Upgrade lorsa_lens to read it",
        ),
        ({"format_version": "1"}, "format_version = '1': .*"),
        ({"format_version": 0}, "format_version = 0: .*"),
        ({"k": "3"}, "k = '3' must be a positive integer or None"),
        ({"alibi_slopes": [1.0, None], **ALIBI}, r"alibi_slopes = \(1\.0, None\) must be .*"),
    ],
)
def test_a_dictionary_that_is_no_configuration_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        LorsaConfig.from_dict({**SIZES, **changes})
    assert re.fullmatch(message, str(caught.value))


def test_missing_keys_are_named():
    with pytest.raises(
        ConfigError, match=r"^incomplete LorsaConfig: it lacks d_model, n_ov_heads$"
    ):
        LorsaConfig.from_dict({"n_qk_heads": 2, "d_qk_head": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: .*"),
        ("", "is no JSON: .*"),
        ("[1, 2]", "holds list, not a JSON object"),
        ("3", "holds int, not a JSON object"),
        ('{"d_model": 6}', "incomplete LorsaConfig: it lacks d_qk_head, n_ov_heads, n_qk_heads"),
        (json.dumps({**SIZES, "attn_scale": math.nan}), "attn_scale = nan must be a positive .*"),
        (json.dumps({**SIZES, "k": 11}), "k = 11 exceeds n_ov_heads = 10: .*"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        LorsaConfig.from_json(path)
    assert re.fullmatch(re.escape(str(path)) + ":? " + message, str(caught.value))


def test_bytes_that_are_no_text_are_no_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        LorsaConfig.from_json(path)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        LorsaConfig.from_json(tmp_path / "elsewhere.json")
