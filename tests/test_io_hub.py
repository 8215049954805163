"""Sharing on the hub: the real client of huggingface_hub against a hub on this machine."""

import huggingface_hub
import published
import pytest
import torch
from fake_hub import FakeHub
from test_io import bits, random_lorsa
from typer.testing import CliRunner

from lorsa_lens import ConfigError, Lorsa
from lorsa_lens.cli import app
from lorsa_lens.io.listing import list_lorsas
from lorsa_lens.io.push import push_to_hub


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    hub = FakeHub()
    hub.attach(monkeypatch, tmp_path_factory.mktemp("cache"))
    yield hub
    hub.close()


def saved(folder, *args, **changes):
    lorsa = random_lorsa(*args, **changes)
    lorsa.save_pretrained(folder)
    return lorsa


# ------------------------------------------------------------------------------------ loading


def test_every_way_to_name_a_lorsa_on_the_hub(hub, tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", "relu", seed=1)
    hub.upload("user/lorsas", tmp_path / "a")
    hub.upload("user/lorsas", tmp_path / "b", "layers/7/")
    assert bits(Lorsa.from_pretrained("user/lorsas")) == bits(first)
    for name in ("user/lorsas/layers/7", "user/lorsas:layers/7"):
        assert bits(Lorsa.from_pretrained(name)) == bits(second)
    assert bits(Lorsa.from_pretrained("user/lorsas", subfolder="layers/7")) == bits(second)
    assert bits(Lorsa.from_pretrained("user/lorsas:layers", subfolder="7")) == bits(second)
    assert bits(Lorsa.from_pretrained(tmp_path, subfolder="b")) == bits(second)


def test_only_the_files_of_one_lorsa_are_asked_for(hub, tmp_path):
    saved(tmp_path / "a")
    hub.upload("user/lorsas", tmp_path / "a", "a/")
    hub.commit("user/lorsas", {"a/optimizer.pt": b"", "a/README.md": b"", "b/config.json": b"{}"})
    Lorsa.from_pretrained("user/lorsas:a")
    assert hub.asked_for() == {"a/config.json", "a/lorsa.safetensors"}


def test_a_branch_a_tag_or_a_commit_is_loaded(hub, tmp_path):
    old, new = saved(tmp_path / "old"), saved(tmp_path / "new", seed=1)
    commit = hub.upload("user/lorsas", tmp_path / "old")
    hub.upload("user/lorsas", tmp_path / "new", branch="next")
    assert bits(Lorsa.from_pretrained("user/lorsas")) == bits(old)
    assert bits(Lorsa.from_pretrained("user/lorsas", revision="next")) == bits(new)
    hub.upload("user/lorsas", tmp_path / "new")
    assert bits(Lorsa.from_pretrained("user/lorsas")) == bits(new)
    assert bits(Lorsa.from_pretrained("user/lorsas", revision=commit)) == bits(old)
    with pytest.raises(FileNotFoundError, match=r"^user/lorsas is no folder here, and could not"):
        Lorsa.from_pretrained("user/lorsas", revision="v9")


def test_what_is_cached_is_not_downloaded_again_and_needs_no_network(hub, tmp_path, monkeypatch):
    lorsa = saved(tmp_path / "a")
    hub.upload("user/lorsas", tmp_path / "a")
    Lorsa.from_pretrained("user/lorsas", cache_dir=tmp_path / "mine")
    assert hub.asked_for()
    hub.requests.clear()
    Lorsa.from_pretrained("user/lorsas", cache_dir=tmp_path / "mine")
    assert not hub.asked_for()
    Lorsa.from_pretrained("user/lorsas", cache_dir=tmp_path / "mine", force_download=True)
    assert hub.asked_for()
    hub.requests.clear()
    options = {"cache_dir": tmp_path / "mine", "local_files_only": True}
    assert bits(Lorsa.from_pretrained("user/lorsas", **options)) == bits(lorsa)
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = Lorsa.from_pretrained("user/lorsas", cache_dir=tmp_path / "mine")
    assert bits(offline) == bits(lorsa)
    with pytest.raises(FileNotFoundError, match="could not be loaded from the Hugging Face hub"):
        Lorsa.from_pretrained("user/lorsas", cache_dir=tmp_path / "empty", local_files_only=True)


def test_the_token_is_sent(hub, tmp_path):
    saved(tmp_path / "a")
    hub.upload("user/lorsas", tmp_path / "a")
    Lorsa.from_pretrained("user/lorsas", token="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_repository_that_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match=r"^user/none is no folder here, and could not be"):
        Lorsa.from_pretrained("user/none")
    with pytest.raises(FileNotFoundError, match="could not be loaded from the Hugging Face hub"):
        list_lorsas("user/none")


@pytest.mark.parametrize("form", ["safetensors", "pt", "final"])
def test_published_lorsas_are_loaded_from_the_hub(hub, tmp_path, form):
    cfg = published.config()
    weights = published.tensors(cfg)
    name = "checkpoints/final" if form == "final" else "sae_weights"
    (tmp_path / "checkpoints").mkdir()
    folder = published.write(tmp_path, cfg, weights, name=name)
    if form == "pt":
        (folder / "sae_weights.safetensors").unlink()
        torch.save({"sae": weights, "version": "2"}, folder / "sae_weights.pt")
    hub.upload("org/scope", folder, "lorsa/8x/k64/layer12_lorsa_8x_k64/")
    lorsa = Lorsa.from_pretrained("org/scope:lorsa/8x/k64/layer12_lorsa_8x_k64")
    x = torch.randn(1, 5, 16)
    expected = published.forward(cfg, weights, x)[0]
    torch.testing.assert_close(lorsa(x).double(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- pushing


def test_lorsas_are_pushed_by_what_they_replace_and_come_back(hub):
    third, fifth = random_lorsa(layer=3), random_lorsa("relu", seed=1, layer=5, model_name="a/b")
    url = third.push_to_hub("me/lorsas", private=True, token="hf_secret")
    assert url == f"{hub.address}/me/lorsas/commit/{hub.branches['me/lorsas']['main']}"
    assert hub.private is True
    assert hub.message == "Upload 1 Lorsas"
    assert hub.tokens == {"Bearer hf_secret"}
    metrics = {"blocks.5.attn.hook_out": {"fvu": 0.0625, "ce_recovered": 0.98765}}
    push_to_hub([fifth], "me/lorsas", metrics=metrics, commit_message="The fifth")
    assert hub.message == "The fifth"
    assert set(hub.files("me/lorsas")) == {
        ".gitattributes", "README.md",
        "blocks.3.attn.hook_out/config.json", "blocks.3.attn.hook_out/lorsa.safetensors",
        "blocks.5.attn.hook_out/config.json", "blocks.5.attn.hook_out/lorsa.safetensors",
        "blocks.5.attn.hook_out/metrics.json",
    }  # fmt: skip
    for lorsa in (third, fifth):
        loaded = Lorsa.from_pretrained(f"me/lorsas:{lorsa.cfg.hook_out}")
        assert bits(loaded) == bits(lorsa)
        assert loaded.cfg == lorsa.cfg


def test_the_card_lists_what_the_repository_holds(hub):
    random_lorsa(layer=3).push_to_hub("me/lorsas")
    metrics = {"blocks.10.attn.hook_out": {"fvu": 0.0625, "|z|": 3}}
    push_to_hub(
        random_lorsa("relu", layer=10, model_name="org/model"), "me/lorsas", metrics=metrics
    )
    card = hub.files("me/lorsas")["README.md"].decode()
    front, text = card.split("---\n")[1:3]
    assert "library_name: lorsa_lens\n" in front
    assert "base_model:\n- org/model\n" in front
    assert 'Lorsa.from_pretrained("me/lorsas:blocks.3.attn.hook_out")' in text
    rows = [line for line in card.splitlines() if line.startswith("| `blocks")]
    assert rows == [
        "| `blocks.3.attn.hook_out` | 3 | 2 | 10 | topk | 3 | `attn_in` | `attn_out` |",
        "| `blocks.10.attn.hook_out` | 10 | 2 | 10 | relu |  | `attn_in` | `attn_out` |",
        "| `blocks.10.attn.hook_out` | 0.0625 | 3 |",
    ]
    assert "| folder | fvu | \\|z\\| |" in card


def test_a_branch_is_made_to_push_to(hub):
    random_lorsa(layer=0).push_to_hub("me/lorsas", revision="next")
    random_lorsa(layer=1).push_to_hub("me/lorsas", revision="next")
    assert set(hub.files("me/lorsas")) == {".gitattributes"}
    names = [entry.name for entry in list_lorsas("me/lorsas", revision="next")]
    assert names == ["blocks.0.attn.hook_out", "blocks.1.attn.hook_out"]


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub):
    third, nan = random_lorsa(layer=3), random_lorsa(layer=4)
    nan.b_O.data[0] = torch.nan
    cases = [
        (ConfigError, "layer = None", [random_lorsa()], "me/lorsas", {}),
        (ValueError, "2 Lorsas replace blocks.3.attn.hook_out", [third, third], "me/lorsas", {}),
        (ValueError, "b_O has 1 entries that are NaN", [third, nan], "me/lorsas", {}),
        (ValueError, "lorsas is empty", [], "me/lorsas", {}),
        (ValueError, "repo_id = 'me' must be user/repo", third, "me", {}),
        (ValueError, r"metrics are given for \['fvu'\], but", third, "me/lorsas", {"fvu": {}}),
    ]
    for error, message, lorsas, repo, metrics in cases:
        with pytest.raises(error, match=message):
            push_to_hub(lorsas, repo, metrics=metrics)
    assert hub.requests == []


# ------------------------------------------------------------------------------------- listing


def test_all_lorsas_of_a_repository_are_listed_by_layer(hub, tmp_path):
    for layer in (10, 2):
        saved(tmp_path / "ours" / f"blocks.{layer}", layer=layer)
    cfg = published.config()
    published.write(tmp_path / "theirs" / "lorsa", cfg, published.tensors(cfg))
    published.write(tmp_path / "theirs" / "sae", {"sae_type": "sae", "d_model": 4}, {})
    bad = published.config(act_fn="batchtopk")
    published.write(tmp_path / "theirs" / "z_bad", bad, published.tensors(bad))
    hub.upload("user/many", tmp_path)
    hub.commit("user/many", {"config.json": b'{"model_type": "gpt2"}', "broken/config.json": b"{"})
    for where in ("user/many", tmp_path):
        entries = {entry.name: entry for entry in list_lorsas(where)}
        names = [n for n in entries if n != "broken"]
        assert names == ["ours/blocks.2", "theirs/lorsa", "ours/blocks.10", "theirs/z_bad"]
        assert entries["theirs/lorsa"].layout == "llamascopium"
        assert entries["ours/blocks.2"].layout == "lorsa_lens"
        assert entries["ours/blocks.2"].cfg.layer == 2
        assert entries["theirs/lorsa"].cfg.k == 5
        assert entries["theirs/z_bad"].cfg is None
        assert "batchtopk" in entries["theirs/z_bad"].problem
    assert "no JSON" in {e.name: e for e in list_lorsas("user/many")}["broken"].problem
    assert not any(path.endswith("safetensors") for path in hub.asked_for())
    assert [entry.name for entry in list_lorsas("user/many:ours")] == ["blocks.2", "blocks.10"]


def test_the_whole_folder_may_be_the_lorsa(tmp_path):
    saved(tmp_path, layer=1)
    assert [entry.name for entry in list_lorsas(tmp_path)] == [""]


def test_a_repository_of_several_says_what_it_holds(hub, tmp_path):
    for layer in (0, 1):
        saved(tmp_path / f"blocks.{layer}", layer=layer)
    hub.upload("user/many", tmp_path)
    for where in ("user/many", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no config\.json.* holds .*blocks\.0, blocks\.1"
        ):
            Lorsa.from_pretrained(where)


# -------------------------------------------------------------------------------- command line


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_lists_and_pushes(hub, tmp_path):
    lorsas = [saved(tmp_path / f"blocks.{layer}", layer=layer, seed=layer) for layer in (0, 1)]
    result = run("push", tmp_path, "me/lorsas", "--private", "--message", "Both")
    assert result.exit_code == 0, result.output
    assert hub.message == "Both"
    assert f"{hub.address}/me/lorsas/commit/" in result.output.replace("\n", "")
    for lorsa in lorsas:
        assert bits(Lorsa.from_pretrained(f"me/lorsas:{lorsa.cfg.hook_out}")) == bits(lorsa)
    listed = run("list", "me/lorsas")
    assert listed.exit_code == 0
    for lorsa in lorsas:
        assert lorsa.cfg.hook_out in listed.output
    assert run("list", tmp_path).output.count("topk") == 2


def test_the_command_line_says_what_is_wrong(hub, tmp_path):
    for arguments in (("list", "user/none"), ("push", tmp_path / "none", "me/lorsas")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "no folder" in result.output.replace("\n", " ")
    (tmp_path / "empty").mkdir()
    for arguments in (("list", tmp_path / "empty"), ("push", tmp_path / "empty", "me/lorsas")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "holds no Lorsa" in " ".join(result.output.replace("│", " ").split())
    assert not hub.branches
