"""Files from strangers: nothing in them is ever run, and what is wrong is named."""

import io
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import published
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from lorsa_lens import LoadError, Lorsa
from lorsa_lens.io.dcp import DCPSource
from lorsa_lens.io.sources import SafetensorsSource


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """An object that shows, once it is unpickled, that it was; checked at the end."""
    marker = tmp_path / "marker"
    yield Bomb(marker)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # so unpickling it would have shown


@pytest.fixture
def folder(tmp_path):
    """A published checkpoint whose weights are still to be written."""
    cfg = published.config()
    folder = published.write(tmp_path / "lorsa", cfg, published.tensors(cfg))
    (folder / "sae_weights.safetensors").unlink()
    return folder


@pytest.fixture
def weights():
    return published.tensors(published.config())


def refused(folder, match, error=LoadError):
    with pytest.raises(error, match=match):
        Lorsa.from_pretrained(folder)


# -------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_a_pickle_under_the_name_of_safetensors_is_not_run(folder, bomb, form):
    path = folder / "sae_weights.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"W_O": bomb}))
    else:
        torch.save({"W_O": bomb}, path)
    refused(folder, r"sae_weights\.safetensors is damaged or no safetensors file")


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        header(W_O={"dtype": "F32", "shape": [25_000_000_000], "data_offsets": [0, 10**11]}),
        header(W_O={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}) + bytes(16),
        header(W_O={"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}) + bytes(16),
        header(W_O={"dtype": "F32", "shape": [4], "data_offsets": [8, -8]}) + bytes(16),
        struct.pack("<Q", 2**63) + b"{}",
        b"",
    ],
    ids=["100 GB", "overflowing shape", "negative shape", "negative place", "header", "empty"],
)
def test_impossible_headers_are_refused(folder, content):
    (folder / "sae_weights.safetensors").write_bytes(content)
    refused(folder, r"sae_weights\.safetensors is damaged or no safetensors file")


def test_a_configuration_that_claims_100_gb_takes_no_memory(folder, weights):
    save_file(weights, folder / "sae_weights.safetensors")
    claims = published.config(expansion_factor=2.0**30, n_qk_heads=2**20, d_qk_head=2**10)
    (folder / "config.json").write_text(json.dumps(claims))
    refused(folder, r"holds 4 query-key circuits|W_Q has shape|exceeds|but config.json says")


def test_truncated_weights_are_refused_wherever_they_end(folder, weights):
    path = folder / "sae_weights.safetensors"
    save_file(weights, path)
    whole = path.read_bytes()
    for end in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(folder, r"is damaged or no safetensors file")


# ---------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../secret.safetensors",
        "..",
        "",
        "sub/x",
        "a\\b",
    ],
)
def test_an_index_reads_no_file_outside_its_folder(folder, weights, name):
    save_file(weights, folder.parent / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(weights, name)}
    (folder / "sae_weights.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"names the file .*: only files beside it are read")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "holds list, not a JSON object"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "has no weight_map from tensors to files"),
        ('{"weight_map": {"W_O": 3}}', "has no weight_map from tensors to files"),
        (
            '{"weight_map": {"W_O": "x.safetensors"}}',
            "names the file 'x.safetensors', which is not",
        ),
        (
            '{"weight_map": {"W_X": "y.safetensors"}}',
            r"lists tensors that .* do not hold: \['W_X'\]",
        ),
    ],
)
def test_a_damaged_index_is_named(folder, weights, index, message):
    save_file(weights, folder / "y.safetensors")
    (folder / "sae_weights.safetensors.index.json").write_text(index)
    refused(folder, message)


@pytest.mark.parametrize("text", ["{", "[1]", "nonsense", "[" * 100_000, '{"sae_type": "lorsa"}'])
def test_a_damaged_configuration_is_named(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json( |:)")


# ------------------------------------------------------------------------------ PyTorch files


def test_a_pytorch_file_runs_nothing(folder, bomb, weights):
    torch.save({"sae": {**weights, "W_O": bomb}}, folder / "sae_weights.pt")
    refused(folder, "cannot be read as plain tensors, and nothing else is unpickled")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "holds list, not tensors by name"),
        ({"sae": 3}, "holds int, not tensors by name"),
        (
            {"sae": {"W_O": "text", "b": 1}},
            r"holds entries that are no plain tensors: \['W_O', 'b'\]",
        ),
        ({"sae": {"W_O": torch.eye(3).to_sparse()}}, "holds entries that are no plain tensors"),
        ({"sae": {"W_O": torch.zeros(1).expand(10**11)}}, "does not fit its config.json: missing"),
    ],
)
def test_other_contents_of_a_pytorch_file_are_named(folder, value, message):
    torch.save(value, folder / "sae_weights.pt")
    refused(folder, message)


def test_a_damaged_pytorch_file_is_named(folder, weights):
    path = folder / "sae_weights.pt"
    torch.save({"sae": weights}, path)
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        refused(folder, r"sae_weights\.pt cannot be read as plain tensors")


# ---------------------------------------------------------------- distributed checkpoints (DCP)


def save_dcp(folder, weights):
    path = folder / "sae_weights.dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process
        dcp.save(dict(weights), storage_writer=dcp.FileSystemWriter(path))
    return path


def test_a_distributed_checkpoint_is_read(folder, weights, monkeypatch):
    cfg = published.config()
    path = save_dcp(folder, weights)
    x = torch.randn(2, 7, 16)
    expected = published.forward(cfg, weights, x)[0]
    torch.testing.assert_close(
        Lorsa.from_pretrained(folder)(x).double(), expected, rtol=0, atol=1e-5
    )
    source = DCPSource(path)
    assert {n: h.shape for n, h in source.headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    assert torch.equal(source.read("W_Q", slice(1, 3)), weights["W_Q"][1:3])


def test_a_tensor_in_several_chunks_is_put_together(folder, weights):
    """As processes write it, each its part: here of rows, and of columns."""
    path = save_dcp(folder, {"W": torch.zeros(4, 6)})
    whole = torch.arange(24.0).view(4, 6)
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    (index,), (info,) = metadata.storage_data.keys(), metadata.storage_data.values()
    entry = metadata.state_dict_metadata["W"]
    entry.chunks, places = [], {}
    with open(path / "parts.distcp", "wb") as file:
        for rows, columns in (((0, 3), (0, 2)), ((0, 3), (2, 6)), ((3, 4), (0, 6))):
            buffer = io.BytesIO()
            torch.save(whole[slice(*rows), slice(*columns)].clone(), buffer)
            offsets = torch.Size((rows[0], columns[0]))
            sizes = torch.Size((rows[1] - rows[0], columns[1] - columns[0]))
            chunk = type(dcp.metadata.ChunkStorageMetadata(offsets, sizes))(offsets, sizes)
            entry.chunks.append(chunk)
            place = type(info)("parts.distcp", file.tell(), len(buffer.getvalue()))
            places[type(index)("W", offsets)] = place
            file.write(buffer.getvalue())
    metadata.storage_data = places
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    source = DCPSource(path)
    for piece in (slice(0, 4), slice(1, 2), slice(2, 4), slice(3, 9)):
        assert torch.equal(source.read("W", piece), whole[piece])
    entry.chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert DCPSource(path).read("W", slice(3, 4)).isnan().all()  # covered by none: seen later


def test_the_metadata_of_a_distributed_checkpoint_runs_nothing(folder, bomb, weights):
    path = save_dcp(folder, weights)
    (path / ".metadata").write_bytes(pickle.dumps(bomb))
    refused(folder, r"\.metadata is refused, and nothing of it was run: it names pathlib\.")
    for name in ("os\nsystem", "builtins\neval", "torch\nload", "torch.serialization\nload"):
        (path / ".metadata").write_bytes(f"c{name}\n(S'touch x'\ntR.".encode())
        refused(folder, f"it names {name.replace(chr(10), '.')}, which no checkpoint of tensors")


def test_the_tensors_of_a_distributed_checkpoint_run_nothing(folder, bomb, weights):
    path = save_dcp(folder, weights)
    with open(path / ".metadata", "rb") as file:
        places = pickle.load(file).storage_data
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    data = bytearray((path / "__0_0.distcp").read_bytes())
    for info in places.values():
        part = buffer.getvalue()[: info.length].ljust(info.length, b"\0")
        data[info.offset : info.offset + info.length] = part
    (path / "__0_0.distcp").write_bytes(bytes(data))
    refused(folder, "cannot be read as plain tensors, and nothing else is unpickled")


def edited(path, change):
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def outside(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.distcp"


def too_long(metadata):
    for info in metadata.storage_data.values():
        info.length = 10**12


def claims(metadata):
    metadata.state_dict_metadata["W_V"].size = torch.Size((2**34, 16))


def negative(metadata):
    metadata.state_dict_metadata["W_V"].size = (-1, 16)


def no_tensor(metadata):
    metadata.state_dict_metadata["W_V"] = dcp.metadata.BytesStorageMetadata()


def compressed(metadata):
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, r"names the file '\.\./secret\.distcp': only files beside it are read"),
        (too_long, r"__0_0\.distcp is too short to hold"),
        (claims, r"W_V has shape \(17179869184, 16\), but config\.json says \(64, 16\)"),
        (negative, r"its metadata is damaged: sizes \(-1, 16\)"),
        (no_tensor, "W_V is no tensor, and is not unpickled"),
        (compressed, "is compressed or encrypted, which is not read"),
        (lambda metadata: metadata.storage_data.clear(), "its metadata is damaged"),
        (lambda metadata: metadata.__dict__.pop("storage_data"), "its metadata is damaged"),
    ],
)
def test_tampered_metadata_is_named(folder, weights, change, message):
    path = save_dcp(folder, weights)
    (folder / "secret.distcp").write_bytes(b"secret")
    edited(path, change)
    refused(folder, message)


def test_damaged_metadata_is_named(folder, weights):
    path = save_dcp(folder, weights)
    whole = (path / ".metadata").read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        (path / ".metadata").write_bytes(whole[:end])
        refused(folder, r"\.metadata is damaged or no metadata of a checkpoint")
    os.remove(path / ".metadata")
    refused(folder, r"holds no \.metadata: it is no distributed checkpoint")


def test_a_source_reads_what_safetensors_hold(tmp_path):
    tensors = {"a": torch.randn(3, 2), "n": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    assert source.headers["a"] == ((3, 2), "F32")
    assert torch.equal(source.read("a", slice(1, 3)), tensors["a"][1:3])
    assert source.read("n", ...) == 2.5
