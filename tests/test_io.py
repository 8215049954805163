"""What is saved is loaded bit by bit; what is no Lorsa, or a damaged one, is refused by name."""

import io
import json
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorsa_lens import ConfigError, LoadError, Lorsa, LorsaConfig
from lorsa_lens.io import pretrained, weights
from lorsa_lens.io.atomic import atomic_write

KINDS = {
    "topk": {"k": 3},
    "topk_relu": {"k": 2, "positional_embedding_type": "alibi", "alibi_slopes": (0.3, 0.1)},
    "batchtopk": {"k": 3, "qk_norm": "head"},
    "jumprelu": {"qk_norm": "full", "jumprelu_init_threshold": 0.3},
    "relu": {
        "positional_embedding_type": "rotary",
        "rotary_frequencies": (1 / 3, 0.7),
        "layer": 0,
        "model_name": "größe",
        "fold_ln": True,
    },
}
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def random_lorsa(act_fn="topk", seed=0, **changes):
    """A Lorsa whose tensors, the learned threshold included, are all random."""
    torch.manual_seed(seed)
    sizes = {"d_model": 6, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 10}
    lorsa = Lorsa(LorsaConfig(**{**sizes, "act_fn": act_fn, **KINDS[act_fn], **changes}))
    for tensor in lorsa.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    return lorsa


def bits(lorsa):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist())
        for name, tensor in lorsa.state_dict().items()
    }


@pytest.fixture
def folder(tmp_path):
    return random_lorsa().save_pretrained(tmp_path / "lorsa")


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", KINDS)
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, act_fn, dtype):
    lorsa = random_lorsa(act_fn, dtype=dtype)
    returned = lorsa.save_pretrained(str(tmp_path / "a" / "b"))
    assert returned == tmp_path / "a" / "b"
    assert {path.name for path in returned.iterdir()} == {"config.json", "lorsa.safetensors"}
    loaded = Lorsa.from_pretrained(returned)
    assert bits(loaded) == bits(lorsa)
    assert loaded.cfg == lorsa.cfg
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(2, 5, 6).to(loaded.W_O.dtype)
    assert torch.equal(loaded(x), lorsa(x))
    expected = {"batchtopk": {"threshold"}, "jumprelu": {"log_threshold"}}.get(act_fn, set())
    assert expected == {name for name in load_file(returned / "lorsa.safetensors") if "thr" in name}


def test_tensors_of_several_pieces_come_back_whole(tmp_path, monkeypatch):
    lorsa = random_lorsa("batchtopk")
    lorsa.W_O.data = torch.randn(6, 10).T  # not contiguous
    for elements in (1, 7, 12, 59, 60, 61):
        monkeypatch.setattr(weights, "PIECE_ELEMENTS", elements)
        folder = lorsa.save_pretrained(tmp_path / str(elements))
        assert bits(Lorsa.from_pretrained(str(folder))) == bits(lorsa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_converts(tmp_path, dtype):
    lorsa = random_lorsa("batchtopk")
    lorsa.save_pretrained(tmp_path)
    wanted = getattr(torch, dtype)
    loaded = Lorsa.from_pretrained(tmp_path, dtype=wanted)
    assert loaded.cfg == lorsa.cfg.replace(dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, lorsa.state_dict()[name].to(wanted))


def test_the_saved_precision_is_that_of_the_weights(tmp_path):
    lorsa = random_lorsa().to(torch.bfloat16)
    assert lorsa.cfg.dtype == "float32"
    lorsa.save_pretrained(tmp_path)
    loaded = Lorsa.from_pretrained(tmp_path)
    assert loaded.cfg.dtype == "bfloat16"
    assert bits(loaded) == bits(lorsa)


def test_saving_over_an_older_one_replaces_it(folder):
    newer = random_lorsa("jumprelu", seed=1)
    newer.save_pretrained(folder)
    loaded = Lorsa.from_pretrained(folder)
    assert bits(loaded) == bits(newer)
    assert loaded.cfg == newer.cfg
    assert len(list(folder.iterdir())) == 2


# ------------------------------------------------------------------------------- writing atomically


def failing_save(tensors, path, metadata):
    Path(path).write_bytes(b"half of")
    raise OSError("no space left on device")


def failing_json(cfg):
    raise OSError("no space left on device")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("broken", ["weights", "config"])
def test_a_failing_save_changes_nothing(tmp_path, monkeypatch, broken, old):
    folder, before = tmp_path / "lorsa", random_lorsa()
    if old:
        before.save_pretrained(folder)
    if broken == "weights":
        monkeypatch.setattr(pretrained, "save_file", failing_save)
    else:
        monkeypatch.setattr(LorsaConfig, "to_json", failing_json)
    with pytest.raises(OSError, match="no space left"):
        random_lorsa("relu", seed=1).save_pretrained(folder)
    monkeypatch.undo()
    assert len(list(folder.iterdir())) == (2 if old else 0)
    if old:
        assert bits(Lorsa.from_pretrained(folder)) == bits(before)


def test_atomic_write_shows_the_new_file_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "note.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert temporary.parent == path.parent
        assert not path.exists()
    with atomic_write(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]
    assert path.read_text() == "two"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    lorsa = random_lorsa()
    lorsa.W_V.data[7, 2:4] = value
    with pytest.raises(ValueError, match=r"^W_V has 2 entries that are NaN or infinite: not saved"):
        lorsa.save_pretrained(tmp_path / "lorsa")
    assert not (tmp_path / "lorsa").exists()


# ---------------------------------------------------------------------------- refused when loaded


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "lorsa.safetensors")
        change(tensors)
        save_file(tensors, folder / "lorsa.safetensors")

    return damage


def edit_config(**changes):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return damage


def edit_bytes(change):
    def damage(folder):
        path = folder / "lorsa.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def not_finite(tensors):
    tensors["W_O"][9, 4:] = torch.tensor([torch.nan, -torch.inf])


def whole_numbers(tensors):
    tensors["b_V"] = torch.arange(10)


DAMAGE = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        (FileNotFoundError, "{folder} holds no config.json, so no Lorsa is saved there"),
    ),
    "no weights": (
        lambda folder: (folder / "lorsa.safetensors").unlink(),
        (FileNotFoundError, "{folder} holds no lorsa.safetensors, so no Lorsa is saved there"),
    ),
    "last byte lost": (
        edit_bytes(lambda data: data[:-1]),
        (LoadError, "{weights} is damaged or no safetensors file: .+"),
    ),
    "half lost": (
        edit_bytes(lambda data: data[: len(data) // 2]),
        (LoadError, "{weights} is damaged or no safetensors file: .+"),
    ),
    "all lost": (
        edit_bytes(lambda data: b""),
        (LoadError, "{weights} is damaged or no safetensors file: .+"),
    ),
    "another format": (
        edit_bytes(lambda data: b"<html>" * 99),
        (LoadError, "{weights} is damaged or no safetensors file: .+"),
    ),
    "other names": (
        edit_tensors(lambda tensors: tensors.update(encoder=tensors.pop("W_V"))),
        (
            LoadError,
            r"{weights} does not fit its config.json: missing \['W_V'\], unknown \['encoder'\]",
        ),
    ),
    "a tensor too many": (
        edit_tensors(lambda tensors: tensors.update(threshold=torch.tensor(0.5))),
        (
            LoadError,
            r"{weights} does not fit its config.json: missing nothing, unknown \['threshold'\]",
        ),
    ),
    "another width": (
        edit_config(d_model=5),
        (LoadError, r"{weights}: \w+ has shape \(.*\), but config.json says \(.*\)"),
    ),
    "transposed": (
        edit_tensors(lambda tensors: tensors.update(W_V=tensors["W_V"].T.contiguous())),
        (LoadError, r"{weights}: W_V has shape \(6, 10\), but config.json says \(10, 6\)"),
    ),
    "too large to hold": (
        edit_config(n_ov_heads=2**50),
        (LoadError, rf"{{weights}}: \w+ has shape \(10.*\), but config.json says \({2**50}.*\)"),
    ),
    "integers": (
        edit_tensors(whole_numbers),
        (LoadError, "{weights}: b_V holds I64, not floating-point numbers"),
    ),
    "not finite": (
        edit_tensors(not_finite),
        (
            LoadError,
            "W_O has 2 entries that are NaN or infinite: read from {weights} as torch.float32",
        ),
    ),
    "a newer format": (
        edit_config(format_version=2),
        (ConfigError, r"{config}: format_version = 2: .* Upgrade lorsa_lens to read it"),
    ),
    "an unknown key": (
        edit_config(n_heads=4),
        (ConfigError, r"{config}: unknown key 'n_heads' in a LorsaConfig: did you mean .*"),
    ),
    "another architecture": (
        edit_config(architecture="sae"),
        (ConfigError, "{config}: architecture = 'sae': this reads 'lorsa' only"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder, damage):
    change, (error, message) = DAMAGE[damage]
    change(folder)
    with pytest.raises(error) as caught:
        Lorsa.from_pretrained(folder)
    where = {
        "folder": re.escape(str(folder)),
        "weights": re.escape(str(folder / "lorsa.safetensors")),
        "config": re.escape(str(folder / "config.json")),
    }
    assert re.fullmatch(message.format(**where), str(caught.value))


def test_numbers_too_large_for_the_precision_asked_for_are_refused(folder, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    edit_tensors(lambda tensors: tensors["b_O"].fill_(1e6))(folder)
    assert Lorsa.from_pretrained(folder).b_O[0] == 1e6
    with pytest.raises(LoadError, match=r"b_O has 6 entries .* as torch\.float16"):
        Lorsa.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"^dtype = 'int8' must be one of \('float32', "):
        Lorsa.from_pretrained(folder, dtype=torch.int8)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_a_pickle_is_refused_unopened(folder, tmp_path, form):
    marker, weights = tmp_path / "marker", folder / "lorsa.safetensors"
    if form == "torch.save":
        torch.save({"W_V": Bomb(marker)}, weights)
    else:
        weights.write_bytes(pickle.dumps({"W_V": Bomb(marker)}))
    with pytest.raises(LoadError, match="is damaged or no safetensors file"):
        Lorsa.from_pretrained(folder)
    assert not marker.exists()
    if form == "torch.save":
        torch.load(io.BytesIO(weights.read_bytes()), weights_only=False)
    else:
        pickle.loads(weights.read_bytes())
    assert marker.exists()  # so opening it would have shown


# ---------------------------------------------------------------------------- folders and the hub


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "~/lorsa", "a//b", "a/"])
def test_what_is_neither_folder_nor_hub_id_is_named(path):
    with pytest.raises(FileNotFoundError) as caught:
        Lorsa.from_pretrained(path)
    assert str(caught.value) == (
        f"{path} is no folder here, and no hub id either (user/repo, user/repo/subfolder or "
        "user/repo:subfolder)"
    )


def test_a_file_and_an_empty_folder_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"safetensors is a file: give the folder that"):
        Lorsa.from_pretrained(folder / "lorsa.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json"):
        Lorsa.from_pretrained(tmp_path / "empty")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_a_hub_id_is_named_with_the_reason():
    with pytest.raises(FileNotFoundError) as caught:
        Lorsa.from_pretrained("user/lorsas/layer-3", revision="v1")
    start = "user/lorsas/layer-3 is no folder here, and could not be loaded from the Hugging Face"
    assert str(caught.value).startswith(start)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"^us er/re po is no folder here.*alphanumeric"):
        Lorsa.from_pretrained("us er/re po")


def test_what_was_downloaded_before_is_loaded_without_a_network(hub_cache):
    repo, commit = hub_cache / "models--user--lorsas", "0123456789abcdef0123456789abcdef01234567"
    first, second = random_lorsa(), random_lorsa("relu", seed=1)
    first.save_pretrained(repo / "snapshots" / commit)
    second.save_pretrained(repo / "snapshots" / commit / "layers" / "7")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert bits(Lorsa.from_pretrained("user/lorsas")) == bits(first)
    assert bits(Lorsa.from_pretrained("user/lorsas/layers/7")) == bits(second)
    assert bits(Lorsa.from_pretrained("user/lorsas", revision=commit)) == bits(first)
    with pytest.raises(FileNotFoundError, match=r"user/lorsas is no folder here"):
        Lorsa.from_pretrained("user/lorsas", revision="v1")
    with pytest.raises(FileNotFoundError, match=r"6 holds no config\.json"):
        Lorsa.from_pretrained("user/lorsas/layers/6")


# ------------------------------------------------------------------------------- memory

MEMORY = """
import os, sys, torch
torch.set_num_threads(1)
from lorsa_lens import Lorsa
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
Lorsa.from_pretrained(sys.argv[1])
before = status("VmRSS")
lorsa = Lorsa.from_pretrained(sys.argv[2])
print((status("VmHWM") - before) / os.path.getsize(sys.argv[2] + "/lorsa.safetensors"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_hardly_more_memory_than_the_file_is_large(folder, tmp_path):
    cfg = LorsaConfig(d_model=1000, n_qk_heads=1, d_qk_head=2, n_ov_heads=25_000, k=8)
    Lorsa(cfg).save_pretrained(tmp_path / "large")
    assert (tmp_path / "large" / "lorsa.safetensors").stat().st_size > 200_000_000
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "large")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.2
