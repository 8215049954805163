"""Training in place, for the model's predictions."""

import pytest
import torch
import zoo
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lorsa_lens import ConfigError, Lorsa, splice
from lorsa_lens.data import contexts_for_model
from lorsa_lens.data.token_stream import TokenStream
from lorsa_lens.training import train
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.end_to_end import InPlaceTrainer, end_to_end_step
from lorsa_lens.training.layer import LayerTrainer, Part
from lorsa_lens.training.scaling import Scales

KINDS = [kind for kind in zoo.KINDS if kind.name in ("learned", "llama", "bridge-gpt2")]
N_POS = 12


class Text:
    def __init__(self, tokens, counted):
        self.tokens, self.counted = tokens, counted


def config(**changes):
    values = {
        "context_size": N_POS, "train_batch_size_tokens": 4 * N_POS, "objective": "kl",
        "training_tokens": 50 * 4 * N_POS, "lr": 1e-3, "lr_warm_up_fraction": 0.0,
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})


def start(kind, cfg, layers=(0, 1), dtype=torch.float32, scales=None, **changes):
    model = kind.build(dtype)
    trainers = {}
    for layer in layers:
        lorsa = Lorsa.from_attention(model, layer, n_ov_heads=64, k=6, **changes)
        trainers[layer] = InPlaceTrainer(lorsa, scales or Scales(1.0, 1.0), cfg)
    return model, trainers


def text(batch=4, seed=0):
    tokens = zoo.tokens(batch, N_POS, seed)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    counted[1, 5] = False
    return Text(tokens, counted)


def expected_loss(model, lorsas, part, objective):
    """Position by position, with torch's own losses in float64."""
    with torch.no_grad():
        clean = log_softmax(model(part.tokens).double(), -1)
        with splice(model, lorsas):
            spliced = log_softmax(model(part.tokens).double(), -1)
    losses = []
    for row in range(part.tokens.shape[0]):
        for at in range(N_POS):
            if objective == "kl" and part.counted[row, at]:
                losses.append(kl_div(spliced[row, at], clean[row, at], reduction="sum",
                                     log_target=True))  # fmt: skip
            if objective == "cross_entropy" and at + 1 < N_POS and part.counted[row, at + 1]:
                losses.append(cross_entropy(spliced[row, at], part.tokens[row, at + 1]))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_the_loss_and_its_gradients(kind, objective):
    cfg = config(objective=objective, max_grad_norm=None)
    model, trainers = start(kind, cfg, dtype=torch.float64)
    part, lorsas = text(), [trainer.lorsa for trainer in trainers.values()]
    before = expected_loss(model, lorsas, part, objective)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = [Lorsa.from_attention(model, layer, n_ov_heads=64, k=6) for layer in trainers]
    metrics = end_to_end_step(model, trainers, [part], cfg, 0)
    assert metrics[0].loss == pytest.approx(before, rel=1e-9)
    assert metrics[1].loss == metrics[0].loss
    assert metrics[0].fvu is None
    # one direction in the space of one weight, by differences
    direction = lorsas[0].W_V.grad / lorsas[0].W_V.grad.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            twin[0].W_V.add_(sign * 1e-6 * direction)
        losses.append(expected_loss(model, twin, part, objective))
        with torch.no_grad():
            twin[0].W_V.sub_(sign * 1e-6 * direction)
    slope = (losses[0] - losses[1]) / 2e-6
    assert slope == pytest.approx(float(lorsas[0].W_V.grad.norm()), rel=1e-4)
    for name, parameter in model.named_parameters():  # the model is as it was
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_the_divergence_falls_and_what_is_chosen_is_counted():
    cfg = config(lr=3e-3)
    model, trainers = start(KINDS[0], cfg)
    part, lorsas = text(8), [trainer.lorsa for trainer in trainers.values()]
    held_out = text(8, seed=1)
    before = expected_loss(model, lorsas, held_out, "kl")
    metrics = [
        end_to_end_step(model, trainers, [text(8, seed=10 + step)], cfg, step) for step in range(25)
    ]
    assert expected_loss(model, lorsas, held_out, "kl") < 0.7 * before
    assert metrics[-1][0].l0 == pytest.approx(6)
    with splice(model, lorsas):
        _, cache = model.run_with_cache(part.tokens)
    acts = cache["blocks.1.attn.lorsa.hook_acts_post"][part.counted]
    chosen = (acts != 0).any(0)
    end_to_end_step(model, trainers, [part], cfg, 25)
    assert torch.equal(trainers[1].unfired == 0, chosen)


def test_parts_are_the_whole_batch():
    results = {}
    for n_parts in (1, 2):
        cfg = config(gradient_accumulation_steps=n_parts)
        model, trainers = start(KINDS[0], cfg)
        part = text()
        parts = [
            Text(part.tokens[rows], part.counted[rows])
            for rows in ([slice(0, 4)], [slice(0, 2), slice(2, 4)])[n_parts - 1]
        ]
        metrics = end_to_end_step(model, trainers, parts, cfg, 0)
        results[n_parts] = metrics[0], trainers[0].lorsa.W_O.grad
    assert results[1][0].loss == pytest.approx(results[2][0].loss, rel=1e-5)
    torch.testing.assert_close(results[1][1], results[2][1], rtol=1e-4, atol=1e-7)


def test_steps_on_raw_scale_are_those_of_training_scale():
    """Adam does not see the scale of a loss, so both ways move the weights alike."""
    model = KINDS[0].build(torch.float32)
    from lorsa_lens.recording import record_attention

    part = text()
    record = record_attention(model, part.tokens, [0])[0]
    scales = Scales(x=3.0, out=0.2)
    cfg = config(objective="reconstruction", max_grad_norm=0.5, token_weights="uniform")
    on_scale = LayerTrainer(Lorsa.from_attention(model, 0, n_ov_heads=64, k=6), scales, cfg)
    on_scale.step([Part(record, part.counted)], 0)
    expected = on_scale.finished()

    raw = Lorsa.from_attention(model, 0, n_ov_heads=64, k=6)
    start = {name: p.detach().clone() for name, p in raw.named_parameters()}
    in_place = InPlaceTrainer(raw, scales, cfg)
    in_place.begin(0)
    error = (raw(record.x) - record.out).square().sum(-1) * scales.out**2
    ((error * part.counted).sum() / part.counted.sum()).backward()
    in_place.apply(0, 0.0)
    steepest = max(float(p.grad.abs().max()) for p in raw.parameters())
    for name, parameter in in_place.finished().named_parameters():
        moved = parameter - start[name]
        wanted = expected.get_parameter(name) - start[name]
        # where a gradient is all but zero, as that of b_K, Adam's direction is noise
        clear = raw.get_parameter(name).grad.abs() > 1e-4 * steepest
        torch.testing.assert_close(moved[clear], wanted[clear], rtol=0.02, atol=1e-6)


def test_a_stream_of_tokens_goes_on_where_it_was():
    tokens = zoo.tokens(9, N_POS)
    model = KINDS[0].build(torch.float32)

    def stream():
        contexts = contexts_for_model(model, tokens, N_POS, prepend_bos=False)
        return TokenStream(contexts, batch_size=2)

    batches = list(stream())
    assert [len(batch.tokens) for batch in batches] == [2, 2, 2, 2, 1]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), tokens)
    resumed = stream()
    resumed.load_state_dict(batches[1].state)
    assert torch.equal(next(iter(resumed)).tokens, tokens[4:6])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_run_goes_on_from_saved_lorsas_and_can_be_resumed(tmp_path, kind):
    model = kind.build(torch.float32)
    tokens = zoo.tokens(40, N_POS)
    for layer in (0, 1):
        lorsa = Lorsa.from_attention(model, layer, n_ov_heads=64, k=6)
        lorsa.save_pretrained(tmp_path / f"start/blocks.{layer}")
    cfg = config(
        start_from=str(tmp_path / "start"), output_path=str(tmp_path / "run"), prepend_bos=False,
        training_tokens=12 * 4 * N_POS, checkpoint_every=4, n_checkpoints_kept=5,
    )  # fmt: skip
    whole = train(model, tokens, [0, 1], cfg.replace(output_path=None), progress=False)
    train(model, tokens, [0, 1], cfg, progress=False)
    for step in (8, 12):  # as if killed after step 7
        folder = tmp_path / f"run/checkpoints/step_{step:09d}"
        folder.rename(tmp_path / f"gone-{step}")
    resumed = train(model, tokens, [0, 1], cfg, resume=True, progress=False)
    start = Lorsa.from_pretrained(tmp_path / "start/blocks.1")
    assert not torch.equal(whole[1].W_O, start.W_O)
    for layer, lorsa in whole.items():
        for name, parameter in lorsa.named_parameters():
            assert torch.equal(parameter, resumed[layer].get_parameter(name)), name
    given = {layer: Lorsa.from_pretrained(tmp_path / f"start/blocks.{layer}") for layer in (0, 1)}
    cfg = cfg.replace(start_from=None, output_path=None)
    train(model, tokens, [0, 1], cfg, lorsas=given, progress=False)
    assert torch.equal(given[1].W_O, whole[1].W_O)


def test_what_cannot_be_trained_in_place_is_refused(tmp_path):
    model, tokens = KINDS[0].build(torch.float32), zoo.tokens(40, N_POS)
    with pytest.raises(ConfigError, match="objective = 'kl' reads the text itself"):
        train(model, None, [0], config(), progress=False)
    Lorsa.from_attention(model, 1, n_ov_heads=64, k=6).save_pretrained(tmp_path / "blocks.0")
    with pytest.raises(ConfigError, match=r"what lies in blocks.0 is for layer 1"):
        train(model, tokens, [0], config(start_from=str(tmp_path)), progress=False)
    with pytest.raises(ConfigError, match=r"there is no .*blocks.1.config.json"):
        train(model, tokens, [1], config(start_from=str(tmp_path)), progress=False)
    with pytest.raises(ConfigError, match=r"lorsas has none for layers \[1\]"):
        train(model, tokens, [1], config(), lorsas={}, progress=False)
    with pytest.raises(ConfigError, match="parallel = 'data', not 'heads'"):
        config(parallel="heads")
