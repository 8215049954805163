"""The training loop: what it minimizes, how fast it walks, and what it refuses."""

import functools

import jaxtyping
import pytest
import torch
import zoo

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.evaluation import reconstruction
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.training import train

ANY = "bridge-gpt2" if zoo.lacks("learned") else "learned"


@functools.cache
def recorded(name=ANY, layer=1):
    """A tiny host and the records of one of its layers."""
    model = zoo.by_name(name).build(torch.float32)
    return model, record_attention(model, zoo.tokens(batch=64, pos=16), [layer])[layer]


def sparse_lorsa(name=ANY, **changes):
    model, _ = recorded(name)
    return Lorsa.from_attention(model, 1, **{"n_ov_heads": 128, "k": 16, **changes})


@pytest.fixture
def steps(monkeypatch):
    """Learning rate and gradient norm of every optimizer step."""
    taken = []

    class Recorded(torch.optim.Adam):
        def step(self, *args, **kwargs):
            (group,) = self.param_groups
            norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
            taken.append((group["lr"], float(torch.stack(norms).norm()), group["betas"]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    return taken


# ------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("name", [ANY, "gemma2", "shortformer", "bridge-llama"])
def test_training_lowers_the_fraction_of_variance_unexplained(name):
    _, record = recorded(name)
    lorsa = sparse_lorsa(name)
    before = reconstruction(lorsa, record)["fvu"]
    losses = train(lorsa, record, n_steps=200, batch_size=16, lr=1e-2, n_warmup_steps=20)
    after = reconstruction(lorsa, record)["fvu"]
    assert len(losses) == 200
    assert after < 0.2 * before
    assert after < 0.2
    assert sum(losses[-20:]) / 20 == pytest.approx(after, rel=0.3)


def test_a_lorsa_of_what_the_post_norm_gives_learns_that():
    _, record = recorded("gemma2")
    lorsa = sparse_lorsa("gemma2", output_site="hook_attn_out")
    train(lorsa, record, n_steps=150, batch_size=16, lr=1e-2)

    def fvu(target):
        with torch.no_grad():
            error = (lorsa(record.x, **record.context) - target).square().sum()
        return float(error / (target - target.mean((0, 1))).square().sum())

    assert fvu(record.attn_out) < 0.3
    assert fvu(record.out) > 0.5


def test_a_lorsa_of_the_normalized_stream_learns_from_that():
    model, record = recorded()
    lorsa = sparse_lorsa(init="random", input_site="ln1_normalized", fold_ln=None)
    seen = []
    with lorsa.hooks(fwd_hooks=[("hook_values", lambda v, hook: seen.append(v))]):
        train(lorsa, record, n_steps=1, batch_size=8, lr=1e-9, seed=3)
    rows = torch.randint(64, (8,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, cache = model.run_with_cache(zoo.tokens(batch=64, pos=16))
    resid = cache["blocks.1.hook_resid_pre"][rows]
    normalized = torch.nn.functional.layer_norm(resid, resid.shape[-1:], eps=1e-5)
    torch.testing.assert_close(seen[0], normalized @ lorsa.W_V.T, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------- the loss


def test_the_first_loss_is_the_squared_error_over_the_variance():
    _, record = recorded()
    lorsa = sparse_lorsa()
    rows = torch.randint(64, (4,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.no_grad():
        out = torch.cat([lorsa(record.x[row : row + 1]) for row in rows])
    error = sum(
        float((out[i, q] - record.out[row, q]).square().sum())
        for i, row in enumerate(rows)
        for q in range(16)
    ) / (4 * 16)
    vectors = record.out.reshape(-1, 32)
    variance = float(((vectors - vectors.mean(0)) ** 2).sum()) / len(vectors)
    losses = train(lorsa, record, n_steps=1, batch_size=4, seed=7)
    assert losses == [pytest.approx(error / variance, rel=1e-4)]


def test_the_loss_of_a_lorsa_worked_out_by_hand():
    """One head that writes its own token's x to the output, and a layer that writes twice x."""
    cfg = LorsaConfig(d_model=1, n_qk_heads=1, d_qk_head=1, n_ov_heads=1)
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        lorsa.W_V.fill_(1.0)
        lorsa.W_O.fill_(1.0)
    x = torch.tensor([[[1.0]], [[-1.0]]])  # one token each: attention has no choice
    record = AttentionRecord(x, 2 * x, None, torch.zeros(1, 1, dtype=torch.long), None)
    # error (2 - 1)^2 = 1 at every token; the outputs 2 and -2 have variance 4
    losses = train(lorsa, record, n_steps=300, batch_size=2, lr=1e-2, n_warmup_steps=1)
    assert losses[0] == pytest.approx(0.25)
    assert losses[-1] < 1e-4
    assert (lorsa.W_V * lorsa.W_O).item() == pytest.approx(2.0, abs=0.02)


def test_the_same_seed_gives_the_same_lorsa_and_another_seed_another():
    _, record = recorded()

    def trained(seed):
        lorsa = sparse_lorsa()
        return train(lorsa, record, n_steps=5, seed=seed), lorsa.state_dict()

    losses, weights = trained(1)
    torch.manual_seed(99)  # the global random state has no part in it
    losses_again, weights_again = trained(1)
    assert losses == losses_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert trained(2)[0] != losses


def test_the_global_random_state_is_left_alone():
    _, record = recorded()
    lorsa = sparse_lorsa()
    before = torch.get_rng_state()
    train(lorsa, record, n_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------- the steps


def test_the_learning_rate_rises_stays_and_falls(steps):
    _, record = recorded()
    train(sparse_lorsa(), record, n_steps=10, batch_size=2, lr=0.8, n_warmup_steps=4)
    # warm-up over 4 steps; full until 60 % are done; then in 4 steps to 0 after the last
    expected = [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2]
    assert [lr for lr, _, _ in steps] == pytest.approx(expected)
    assert {betas for _, _, betas in steps} == {(0.9, 0.99)}


def test_without_warm_up_the_first_step_is_a_full_one(steps):
    _, record = recorded()
    train(sparse_lorsa(), record, n_steps=5, batch_size=2, lr=0.5, n_warmup_steps=0)
    assert [lr for lr, _, _ in steps] == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.25])


def test_gradients_are_clipped_to_norm_one(steps):
    _, record = recorded()
    lorsa = sparse_lorsa()
    with torch.no_grad():
        lorsa.b_O.add_(100.0)  # far off: an unclipped gradient would be large
    losses = train(lorsa, record, n_steps=3, lr=1e-6)
    assert losses[0] > 100
    assert [norm for _, norm, _ in steps] == pytest.approx([1.0] * 3, abs=1e-4)


def test_batchtopk_learns_its_threshold_and_is_in_evaluation_mode_after():
    _, record = recorded()
    lorsa = sparse_lorsa(act_fn="batchtopk")
    assert float(lorsa.threshold) == 0.0
    train(lorsa, record, n_steps=3)
    assert float(lorsa.threshold) > 0.0
    assert not lorsa.training


def test_a_mask_in_the_records_is_obeyed():
    """Rolling sequences behind padding: the loss is that of the visible keys."""
    _, record = recorded()
    lorsa = sparse_lorsa()
    keep = torch.ones(64, 1, 16, dtype=torch.bool)
    keep[:, :, :4] = False
    record = record._replace(keep=keep, out=lorsa(record.x, keep=keep).detach())
    losses = train(lorsa, record, n_steps=1, batch_size=8, lr=1e-9)
    assert losses[0] < 1e-10
    losses = train(lorsa, record._replace(keep=None), n_steps=1, batch_size=8, lr=1e-9)
    assert losses[0] > 1e-3


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_steps", 0), ("n_steps", -3), ("batch_size", 0), ("lr", 0.0), ("lr", -1.0),
     ("lr", float("nan")), ("lr", float("inf")), ("n_warmup_steps", -1)],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(name, value):
    _, record = recorded()
    with pytest.raises(ValueError, match=rf"{name} = {value} must"):
        train(sparse_lorsa(), record, **{name: value})


def test_a_loss_that_is_not_finite_stops_and_names_the_learning_rate(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    _, record = recorded()
    lorsa = sparse_lorsa()
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step [1-9]: try lr < 1e\+30"):
        train(lorsa, record, lr=1e30, n_warmup_steps=0)
    assert not lorsa.training


def test_evaluation_mode_is_back_after_an_interruption(monkeypatch):
    _, record = recorded()
    lorsa = sparse_lorsa()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    with pytest.raises(KeyboardInterrupt):
        train(lorsa, record)
    assert not lorsa.training


def test_records_without_variance_are_refused():
    _, record = recorded()
    constant = record._replace(out=torch.ones_like(record.out))
    with pytest.raises(ValueError, match=r"outputs of variance 0\.0"):
        train(sparse_lorsa(), constant)
    broken = record._replace(out=record.out / 0.0)
    with pytest.raises(ValueError, match=r"outputs of variance nan"):
        train(sparse_lorsa(), broken)


def test_progress_is_shown_when_asked_for(capsys):
    _, record = recorded()
    train(sparse_lorsa(), record, n_steps=1)
    assert capsys.readouterr().err == ""
    train(sparse_lorsa(), record, n_steps=1, progress=True)
    assert "training layer 1" in capsys.readouterr().err
