"""A real pretrained model: the TinyStories Llama with 260K parameters, where it is at hand."""

import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice
from lorsa_lens.hosts import host_of


def bridge(folder):
    boot = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    if not hasattr(boot, "boot_native"):
        pytest.skip("bridges are served from TransformerLens 3.9 on")
    return boot.boot_transformers(str(folder), device="cpu")


def hooked_transformer(folder):
    """Weights and configuration as TransformerLens reads them from a folder."""
    lens = pytest.importorskip("transformer_lens")
    try:
        hooked = lens.HookedTransformer
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the tokenizer's file is of transformers 5")
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(folder)
    cfg = loading.get_pretrained_model_config(str(folder), fold_ln=False, device="cpu")
    weights = loading.get_pretrained_state_dict(str(folder), cfg, hugging_face)
    model = hooked(cfg, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))
    model.load_state_dict(weights, strict=False)
    return model


def sample(model, path):
    """The sample's five stories, each after its own `<s>`, in whole contexts of 512 tokens."""
    stories = [story.strip() for story in path.read_text().split("<|endoftext|>")]
    ids = [model.tokenizer(story)["input_ids"] for story in stories if story]
    bos = model.tokenizer.bos_token_id
    tokens = torch.tensor([t for story in ids for t in [bos, *story[story[0] == bos :]]])
    assert len(tokens) == 1809
    return tokens[: 3 * 512]


def cross_entropy(model, tokens):
    with torch.no_grad():
        losses = [float(model(chunk[None], return_type="loss")) for chunk in tokens.split(512)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("load", [bridge, hooked_transformer])
def test_all_layers_lifted_give_the_models_cross_entropy(assets, load):
    with zoo.quiet():
        model = load(assets / "stories260k").eval()
    tokens = sample(model, assets / "texts" / "tinystories_sample.txt")
    expected = cross_entropy(model, tokens)
    assert expected == pytest.approx(1.310, abs=0.005)  # the published validation loss is 1.297
    lorsas = [Lorsa.from_attention(model, layer) for layer in range(host_of(model).n_layers)]
    assert len(lorsas) == 5
    with splice(model, lorsas):
        assert cross_entropy(model, tokens) == pytest.approx(expected, abs=1e-4)
    assert cross_entropy(model, tokens) == expected
