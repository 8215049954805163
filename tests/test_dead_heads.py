"""Heads that are never chosen: an advantage in the selection, and a second start."""

import pytest
import torch
from test_trainer import N_POS, ToySource, config, lorsas

from lorsa_lens.training import losses
from lorsa_lens.training.balancing import SelectionBalance
from lorsa_lens.training.layer import LayerTrainer, Part
from lorsa_lens.training.resampling import forget, resample
from lorsa_lens.training.scaling import Scales


def a_part(seed=0):
    source = ToySource([0], 4)
    source.n = seed
    batch = next(iter(source))
    return Part(batch.records[0], batch.counted)


# ----------------------------------------------------------------------------- balancing


def test_the_advantage_follows_its_rule():
    balance = SelectionBalance(4, 0.5, torch.device("cpu"))
    counts = torch.tensor([100, 40, 5, 0])  # the mean is 36.25, so 3.6 chosen is the limit
    expected = [0.0, 0.0, 0.0, 0.0]
    for _ in range(6):
        balance.update(counts)
        expected = [
            min(2.0, max(0.0, u + (0.5 if n < 0.1 * 36.25 else -0.5)))
            for u, n in zip(expected, counts.tolist(), strict=True)
        ]
        assert balance.advantage.tolist() == pytest.approx(expected)
    assert balance.advantage.tolist() == [0.0, 0.0, 0.0, 2.0]
    balance.update(torch.tensor([0, 40, 50, 50]))
    assert balance.advantage.tolist() == [0.5, 0.0, 0.0, 1.5]


def test_the_advantage_is_gone_before_the_end():
    balance = SelectionBalance(2, 0.5, torch.device("cpu"))
    balance.advantage = torch.tensor([0.0, 2.0])
    logs = {p: balance.score_factors(p) for p in (0.0, 0.4, 0.5, 0.59, 0.6, 1.0)}
    assert [float(f.log()[1]) for f in list(logs.values())[:3]] == pytest.approx([2.0, 2.0, 1.0])
    assert float(logs[0.59].log()[1]) == pytest.approx(0.1, abs=1e-5)
    assert logs[0.6] is None
    assert logs[1.0] is None
    assert SelectionBalance(2, 0.0, torch.device("cpu")).score_factors(0.0) is None


def test_factors_change_who_is_chosen_and_not_what_it_is_worth():
    (lorsa,) = lorsas((0,), n_ov_heads=24, k=3).values()
    record = a_part().record
    factors = torch.rand(24) * 5
    output = lorsa.outputs(record.x, score_factors=factors)
    scores = output.acts_pre.abs() * lorsa.W_O.norm(dim=-1) * factors
    for b in range(4):
        for s in range(N_POS):
            best = set(scores[b, s].argsort(descending=True)[:3].tolist())
            assert set(output.code.indices[b, s].tolist()) == best
    values = output.acts_pre.gather(-1, output.code.indices)
    torch.testing.assert_close(output.code.values, values, rtol=0, atol=0)
    plain = lorsa.encode(record.x).indices.sort().values
    assert not torch.equal(plain, output.code.indices.sort().values)


def test_balanced_training_leaves_fewer_heads_dead(tmp_path):
    dead = {}
    for rate in (0.0, 0.1):
        cfg = config(
            tmp_path, balance_rate=rate, training_tokens=1000 * 4 * N_POS, dead_feature_window=400
        )
        (lorsa,) = lorsas((0,), n_ov_heads=60, k=1).values()
        layer = LayerTrainer(lorsa, Scales(1.0, 1.0), cfg)
        for step in range(100):
            layer.step([a_part(step)], step)
        dead[rate] = float(layer.dead.double().mean())
    assert dead[0.1] < 0.6 * dead[0.0]


def test_tokens_weigh_less_where_the_layer_writes_much():
    record, counted = a_part()
    b_O = torch.full((8,), 0.3)
    weights = losses.energy_weights(record.out, b_O)
    prediction = torch.zeros_like(record.out)
    total = n = 0.0
    for b in range(4):
        for s in range(N_POS):
            if counted[b, s]:
                energy = float(((record.out[b, s] - 0.3) ** 2).sum())
                total += float((record.out[b, s] ** 2).sum()) / (energy + 0.05)
                n += 1
    loss = losses.squared_error(prediction, record.out, counted, weights)
    assert float(loss) == pytest.approx(total / n, rel=1e-5)


def test_weights_of_tokens_change_the_gradient_and_not_the_metric(tmp_path):
    results = {}
    for kind in ("uniform", "energy"):
        (lorsa,) = lorsas((0,)).values()
        cfg = config(tmp_path, token_weights=kind, aux_coefficient=0.0)
        metrics = LayerTrainer(lorsa, Scales(1.0, 1.0), cfg).step([a_part()], 0)
        results[kind] = metrics, lorsa.W_O.grad.clone()
    assert results["uniform"][0].fvu == pytest.approx(results["energy"][0].fvu)
    assert results["uniform"][0].loss != pytest.approx(results["energy"][0].loss)
    a, b = results["uniform"][1].flatten(), results["energy"][1].flatten()
    assert float(torch.cosine_similarity(a, b, dim=0)) < 0.999


# ----------------------------------------------------------------------------- resampling


def resampled(n_ov_heads=40, **changes):
    (lorsa,) = lorsas((0,), n_ov_heads=n_ov_heads, **changes).values()
    before = {name: p.detach().clone() for name, p in lorsa.named_parameters()}
    part = a_part()
    error = (part.record.out - lorsa(part.record.x)).detach()
    dead = torch.zeros(n_ov_heads, dtype=torch.bool)
    dead[10:30] = True
    heads = resample(lorsa, *part, dead, torch.Generator().manual_seed(3))
    return lorsa, before, part, error, dead, heads


def test_a_few_dead_heads_start_again_and_the_others_stay():
    lorsa, before, _, _, dead, heads = resampled()
    assert len(heads) == 2  # 5% of 40
    assert dead[heads].all()
    others = [head for head in range(40) if head not in heads.tolist()]
    for name, parameter in lorsa.named_parameters():
        if name in ("W_V", "b_V", "W_O"):
            assert torch.equal(parameter[others], before[name][others])
            assert not torch.equal(parameter[heads], before[name][heads])
        else:
            assert torch.equal(parameter, before[name])


def test_a_new_head_writes_half_the_error_of_a_token_and_nothing_on_average():
    lorsa, before, part, error, dead, heads = resampled()
    acts = lorsa.outputs(part.record.x).acts_pre.detach()
    mean = part.record.x[part.counted].mean(0)
    alive_norm = before["W_O"][~dead].norm(dim=-1).mean()
    for head in heads.tolist():
        w_O = lorsa.W_O[head].detach()
        assert float(w_O.norm()) == pytest.approx(float(alive_norm), rel=1e-5)
        written = acts[..., head, None] * w_O
        off = (written - 0.5 * error).norm(dim=-1) / error.norm(dim=-1)
        assert float(off[part.counted].min()) < 1e-4  # the token it was made from
        at_mean = (lorsa.W_V[head] @ mean + lorsa.b_V[head]).item()
        assert at_mean == pytest.approx(0, abs=1e-5)


def test_nothing_starts_again_where_nothing_is_dead_or_nothing_is_wrong():
    lorsa, _, part, _, dead, _ = resampled()
    generator = torch.Generator()
    assert len(resample(lorsa, *part, dead & False, generator)) == 0
    exact = part.record._replace(out=lorsa(part.record.x).detach())
    assert len(resample(lorsa, exact, part.counted, dead, generator)) == 0


def test_what_adam_knew_of_a_head_is_forgotten():
    (lorsa,) = lorsas((0,)).values()
    optimizer = torch.optim.Adam(lorsa.parameters(), fused=True)
    record, _ = a_part()
    lorsa(record.x).square().sum().backward()
    optimizer.step()
    heads = torch.zeros(12, dtype=torch.bool)
    heads[[2, 5]] = True
    before = optimizer.state[lorsa.W_O]["exp_avg"].clone()
    forget(optimizer, lorsa, heads)
    after = optimizer.state[lorsa.W_O]["exp_avg"]
    assert not after[heads].any()
    assert torch.equal(after[~heads], before[~heads])
    assert before[heads].any()


def test_dead_heads_start_again_when_it_is_due(tmp_path):
    cfg = config(
        tmp_path, resample_every=20, dead_feature_window=200, aux_coefficient=0.0,
        training_tokens=100 * 4 * N_POS, lr_decay_fraction=0.5,
    )  # fmt: skip
    (lorsa,) = lorsas((0,), n_ov_heads=100, k=2).values()
    layer = LayerTrainer(lorsa, Scales(1.0, 1.0), cfg)
    began = []
    for step in range(80):
        dead = layer.dead
        before = lorsa.W_O.detach().clone()
        layer.step([a_part(step)], step)
        moved = (lorsa.W_O.detach() - before).norm(dim=-1) > 0.1
        began += [step] * bool((moved & dead).any())
        if began and step == began[-1]:
            heads = moved & dead
            assert 0 < int(heads.sum()) <= 5
            assert not layer.unfired[heads].any()
    assert began == [19, 39]  # from step 50 on the learning rate falls
