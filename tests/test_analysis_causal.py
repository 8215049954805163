"""Interventions and their effects, against passes made by hand."""

import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.analysis.behaviours import Behaviour
from lorsa_lens.analysis.causal import head_effects, path_patch, validate
from lorsa_lens.analysis.causal.validation import density_and_size, matched_heads

ACTS = "blocks.{}.attn.lorsa.hook_acts_post"


@pytest.fixture(scope="module")
def setting():
    model = zoo.KINDS[0].build(torch.float64)
    lorsas = [Lorsa.from_attention(model, layer, n_ov_heads=16, k=4) for layer in (0, 1)]
    return model, lorsas, zoo.tokens(5, 10)


def losses(logits, tokens):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_effects_of_switching_heads_off(setting, error_term, batch_size):
    model, lorsas, tokens = setting
    answers, alternatives = tokens.roll(1, 1), tokens.roll(2, 1)
    found = head_effects(
        model, lorsas, tokens, {0: [1, 5]}, error_term=error_term,
        answers=answers, alternatives=alternatives, batch_size=batch_size,
    )  # fmt: skip
    watch = [ACTS.format(1)]
    with torch.no_grad(), splice(model, lorsas, error_term=error_term):
        clean, cache = model.run_with_cache(tokens, names_filter=watch)
        with model.hooks(fwd_hooks=[(ACTS.format(0), zero_heads([1, 5]))]):
            changed, changed_cache = model.run_with_cache(tokens, names_filter=watch)
    torch.testing.assert_close(found.loss, losses(clean, tokens))
    torch.testing.assert_close(found.changed_loss, losses(changed, tokens))
    torch.testing.assert_close(found.cost, found.changed_loss - found.loss)
    pick = answers[..., None], alternatives[..., None]
    expected = clean.gather(-1, pick[0]) - clean.gather(-1, pick[1])
    torch.testing.assert_close(found.logit_difference, expected[..., 0])
    expected = changed.gather(-1, pick[0]) - changed.gather(-1, pick[1])
    torch.testing.assert_close(found.changed_logit_difference, expected[..., 0])
    change = (changed_cache[watch[0]] - cache[watch[0]]).abs().mean((0, 1))
    torch.testing.assert_close(found.downstream[1], change * lorsas[1].W_O.detach().norm(dim=-1))
    assert list(found.downstream) == [1]
    assert found.cost.abs().max() > 1e-3
    if error_term:  # the model without intervention is the model itself
        torch.testing.assert_close(found.loss, losses(model(tokens).detach(), tokens))


def test_the_mean_and_a_number_as_values(setting):
    model, lorsas, tokens = setting
    found = head_effects(model, lorsas[1], tokens, {1: [3]}, to="mean", batch_size=2)
    with torch.no_grad(), splice(model, lorsas[1], error_term=True):
        _, cache = model.run_with_cache(tokens, names_filter=ACTS.format(1))
    mean = cache[ACTS.format(1)][..., 3].mean().item()
    same = head_effects(model, lorsas[1], tokens, {1: [3]}, to=mean)
    torch.testing.assert_close(found.changed_loss, same.changed_loss)
    other = head_effects(model, lorsas[1], tokens, {1: [3]}, to=2.5)
    assert (other.changed_loss - same.changed_loss).abs().max() > 1e-4
    nothing = head_effects(model, lorsas[1], tokens, {1: []})
    torch.testing.assert_close(nothing.cost, torch.zeros_like(nothing.cost))


def test_a_path_is_the_direct_one(setting):
    """The receiver sees the stream without the sender; whatever stands between stays as it was."""
    model, lorsas, tokens = setting
    receivers = list(range(16))
    with torch.no_grad(), splice(model, lorsas, error_term=True):
        stream, acts = "blocks.1.hook_resid_pre", ACTS.format(1)
        clean, cache = model.run_with_cache(tokens, names_filter=[stream, acts, ACTS.format(0)])
        sender = int(cache[ACTS.format(0)].square().sum((0, 1)).argmax())
        moved = cache[stream] - cache[ACTS.format(0)][..., [sender]] * lorsas[0].W_O[sender]
    found = path_patch(model, lorsas, tokens, sender=(0, sender), receivers=(1, receivers))
    block = model.blocks[1]
    with torch.no_grad():
        x = block.ln1(moved)
        code = lorsas[1].encode(x)
    after = torch.zeros_like(cache[acts]).scatter_(-1, code.indices, code.values)
    change = after - cache[acts]
    torch.testing.assert_close(found.receivers, change)
    assert change.abs().max() > 1e-3
    # What it does to the logits: the receivers' change is written, and the rest follows.
    written = torch.einsum("bsi,im->bsm", change, lorsas[1].W_O.detach())
    with torch.no_grad():
        attn_out = "blocks.1.hook_attn_out"
        hooked = model.run_with_hooks(tokens, fwd_hooks=[(attn_out, lambda a, hook: a + written)])
    torch.testing.assert_close(found.logits, hooked - clean)


def test_nothing_flows_from_a_silent_head(setting):
    model, lorsas, tokens = setting
    with torch.no_grad():
        kept = lorsas[0].W_O[5].clone()
        lorsas[0].W_O[5] = 0.0
        found = path_patch(model, lorsas, tokens, sender=(0, 5), receivers=(1, [2, 7]))
        lorsas[0].W_O[5] = kept
    assert found.receivers.abs().max() < 1e-12
    assert found.logits.abs().max() < 1e-10


def test_density_and_size_on_paper(setting):
    model, lorsas, tokens = setting
    density, size = density_and_size(model, lorsas[1], tokens, batch_size=2)
    with torch.no_grad(), splice(model, lorsas[1], error_term=True):
        _, cache = model.run_with_cache(tokens, names_filter=ACTS.format(1))
    acts = cache[ACTS.format(1)] * lorsas[1].W_O.detach().norm(dim=-1)
    torch.testing.assert_close(density, (acts != 0).double().mean((0, 1)))
    assert density.sum().item() == pytest.approx(4)
    for head in range(16):
        active = acts[..., head][acts[..., head] != 0]
        expected = active.square().mean().sqrt().item() if len(active) else 0.0
        assert size[head].item() == pytest.approx(expected)


def test_random_heads_are_like_those_they_stand_for():
    density = torch.cat((torch.full((20,), 0.01), torch.full((20,), 0.5), torch.zeros(5))).double()
    size = torch.ones(45, dtype=torch.float64)
    groups = matched_heads([0, 25], density, size, n_groups=30, seed=1)
    assert len(groups) == 30
    for rare, common in groups:
        assert 1 <= rare < 20
        assert 20 <= common < 40
        assert common != 25
    assert len({tuple(group) for group in groups}) > 5
    assert groups == matched_heads([0, 25], density, size, n_groups=30, seed=1)
    with pytest.raises(ValueError, match="only 4 other heads are ever active, to match 36"):
        matched_heads(list(range(36)), density, size, n_groups=1)


def test_validation_finds_the_heads_that_matter(setting):
    """A hypothesis of those queries at which switching the heads off costs most is right."""
    model, lorsas, tokens = setting
    heads = [4]
    cost = head_effects(model, lorsas[1], tokens, {1: heads}).cost
    worst = torch.nn.functional.pad(cost > cost.quantile(0.9), (0, 1))
    found = validate(model, lorsas[1], heads, worst, tokens, n_random=5)
    assert found.cost == pytest.approx(cost[worst[:, :-1]].mean().item())
    assert found.cost_elsewhere == pytest.approx(cost[~worst[:, :-1]].mean().item())
    assert found.n_queries == int(worst.sum())
    assert found.cost > found.cost_elsewhere
    assert len(found.random_costs) == len(found.random_costs_elsewhere) == 5
    assert found.random_cost == pytest.approx(sum(found.random_costs) / 5)
    worse = sum(cost >= found.cost for cost in found.random_costs)
    assert found.p_value == pytest.approx((1 + worse) / 6)
    behaviour = Behaviour("worst", lambda _: worst[:, :, None].expand(-1, -1, 10))
    again = validate(model, lorsas[1], heads, behaviour, tokens, n_random=5)
    assert again == found


def test_questions_without_an_answer_are_refused(setting):
    model, lorsas, tokens = setting
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match="holds at no query"):
        validate(model, lorsas[1], [1], nowhere, tokens)
    with pytest.raises(ValueError, match="heads is empty"):
        validate(model, lorsas[1], [], nowhere, tokens)
    with pytest.raises(ValueError, match="n_random = 0"):
        validate(model, lorsas[1], [1], ~nowhere, tokens, n_random=0)
    with pytest.raises(ValueError, match=r"names layer 0, but lorsas are of layers \[1\]"):
        head_effects(model, lorsas[1], tokens, {0: [1]})
    with pytest.raises(ValueError, match="both answers and alternatives"):
        head_effects(model, lorsas[1], tokens, {1: [1]}, answers=tokens)
    with pytest.raises(ValueError, match="not after the sender's 1"):
        path_patch(model, lorsas, tokens, sender=(1, 0), receivers=(0, [1]))
    with pytest.raises(ValueError, match="receivers names layer 3"):
        path_patch(model, lorsas, tokens, sender=(1, 0), receivers=(3, [1]))
