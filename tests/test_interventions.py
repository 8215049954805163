"""An edit of chosen heads changes the output by the change of z times W_O, and nothing else."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens import Lorsa, LorsaConfig, scale_heads, set_heads, steer_heads, zero_heads

N_HEADS, N_POS, BATCH = 10, 5, 2
EDITS = {
    "zero": (lambda heads, where: zero_heads(heads, where), lambda z: 0.0 * z),
    "scale": (lambda heads, where: scale_heads(heads, -2.5, where), lambda z: -2.5 * z),
    "set": (lambda heads, where: set_heads(heads, 0.75, where), lambda z: 0.0 * z + 0.75),
    "steer": (lambda heads, where: steer_heads(heads, 3.0, where), lambda z: z + 3.0),
}


def random_lorsa():
    torch.manual_seed(0)
    sizes = {"d_model": 6, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": N_HEADS, "k": 3}
    lorsa = Lorsa(LorsaConfig(**sizes, dtype="float64"))
    for parameter in lorsa.parameters():
        parameter.data.normal_()
    return lorsa


def random_x():
    return torch.randn(BATCH, N_POS, 6, dtype=torch.float64)


def edited(lorsa, x, hook):
    with lorsa.hooks(fwd_hooks=[("hook_acts_post", hook)]):
        return lorsa(x)


def random_acts():
    return torch.randn(BATCH, N_POS, N_HEADS, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    edit=st.sampled_from(sorted(EDITS)),
    heads=st.lists(st.integers(0, N_HEADS - 1), unique=True),
    positions=st.none()
    | st.lists(st.integers(-N_POS, N_POS - 1))
    | st.builds(
        slice,
        st.none() | st.integers(-7, 7),
        st.none() | st.integers(-7, 7),
        st.none() | st.integers(1, 3),
    ),
)
def test_the_output_changes_by_the_change_of_z_times_w_o(edit, heads, positions):
    make, change = EDITS[edit]
    lorsa, x = random_lorsa(), random_x()
    clean, cache = lorsa.run_with_cache(x)
    z = cache["hook_acts_post"]
    if positions is None:
        touched = set(range(N_POS))
    elif isinstance(positions, slice):
        touched = set(list(range(N_POS))[positions])
    else:
        touched = {position % N_POS for position in positions}
    expected = z.clone()
    for position in touched:
        for head in heads:
            expected[:, position, head] = change(z[:, position, head])
    out = edited(lorsa, x, make(heads, positions))
    torch.testing.assert_close(out - clean, (expected - z) @ lorsa.W_O, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(make(heads, positions)(z, hook=None), expected, rtol=0, atol=0)


def test_numbers_written_out():
    acts = torch.arange(12.0).reshape(1, 3, 4)
    rows = [
        (zero_heads([1]), [[0, 0, 2, 3], [4, 0, 6, 7], [8, 0, 10, 11]]),
        (zero_heads([3, 0], [-1]), [[0, 1, 2, 3], [4, 5, 6, 7], [0, 9, 10, 0]]),
        (scale_heads([2], 10.0, slice(1, None)), [[0, 1, 2, 3], [4, 5, 60, 7], [8, 9, 100, 11]]),
        (set_heads([0, 2], -1.0, [0]), [[-1, 1, -1, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (steer_heads([1], 0.5, [1, 2]), [[0, 1, 2, 3], [4, 5.5, 6, 7], [8, 9.5, 10, 11]]),
        (steer_heads([1, 1], 0.5, [2, -1]), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9.5, 10, 11]]),
        (zero_heads([]), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (zero_heads([1], []), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ]
    for hook, expected in rows:
        assert hook(acts, hook=None).tolist() == [expected]
    assert acts.tolist() == torch.arange(12.0).reshape(1, 3, 4).tolist()  # never edited in place


@pytest.mark.parametrize("shape", [(), (2,), (1,), (3, 2), (3, 1), (2, 3, 2), (2, 1, 2), (2, 1, 1)])
def test_tensors_broadcast_to_the_heads_and_positions_chosen_in_their_order(shape):
    acts = random_acts()
    heads, positions = [7, 2], [4, 0, 2]
    values = torch.randn(shape)
    full = values.double().expand(2, 3, 2)
    for make, change in [
        (set_heads, lambda old, new: new),
        (steer_heads, lambda old, new: old + new),
    ]:
        expected = acts.clone()
        for p, position in enumerate(positions):
            for h, head in enumerate(heads):
                old = acts[:, position, head]
                expected[:, position, head] = change(old, full[:, p, h])
        got = make(heads, values, positions)(acts, hook=None)
        assert torch.equal(got, expected)
        assert got.dtype == torch.float64


@pytest.mark.parametrize("make", [set_heads, steer_heads])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (3, 5, 2), (1, 2, 5, 2), (0,)])
def test_tensors_that_do_not_broadcast_are_named(make, shape):
    message = r"\(.*\) does not broadcast to .* \[batch, position, head\] = \[2, 5, 2\]"
    with pytest.raises(ValueError, match=message):
        make([1, 2], torch.zeros(shape))(random_acts(), hook=None)
    one = random_acts()[:1]
    with pytest.raises(ValueError, match=r"= \[1, 5, 2\]"):  # a batch does not grow
        make([1, 2], torch.zeros(2, 1, 1))(one, hook=None)


def test_heads_and_positions_may_be_arrays(monkeypatch):
    acts = random_acts()
    expected = zero_heads([3, 5], [1, 4])(acts, hook=None)
    counted = zero_heads(range(3, 6, 2), (1, -1))(acts, hook=None)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arrays = zero_heads(np.array([3, 5]), torch.tensor([1, 4]))(acts, hook=None)
    assert torch.equal(arrays, expected)
    assert torch.equal(counted, expected)


# ------------------------------------------------------------------------------------- gradients


def test_gradients_of_the_activations():
    acts = random_acts().requires_grad_()
    rows = [
        (zero_heads([1, 2], [0]), 0.0),
        (scale_heads([1, 2], 4.0, [0]), 4.0),
        (set_heads([1, 2], 4.0, [0]), 0.0),
        (steer_heads([1, 2], 4.0, [0]), 1.0),
    ]
    for hook, slope in rows:
        (grad,) = torch.autograd.grad(hook(acts, hook=None).sum(), acts)
        expected = torch.ones_like(acts)
        expected[:, 0, 1:3] = slope
        assert torch.equal(grad, expected)


def test_gradients_reach_what_is_set_or_added():
    lorsa, x = random_lorsa(), random_x()
    for make in (set_heads, steer_heads):
        amounts = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        edited(lorsa, x, make([4, 8], amounts, [0, 1, -1])).sum().backward()
        # d(sum of outputs) / d amount = sum of w_O, at 2 sequences times 3 positions
        torch.testing.assert_close(amounts.grad, 6 * lorsa.W_O[[4, 8]].sum(-1).detach())


def test_gradients_reach_the_weights_through_an_edit():
    lorsa, x = random_lorsa(), random_x()
    edited(lorsa, x, zero_heads(range(N_HEADS))).sum().backward()
    assert lorsa.b_O.grad.tolist() == [10.0] * 6
    assert not lorsa.W_V.grad.any()
    lorsa.zero_grad()
    edited(lorsa, x, zero_heads([0])).sum().backward()
    assert lorsa.W_V.grad[1:].any()
    assert not lorsa.W_V.grad[0].any()
    assert not lorsa.W_O.grad[0].any()


# ----------------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (zero_heads([3, 10]), "heads holds 10, but hook_acts_post has 0 to 9"),
        (scale_heads([-1], 2.0), "heads holds -1, but hook_acts_post has 0 to 9"),
        (set_heads([0], 1.0, [0, 5]), "positions holds 5, but hook_acts_post has -5 to 4"),
        (steer_heads([0], 1.0, [-6]), "positions holds -6, but hook_acts_post has -5 to 4"),
    ],
)
def test_heads_and_positions_out_of_range_are_named(hook, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        edited(random_lorsa(), random_x(), hook)


def test_one_number_in_place_of_a_sequence_is_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=r"^heads = 17 must be a sequence: give \[17\]$"):
        zero_heads(17)
    with pytest.raises(TypeError, match=r"^positions = -1 must be a sequence: give \[-1\]$"):
        steer_heads([0], 1.0, -1)
    with pytest.raises(TypeError, match="float"):
        zero_heads([1.5])
