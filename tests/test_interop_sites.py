"""A Lorsa at another site of its model computes the same, wherever that can be, both ways."""

import pytest
import torch
import zoo

from lorsa_lens import Lorsa, LorsaConfig, splice
from lorsa_lens.hosts import host_of
from lorsa_lens.interop import to_site

TOKENS = zoo.tokens()
LAYER = 1


@pytest.fixture(params=zoo.kind_params)
def kind(request):
    return request.param


def logits_with(model, lorsa):
    with splice(model, lorsa):
        return model(TOKENS)


def changed(lorsa):
    """Something else than the layer itself, so that a wrong splice shows."""
    for tensor in (lorsa.W_V, lorsa.W_O, lorsa.b_Q, lorsa.b_V):
        tensor.data.mul_(1 + 0.5 * torch.rand_like(tensor))
    return lorsa


def test_sites_of_the_input_are_converted_exactly_both_ways(kind):
    model = kind.build(torch.float64)
    host = host_of(model)
    lorsa = changed(Lorsa.from_attention(model, LAYER))
    if not host.shows_normalized(LAYER):
        with pytest.raises(ValueError, match=r"^ln1\.hook_normalized of layer 1 does not"):
            to_site(lorsa, model, input_site="ln1_normalized")
        return
    before = {name: tensor.clone() for name, tensor in lorsa.state_dict().items()}
    if host.shortformer and not host.is_folded(LAYER):
        return  # queries and keys read something else than the normalized stream
    expected = logits_with(model, lorsa)
    there = to_site(lorsa, model, input_site="ln1_normalized")
    assert there.cfg.hook_in == f"blocks.{LAYER}.ln1.hook_normalized"
    torch.testing.assert_close(logits_with(model, there), expected, rtol=1e-9, atol=1e-9)
    back = to_site(there, model, input_site="attn_in")
    assert back.cfg == lorsa.cfg
    for name, tensor in before.items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)
        assert torch.equal(lorsa.state_dict()[name], tensor)  # the given one stays as it was
        if not host.is_folded(LAYER) and name in ("W_Q", "W_K", "W_V"):
            assert not torch.allclose(there.state_dict()[name], tensor)


def test_the_normalized_site_is_what_its_hook_shows(kind):
    """An oracle without splices: the Lorsa alone, on what `ln1.hook_normalized` shows."""
    model = kind.build(torch.float64)
    host = host_of(model)
    if not host.shows_normalized(LAYER) or host.shortformer:
        return
    lorsa = changed(Lorsa.from_attention(model, LAYER))
    there = to_site(lorsa, model, input_site="ln1_normalized")
    if hasattr(model, "setup"):
        model.setup()  # TransformerLens 2 forgets to name the norms that it puts in when folding
    with splice(model, lorsa):
        _, cache = model.run_with_cache(TOKENS)
    alone = there(cache[f"blocks.{LAYER}.ln1.hook_normalized"])
    recons = cache[f"blocks.{LAYER}.attn.lorsa.hook_recons"]
    torch.testing.assert_close(alone, recons, rtol=1e-6, atol=1e-6)


def test_sites_of_the_output_are_one_but_behind_a_norm(kind):
    model = kind.build(torch.float64)
    lorsa = changed(Lorsa.from_attention(model, LAYER))
    if host_of(model).post_norm(LAYER) is not None:
        with pytest.raises(ValueError, match="a norm follows the attention of layer 1, so"):
            to_site(lorsa, model, output_site="hook_attn_out")
        behind = Lorsa.from_attention(model, LAYER, output_site="hook_attn_out")
        with pytest.raises(ValueError, match="so attn_out is no linear map of hook_attn_out"):
            to_site(behind, model, output_site="attn_out")
        return
    there = to_site(lorsa, model, output_site="hook_attn_out")
    assert there.cfg.hook_out == f"blocks.{LAYER}.hook_attn_out"
    expected = logits_with(model, lorsa)
    torch.testing.assert_close(logits_with(model, there), expected, rtol=1e-12, atol=1e-12)
    assert to_site(there, model, output_site="attn_out").cfg == lorsa.cfg


def test_a_lorsa_of_a_folded_model_is_converted_for_the_unfolded_one():
    folded = zoo.by_name("learned-processed").build(torch.float64)
    unfolded = zoo.by_name("learned").build(torch.float64)
    lorsa = Lorsa.from_attention(folded, LAYER)
    assert lorsa.cfg.fold_ln is True
    there = to_site(lorsa, unfolded, input_site="attn_in")
    assert there.cfg.fold_ln is False
    original = torch.log_softmax(unfolded(TOKENS), -1)
    for each in (lorsa, there):
        spliced = torch.log_softmax(logits_with(unfolded, each), -1)
        torch.testing.assert_close(spliced, original, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="was made on a model whose layer norms were not folded"):
        to_site(there, folded, input_site="ln1_normalized")


def test_a_gain_of_zero_cannot_be_undone():
    model = zoo.by_name("llama").build(torch.float64)
    lorsa = to_site(Lorsa.from_attention(model, LAYER), model, input_site="ln1_normalized")
    model.blocks[LAYER].ln1.w.data[3] = 0
    with pytest.raises(ValueError, match="has a gain of zero"):
        to_site(lorsa, model, input_site="attn_in")


def test_a_lorsa_that_does_not_fit_is_refused():
    model = zoo.by_name(zoo.KINDS[0].name).build(torch.float32)
    sizes = {"n_qk_heads": 1, "d_qk_head": 2, "n_ov_heads": 3}
    with pytest.raises(ValueError, match="d_model = 5, but the model has d_model = 32"):
        to_site(Lorsa(LorsaConfig(d_model=5, layer=0, **sizes)), model)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        to_site(Lorsa(LorsaConfig(d_model=32, **sizes)), model)
