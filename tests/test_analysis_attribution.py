"""Attributions add up exactly, on every host, and each part is what taking it away changes."""

import pytest
import torch
import zoo
from naive import naive_z

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.analysis.attribution import attribute
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import record_attention

SEVERAL = [
    kind for kind in zoo.KINDS
    if kind.name in (
        "learned", "attn-only", "llama", "shortformer", "alibi", "gemma2", "olmo2", "qk-norm",
        "bridge-gpt2", "bridge-llama", "bridge-gptj", "bridge-gemma2", "bridge-olmo2-processed",
    )
]  # fmt: skip


def pre_activation(model, lorsa, tokens, head, query):
    layer = lorsa.cfg.layer
    seen = record_attention(model, tokens[None], [layer])[layer].seen_by(lorsa)
    with torch.no_grad():
        return lorsa.outputs(seen.x, **seen.context).acts_pre[0, query, head].item()


@pytest.mark.parametrize("kind", SEVERAL, ids=lambda kind: kind.name)
def test_contributions_sum_to_the_activation(kind):
    model = kind.build(torch.float64)
    layer = host_of(model).n_layers - 1
    lorsa = Lorsa.from_attention(model, layer, n_ov_heads=16, k=4)
    tokens = zoo.tokens(1, 10)[0]
    found = attribute(model, lorsa, tokens, head=5, query=7)
    expected = pre_activation(model, lorsa, tokens, 5, 7)
    assert abs(expected) > 1e-3
    assert found.activation == pytest.approx(expected, abs=1e-5)
    assert found.by_origin.sum().item() == pytest.approx(expected, abs=1e-5)
    # Nothing is left to explain, and nothing comes from tokens after the query.
    rest = found.components.index("rest")
    assert found.by_key[rest].abs().max() < 1e-6
    assert found.by_key[:, 8:].abs().max() < 1e-12
    assert found.by_key[:, :8].abs().max() > 1e-3


def test_by_token_is_the_z_pattern():
    model = zoo.KINDS[0].build(torch.float64)
    lorsa = Lorsa.from_attention(model, 1)
    tokens = zoo.tokens(1, 10)[0]
    seen = record_attention(model, tokens[None], [1])[1].seen_by(lorsa)
    with torch.no_grad():
        z_pattern = lorsa.z_pattern(seen.x, [5], **seen.context)[0, 0, 7]
    found = attribute(model, lorsa, tokens, head=5, query=7)
    torch.testing.assert_close(found.by_token, z_pattern)
    totals = list(found.by_component.values())
    assert sorted(totals, key=abs, reverse=True) == totals


def test_parts_are_what_autograd_says():
    """The gradient through a frozen norm and pattern, times what a component wrote."""
    model = zoo.by_name("bridge-gpt2" if zoo.lacks("learned") else "learned").build(torch.float64)
    lorsa = Lorsa.from_attention(model, 1)
    tokens, head, query = zoo.tokens(1, 9)[0], 3, 6
    found = attribute(model, lorsa, tokens, head, query)
    names = ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "hook_pos_embed"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=names)
        seen = record_attention(model, tokens[None], [1])[1].seen_by(lorsa)
        pattern = lorsa.pattern(seen.x, [head // lorsa.cfg.group_size])[0, 0, query]
    gain, _ = host_of(model).input_norm(1)
    resid = cache[names[0]][0].clone().requires_grad_()
    centred = resid - resid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach()
    value = (centred / scale * gain) @ lorsa.W_V[head].detach()
    (gradient,) = torch.autograd.grad(pattern @ value, resid)
    for component, name in (("L0.mlp", names[1]), ("positions", names[2])):
        row = found.by_key[found.components.index(component)]
        torch.testing.assert_close(row, (cache[name] * gradient).sum(-1)[0], rtol=1e-6, atol=1e-8)


def test_upstream_heads_are_traced_to_the_tokens_they_fetched():
    """A head that reads what head 1 of layer 0 wrote, which itself looked one token back."""
    model = zoo.KINDS[0].build(torch.float64)
    exact = Lorsa.from_attention(model, 0)
    lorsa = Lorsa.from_attention(model, 1)
    tokens = zoo.tokens(1, 10)[0]
    found = attribute(model, lorsa, tokens, head=5, query=7)
    row = found.components.index("L0H1")
    # By hand: whatever head 1 fetched from token 2 alone, and wrote anywhere.
    seen = record_attention(model, tokens[None], [0])[0].seen_by(exact)
    group = range(exact.cfg.group_size, 2 * exact.cfg.group_size)
    with torch.no_grad():
        z = exact.z_pattern(seen.x, list(group))[0, :, :, 2]  # [head, query]
        written = torch.einsum("hq,hm->qm", z, exact.W_O[list(group)])
    mlp = found.components.index("L0.mlp")
    cache = model.run_with_cache(tokens[None], names_filter="blocks.0.hook_mlp_out")[1]
    mlp_out = cache["blocks.0.hook_mlp_out"][0].detach()
    # The row of the MLP gives the reading direction at each key, up to centering: use least squares
    # over a basis instead, one direction at a time.
    assert found.by_key[mlp].shape == mlp_out[:, 0].shape
    gain, _ = host_of(model).input_norm(1)
    resid = model.run_with_cache(tokens[None])[1]["blocks.1.hook_resid_pre"][0].detach()
    deviation = (resid.var(-1, unbiased=False) + 1e-5).sqrt()
    direction = lorsa.W_V[5].detach() * gain
    direction = direction - direction.mean()
    own = record_attention(model, tokens[None], [1])[1].seen_by(lorsa)
    with torch.no_grad():
        pattern = lorsa.pattern(own.x, [5 // lorsa.cfg.group_size])[0, 0, 7]
    expected = (pattern / deviation * (written @ direction)).sum()
    torch.testing.assert_close(found.by_origin[row, 2], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.by_origin[row].sum(), found.by_key[row].sum())


def test_upstream_lorsas_stand_for_attention_heads():
    model = zoo.KINDS[0].build(torch.float64)
    lorsa = Lorsa.from_attention(model, 1)
    below = Lorsa.from_attention(model, 0, n_ov_heads=16, k=3)
    tokens = zoo.tokens(1, 10)[0]
    plain = attribute(model, lorsa, tokens, head=5, query=7)
    found = attribute(model, lorsa, tokens, head=5, query=7, upstream=[below])
    assert found.activation == pytest.approx(plain.activation)
    assert not any(name.startswith("L0H") for name in found.components)
    heads = [name for name in found.components if name.startswith("L0.") and name[3:].isdigit()]
    assert 3 <= len(heads) <= 16
    whole = ["L0H0", "L0H1", "L0H2", "L0H3", "L0.bias"]
    by_component, by_head = plain.by_component, found.by_component
    assert sum(by_head[name] for name in [*heads, "L0.bias", "L0.error"]) == pytest.approx(
        sum(by_component[name] for name in whole)
    )


def test_z_patterns_at_chosen_positions_are_rows_of_the_whole():
    cfg = LorsaConfig(
        d_model=12, n_qk_heads=3, d_qk_head=4, n_ov_heads=12, k=2, window_size=5, dtype="float64"
    )
    lorsa = Lorsa(cfg)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    heads, queries = [7, 0, 11, 7], [8, 2]
    with torch.no_grad():
        whole = lorsa.z_pattern(x, heads)
        rows = lorsa.z_pattern(x, heads, queries=queries)
        z = naive_z(dict(lorsa.named_parameters()), cfg, x)
    torch.testing.assert_close(rows, whole[:, :, queries])
    expected = z[:, queries][..., heads].transpose(1, 2)
    torch.testing.assert_close(rows.sum(-1), expected, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_attributed_is_refused():
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1)
    tokens = zoo.tokens(1, 10)[0]
    with pytest.raises(ValueError, match="head = 400, but the Lorsa has heads 0 to"):
        attribute(model, lorsa, tokens, head=400, query=3)
    with pytest.raises(ValueError, match="query = 10, but the tokens have positions 0 to 9"):
        attribute(model, lorsa, tokens, head=0, query=10)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        attribute(model, lorsa, tokens, head=0, query=3)
