"""Checkpoints of the paper's repository: `config.json` and `final.pth`."""

import json
import math
import pickle

import published
import pytest
import torch

from lorsa_lens import LoadError, Lorsa

CONFIG = {
    "d_qk_head": 8, "d_ov_head": 1, "n_qk_heads": 4, "n_ov_heads": 32, "device": "cuda",
    "dtype": "torch.float32", "virtual_kv_num": 0, "use_z_relu": True, "n_ctx": 16, "layer": 5,
    "model_name": "EleutherAI/pythia-160m", "mode": "top_k", "top_k": 4, "avg_norm": None,
    "d_model": 16, "attn_scale": 2.5, "positional_embedding_type": "rotary", "rotary_scale": 1,
    "rotary_dim": 4, "rotary_base": 10000, "rotary_adjacent_pairs": False,
}  # fmt: skip


def theirs(cfg):
    """The same in the keys of the other layout, whose oracle there is."""
    shared = {name: cfg[name] for name in cfg if name in published.DEFAULTS}
    return published.config(**shared, expansion_factor=cfg["n_ov_heads"] / cfg["d_model"])


def weights_of(cfg):
    """In the other layout's names, and as they are saved here."""
    plain = published.tensors({**theirs(cfg), "act_fn": "topk"}, norms={})
    saved = {name: tensor for name, tensor in plain.items() if name != "b_D"}
    saved |= {"W_V": plain["W_V"][:, :, None], "W_O": plain["W_O"][:, None, :]}
    return plain, {**saved, "b_V": plain["b_V"][:, None], "b_O": plain["b_D"]}


def write(folder, cfg, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(weights, folder / "final.pth")
    return folder


def test_a_checkpoint_of_the_paper_computes_what_its_formulas_say(tmp_path):
    plain, saved = weights_of(CONFIG)
    lorsa = Lorsa.from_pretrained(write(tmp_path, CONFIG, saved))
    x = torch.randn(2, 20, 16)  # longer than its n_ctx
    out, code, _ = published.forward(theirs(CONFIG), plain, x)
    torch.testing.assert_close(lorsa(x).double(), out, rtol=1e-5, atol=1e-5)
    ours = lorsa.encode(x)
    dense = torch.zeros_like(code).scatter_add(-1, ours.indices, ours.values.double())
    torch.testing.assert_close(dense, code, rtol=1e-5, atol=1e-5)
    assert lorsa.cfg.hook_in == "blocks.5.ln1.hook_normalized"
    assert lorsa.cfg.hook_out == "blocks.5.hook_attn_out"
    assert lorsa.cfg.model_name == "EleutherAI/pythia-160m"


def test_heads_of_either_sign_are_ranked_by_magnitude(tmp_path):
    cfg = {**CONFIG, "use_z_relu": False}
    plain, saved = weights_of(cfg)
    lorsa = Lorsa.from_pretrained(write(tmp_path, cfg, saved))
    x = torch.randn(2, 9, 16)
    z = published.forward(theirs(cfg), plain, x)[2]
    scores = z.abs() * plain["W_O"].double().norm(dim=1)
    stays = torch.zeros_like(z).scatter(-1, scores.topk(4).indices, 1.0)
    expected = (z * stays) @ plain["W_O"].double() + plain["b_D"].double()
    assert (z * stays < 0).any()
    torch.testing.assert_close(lorsa(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_all_heads_stay_in_the_default_mode(tmp_path):
    cfg = {**CONFIG, "mode": "default", "top_k": None}
    plain, saved = weights_of(cfg)
    lorsa = Lorsa.from_pretrained(write(tmp_path, cfg, saved))
    x = torch.randn(2, 9, 16)
    z = published.forward({**theirs(cfg), "top_k": 1}, plain, x)[2]
    expected = z @ plain["W_O"].double() + plain["b_D"].double()
    torch.testing.assert_close(lorsa(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_average_norms_are_folded(tmp_path):
    cfg = {**CONFIG, "avg_norm": {"in": 7.0, "out": 0.3}}
    plain, saved = weights_of(cfg)
    lorsa = Lorsa.from_pretrained(write(tmp_path, cfg, saved))
    x = torch.randn(2, 9, 16)
    scaled = published.forward(theirs(cfg), plain, x * math.sqrt(16) / 7.0)[0]
    torch.testing.assert_close(lorsa(x).double(), scaled * 0.3 / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ov_head": 2}, "d_ov_head = 2: only rank 1 is read"),
        ({"virtual_kv_num": 1}, "virtual_kv_num = 1: keys that no token has"),
        ({"mode": "l2"}, "mode = 'l2': only 'top_k' and 'default' are read"),
        ({"layer": None}, "layer = None must be given as an integer"),
        ({"d_model": 0}, "d_model = 0 must be given as an integer"),
        ({"avg_norm": {"in": -1}}, "avg_norm = .* must hold two positive numbers"),
        ({"n_qk_heads": 5}, "n_ov_heads = 32 must be a multiple of n_qk_heads = 5"),
        ({"n_ov_heads": 64}, r"final\.pth: .* has shape .*, but config\.json says"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, message):
    folder = write(tmp_path, {**CONFIG, **changes}, weights_of(CONFIG)[1])
    with pytest.raises(LoadError, match=message):
        Lorsa.from_pretrained(folder)


def test_final_pth_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "marker").touch, ()

    folder = write(tmp_path, CONFIG, {"W_O": Bomb()})
    with pytest.raises(LoadError, match=r"final\.pth cannot be read as plain tensors"):
        Lorsa.from_pretrained(folder)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "marker").exists()
    (folder / "final.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no final\.pth, so no Lorsa is saved there"):
        Lorsa.from_pretrained(folder)
