"""The SAE baseline, units of all methods against the rules, and what examples print."""

import pytest
import torch
from torch import nn

from lorsa_lens import Lorsa
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.demo.superposition import Comparison
from lorsa_lens.functional.code import to_dense
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import LabelledTokens, load_language, load_model
from lorsa_lens.testbed.sae import TopKSAE, train_sae
from lorsa_lens.testbed.units import (
    RuleUnits,
    Units,
    attention_units,
    lorsa_units,
    rule_costs,
    rule_units,
    sae_units,
)
from lorsa_lens.views import Heading, Table, Text

# ------------------------------------------------------------------------------------- the SAE


def random_sae():
    sae = TopKSAE(6, 10, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@torch.no_grad()
def test_the_features_that_write_most_stay():
    sae = random_sae()
    y = torch.randn(4, 6)
    acts = sae.encode(y)
    for row in range(4):
        expected = torch.zeros(10)
        pre = [
            max(0.0, float((y[row] - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]))
            for i in range(10)
        ]
        size = [pre[i] * float(sae.W_dec[i].norm()) for i in range(10)]
        for i in sorted(range(10), key=lambda i: -size[i])[:3]:
            expected[i] = pre[i]
        torch.testing.assert_close(acts[row], expected)
    expected = sum(acts[0, i] * sae.W_dec[i] for i in range(10)) + sae.b_dec
    torch.testing.assert_close(sae(y)[0], expected)


@pytest.mark.parametrize("k", [0, 11])
def test_k_must_be_possible(k):
    with pytest.raises(ValueError, match=f"k = {k} must be within 1 to n_features = 10"):
        TopKSAE(6, 10, k)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_training_explains_sparse_data_on_any_scale(scale):
    directions = nn.functional.normalize(torch.randn(8, 16), dim=1)
    which = torch.randint(8, (64, 10))
    outputs = scale * (1 + torch.rand(64, 10, 1)) * directions[which]
    sae = train_sae(outputs, n_features=16, k=1, n_steps=200)
    error = (sae(outputs) - outputs).square().sum()
    assert error < 0.15 * (outputs - outputs.mean((0, 1))).square().sum()
    assert int((sae.encode(outputs) != 0).sum(-1).max()) == 1


# ----------------------------------------------------------------------------------- the units


@pytest.fixture(scope="module")
def subject():
    model, language = load_model("rules"), load_language("rules")
    return model, language, language.sample(6, seed=3)


def losses(model, tokens, hooks=()):
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(tokens), -1)


def without(written):
    return ("blocks.0.hook_attn_out", lambda output, hook: output - written)


@torch.no_grad()
def test_attention_heads_are_measured_and_set_to_their_means(subject):
    model, _, labels = subject
    units = attention_units(model, 0, labels.tokens)
    _, cache = model.run_with_cache(labels.tokens)
    attention, head = model.blocks[0].attn, 1
    values = cache["blocks.0.attn.hook_v"][:, :, head] - attention.b_V[head]
    z = cache["blocks.0.attn.hook_pattern"][:, head] @ values
    written = z @ attention.W_O[head]
    torch.testing.assert_close(
        units.strength[..., head], written.norm(dim=-1), rtol=1e-3, atol=1e-3
    )
    change = written - written.mean((0, 1))
    expected = losses(model, labels.tokens, [without(change)]) - losses(model, labels.tokens)
    torch.testing.assert_close(units.cost([head]), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_lorsa_heads_are_measured_and_switched_off(subject):
    model, _, labels = subject
    lorsa = Lorsa.from_attention(model, 0, n_qk_heads=3, n_ov_heads=60, k=8)
    units = lorsa_units(model, lorsa, labels.tokens)
    x = record_attention(model, labels.tokens, [0])[0].x
    acts = to_dense(lorsa.encode(x), 60)
    torch.testing.assert_close(units.strength, (acts[..., None] * lorsa.W_O).norm(dim=-1))
    heads = units.strength.sum((0, 1)).argsort(descending=True)[:5].tolist()
    taken = acts[..., heads] @ lorsa.W_O[heads]
    expected = losses(model, labels.tokens, [without(taken)]) - losses(model, labels.tokens)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(units.cost(heads), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_are_measured_and_switched_off(subject):
    model, _, labels = subject
    sae = TopKSAE(model.cfg.d_model, 40, 4, seed=1)
    units = sae_units(model, sae, 0, labels.tokens)
    acts = sae.encode(record_attention(model, labels.tokens, [0])[0].out)
    torch.testing.assert_close(units.strength, (acts[..., None] * sae.W_dec).norm(dim=-1))
    features = units.strength.sum((0, 1)).argsort(descending=True)[:5].tolist()
    taken = sum(acts[..., i, None] * sae.W_dec[i] for i in features)
    expected = losses(model, labels.tokens, [without(taken)]) - losses(model, labels.tokens)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(units.cost(features), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------- units of rules


def planted():
    """Two rules at known places; unit 0 is of rule 0, unit 1 of rule 1 mostly, unit 2 of none."""
    rule = torch.full((8, 10), -1)
    rule[:, 2], rule[:, 5], rule[:, 7] = 0, 1, 1
    labels = LabelledTokens(torch.zeros_like(rule), rule, rule, rule)
    strength = torch.zeros(8, 10, 4)
    strength[:, 2, 0] = 2.0
    strength[:, 5, 1], strength[:, 9, 1] = 3.0, 1.0  # at half of rule 1, and once elsewhere
    strength[:, :, 2] = 0.5
    return labels, strength


def test_units_belong_to_the_rule_that_has_most_of_their_energy():
    labels, strength = planted()
    asked = []

    def cost(units):
        asked.append(units)
        values = torch.zeros(8, 9)
        values[:4] = 100.0  # the first half chooses, and is not judged
        values[4:, 2], values[4:, 5] = 1.0, 4.0
        return values

    first, second = rule_units(Units(strength, cost), labels, ["one", "two"])
    assert asked == [[0], [1]]
    assert (first.units, second.units) == ([0], [1])
    assert first.f1 == 1.0
    assert second.f1 == pytest.approx(2 * 4 / (4 + 8))  # above 1.0: 4 of 8 queries, nothing else
    assert first.costs == {"one": 1.0, "two": 2.0}
    assert (first.cost, first.cost_elsewhere) == (1.0, 2.0)
    assert (second.cost, second.cost_elsewhere) == (2.0, 1.0)


def test_without_units_of_its_own_a_rule_gets_the_nearest():
    labels, strength = planted()
    strength[:, 3:5, 0] = 2.0  # now a third of unit 0's energy is at rule 0, the most of all units
    found = rule_units(Units(strength, lambda units: torch.zeros(8, 9)), labels, ["one", "two"])
    assert found[0].units == [0]


def test_units_and_labels_must_be_of_the_same_sequences():
    labels, strength = planted()
    with pytest.raises(ValueError, match=r"of \[batch, pos\] = \[7, 10\], the labels of \[8, 10\]"):
        rule_units(Units(strength[:7], lambda units: torch.zeros(7, 9)), labels, ["one", "two"])


def test_costs_are_those_of_answers():
    labels, _ = planted()
    labels = labels._replace(answer=labels.answer.masked_fill(labels.rule == 1, -1))
    cost = torch.arange(72.0).view(8, 9)
    found = rule_costs(cost, labels, ["one", "two"])
    assert found["one"] == cost[:, 2].mean().item()
    assert found["two"] != found["two"]  # it asks for no answer here


def test_what_stays_mixed_is_listed():
    row = RuleUnits("one", [0], 0.5, {"one": 2.0, "two": 0.3, "three": 0.1})
    clean = RuleUnits("one", [0], 0.5, {"one": 2.0, "two": 0.1, "three": 0.1})
    methods = {"attention heads": [row], "SAE features": [clean], "Lorsa heads": [row]}
    table = Comparison(methods, {}, [], torch.zeros(1, 1)).mixing()
    assert table.rows == [["Lorsa heads", "one", 2.0, "two", 0.3]]


# ------------------------------------------------------------------------------------- the page


def test_a_table_is_text_too():
    table = Table(["head", "share", "n"], [["L0.1", 0.123456, 7], ["L0.22", 1.0, 10]])
    assert str(table).splitlines() == [
        "head    share   n",
        "L0.1   0.1235   7",
        "L0.22       1  10",
    ]
    assert table._repr_html_() == table.to_html()


def test_results_are_printed_and_saved(tmp_path, capsys):
    options = example_options("What it does.", "name").parse_args(
        ["--out", str(tmp_path / "p.html")]
    )
    sections = [Heading("Part"), Text("Words."), Table(["a"], [[1]])]
    assert show(options.out, "Title", *sections) == tmp_path / "p.html"
    out = capsys.readouterr().out
    assert out == f"\nPart\n\nWords.\n\na\n1\n\nThe page: {tmp_path / 'p.html'}\n"
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h1>Title</h1>" in page
    assert "<h2>Part</h2>" in page
