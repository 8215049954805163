"""The pure functions against loops, complex numbers, PyTorch's own and published values."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from lorsa_lens.functional.attention import (
    attend,
    attention_pattern,
    attention_scores,
    mix_values,
)
from lorsa_lens.functional.code import (
    Code,
    compact,
    decode,
    decode_dense,
    keep_all,
    to_dense,
)
from lorsa_lens.functional.masks import AttentionMask, alibi_bias, plain_alibi_slopes
from lorsa_lens.functional.norm import qk_rms_norm
from lorsa_lens.functional.rotary import plain_frequencies, rotary_angles, rotate
from lorsa_lens.functional.selection import (
    batch_threshold,
    select_above,
    select_positive,
    select_topk,
    writing_norms,
)
from lorsa_lens.functional.tiles import Tiling

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


def doubles(*shape, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- masks


@st.composite
def masks(draw):
    """Fields of a mask; `keep` as the shape [batch, query or 1, key] of a random one."""
    n_queries, n_past = draw(st.integers(1, 7)), draw(st.integers(0, 6))
    keep = None
    if draw(st.booleans()):
        keep = (draw(st.integers(1, 3)), draw(st.sampled_from([1, n_queries])), n_queries + n_past)
    return dict(
        n_queries=n_queries,
        n_keys=n_queries + n_past,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 15)),
        keep=keep,
    )


def make_mask(values, seed):
    torch.manual_seed(seed)
    keep = None if values["keep"] is None else torch.rand(values["keep"]) < 0.6
    return AttentionMask(**{**values, "keep": keep})


def sees(mask, batch, query, key, keep=True):
    """Whether a query sees a key, by the words of the fields."""
    slot = mask.n_keys - mask.n_queries + query  # queries are the last of the slots
    if mask.causal and key > slot:
        return False
    if mask.window is not None and key < slot - (mask.window - 1):
        return False
    if keep and mask.keep is not None:
        return bool(mask.keep[batch, query if mask.keep.shape[1] > 1 else 0, key])
    return True


@settings(max_examples=200, deadline=None)
@given(values=masks(), seed=seeds, data=st.data())
def test_visible_is_the_rule_in_a_loop(values, seed, data):
    mask = make_mask(values, seed)
    q0, k0 = (data.draw(st.integers(0, n - 1)) for n in (mask.n_queries, mask.n_keys))
    q1 = data.draw(st.integers(q0 + 1, mask.n_queries))
    k1 = data.draw(st.integers(k0 + 1, mask.n_keys))
    visible = mask.visible((q0, q1), (k0, k1), CPU)
    n_batch = 1 if mask.keep is None else mask.keep.shape[0]
    expected = torch.tensor(
        [
            [[sees(mask, b, q, k) for k in range(k0, k1)] for q in range(q0, q1)]
            for b in range(n_batch)
        ]
    )
    if visible is None:
        assert expected.all()
    else:
        assert visible.dtype == torch.bool
        assert torch.equal(visible, expected)
    distances = mask.distances((q0, q1), (k0, k1), CPU)
    assert distances.tolist() == [
        [mask.n_keys - mask.n_queries + q - k for k in range(k0, k1)] for q in range(q0, q1)
    ]


@settings(max_examples=200, deadline=None)
@given(values=masks(), data=st.data())
def test_key_range_is_the_first_and_last_key_that_is_seen(values, data):
    mask = AttentionMask(**{**values, "keep": None})
    start = data.draw(st.integers(0, mask.n_queries - 1))
    stop = data.draw(st.integers(start + 1, mask.n_queries))
    seen = [k for k in range(mask.n_keys) for q in range(start, stop) if sees(mask, 0, q, k)]
    assert mask.key_range(start, stop) == (min(seen), max(seen) + 1)


def test_a_mask_that_hides_nothing_is_none():
    assert AttentionMask(1, 6).visible((0, 1), (0, 6), CPU) is None  # one new token, a cache
    assert AttentionMask(4, 4, causal=False).visible((0, 4), (0, 4), CPU) is None
    assert AttentionMask(4, 4, window=4).visible((3, 4), (0, 4), CPU) is None
    assert AttentionMask(5, 5, window=4).visible((4, 5), (0, 5), CPU).tolist() == [
        [[False, True, True, True, True]]
    ]


# ----------------------------------------------------------------------------------------- ALiBi


def test_alibi_slopes_of_eight_heads_are_the_published_ones():
    assert plain_alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    sixteen = plain_alibi_slopes(16)  # from 2 ** -0.5 on, each 2 ** -0.5 times the one before
    assert sixteen[0] == pytest.approx(0.7071067811865476)
    assert sixteen[1::2] == plain_alibi_slopes(8)


def test_alibi_bias_written_out():
    distances = AttentionMask(2, 3).distances((0, 2), (0, 3), CPU)
    bias = alibi_bias(torch.tensor([0.5, 0.25]), distances)
    assert bias.tolist() == [
        [[-0.5, 0.0, 0.0], [-1.0, -0.5, 0.0]],
        [[-0.25, 0.0, 0.0], [-0.5, -0.25, 0.0]],
    ]


# ------------------------------------------------------------------------------------- attention


def dense_attention(q, k, values, mask, divisor, soft_cap=None, slopes=None):
    """Every score in a loop, softmax over the keys that are seen, zeros where none is."""
    n_heads, group = q.shape[2], values.shape[-1] // q.shape[2]
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(k.shape[1]) if sees(mask, b, i, j)]
            for h in range(n_heads):
                if not keys:
                    rows.append(torch.zeros(group, dtype=q.dtype))
                    continue
                scores = torch.stack([(q[b, i, h] * k[b, j, h]).sum() / divisor for j in keys])
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if slopes is not None:
                    back = [max(0, mask.n_keys - mask.n_queries + i - j) for j in keys]
                    scores = scores - slopes[h] * torch.tensor(back)
                weights = scores.exp() / scores.exp().sum()
                rows.append(weights @ values[b, keys, h * group : (h + 1) * group])
    return torch.stack(rows).reshape(*q.shape[:2], values.shape[-1])


@settings(max_examples=50, deadline=None)
@given(
    values=masks(),
    seed=seeds,
    rows=st.integers(1, 8),
    soft_cap=st.sampled_from([None, 1.5]),
    alibi=st.booleans(),
)
def test_attend_equals_the_loop_for_every_size_of_block(values, seed, rows, soft_cap, alibi):
    mask = make_mask(values, seed)
    n_batch = 2 if mask.keep is None else mask.keep.shape[0]
    q = doubles(n_batch, mask.n_queries, 2, 3).requires_grad_()
    k = doubles(n_batch, mask.n_keys, 2, 3).requires_grad_()
    v = doubles(n_batch, mask.n_keys, 6).requires_grad_()
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64) if alibi else None
    options = {"divisor": 1.7, "soft_cap": soft_cap, "alibi_slopes": slopes}
    n_scores = rows * n_batch * 2 * mask.n_keys
    expected = dense_attention(q, k, v, mask, 1.7, soft_cap, slopes)
    by_circuit = rearrange(v, "b k (h g) -> b k h g", h=2)
    out = attend(q, k, by_circuit, mask, **options, n_scores=n_scores)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        lean = attend(q, k, by_circuit, mask, **options, n_scores=n_scores)
    torch.testing.assert_close(lean, expected, rtol=1e-11, atol=1e-11)
    whole = mix_values(attention_pattern(attention_scores(q, k, mask, **options)), v)
    torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-11)

    probe = doubles(*out.shape)
    touched = 0 * (q.sum() + k.sum() + v.sum())  # where nothing is seen, the loop has no gradient
    theirs = torch.autograd.grad((expected * probe).sum() + touched, (q, k, v))
    ours = torch.autograd.grad((out * probe).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_tiles_hold_few_scores(monkeypatch):
    sizes = []
    score = Tiling.score

    def recording(self, products, tile):
        sizes.append(tuple(products.shape))
        return score(self, products, tile)

    monkeypatch.setattr(Tiling, "score", recording)
    q, k, v = doubles(1, 6, 2, 4), doubles(1, 8, 2, 4), doubles(1, 8, 2, 1)
    attend(q, k, v, AttentionMask(6, 8, window=3), divisor=2.0, n_scores=2 * 8)
    # two rows of a head at a time, against the keys that they can see
    assert sizes == [(1, 2, 4)] * 6


def test_a_query_that_sees_nothing_attends_to_nothing():
    keep = torch.tensor([[[False, False, True]]])
    q, k, v = (doubles(1, 3, 1, 2).requires_grad_() for _ in range(3))
    mask = AttentionMask(3, 3, keep=keep)
    pattern = attention_pattern(attention_scores(q, k, mask, divisor=1.0))
    assert pattern[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    out = attend(q, k, v, mask, divisor=1.0)
    assert torch.equal(out[0], torch.stack((*torch.zeros(2, 2).double(), v[0, 2, 0])))
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_float32(dtype):
    q, k = doubles(1, 3, 2, 4).to(dtype), doubles(1, 3, 2, 4).to(dtype)
    scores = attention_scores(q, k, AttentionMask(3, 3), divisor=2.0, soft_cap=5.0)
    assert scores.dtype == torch.float32
    out = attend(q, k, doubles(1, 3, 2, 2).to(dtype), AttentionMask(3, 3), divisor=2.0)
    assert out.dtype == dtype


# ---------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize(("n_rotated", "scale"), [(8, 1.0), (8, 1.3), (4, 0.5), (2, 1.0)])
def test_rotation_is_multiplication_by_complex_numbers(adjacent_pairs, n_rotated, scale):
    x = doubles(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 400], [7, 0, 0, 1, 2]])
    frequencies = [1.0, 0.3, 1e-4, 2.5][: n_rotated // 2]
    cos, sin = rotary_angles(positions, frequencies, scale=scale, dtype=torch.float64)
    rotated = rotate(x, cos, sin, adjacent_pairs=adjacent_pairs)

    half = n_rotated // 2
    real = list(range(0, n_rotated, 2)) if adjacent_pairs else list(range(half))
    imaginary = [i + 1 for i in real] if adjacent_pairs else [i + half for i in real]
    angles = positions[..., None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.full_like(angles, scale), angles)[:, :, None]
    turned = torch.complex(x[..., real], x[..., imaginary]) * turn
    expected = x.clone()
    expected[..., real], expected[..., imaginary] = turned.real, turned.imag
    torch.testing.assert_close(rotated, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(rotated[..., n_rotated:], x[..., n_rotated:])


def test_rotated_products_depend_on_the_distance_only():
    q, k = doubles(1, 1, 1, 8), doubles(1, 1, 1, 8)
    frequencies = plain_frequencies(8, 100.0)

    def product(at_q, at_k):
        turned = []
        for x, position in ((q, at_q), (k, at_k)):
            cos, sin = rotary_angles(
                torch.tensor([[position]]), frequencies, scale=1.0, dtype=torch.float64
            )
            turned.append(rotate(x, cos, sin, adjacent_pairs=False))
        return (turned[0] * turned[1]).sum().item()

    assert product(5, 2) == pytest.approx(product(1003, 1000), abs=1e-10)
    assert product(5, 2) != pytest.approx(product(2, 5), abs=1e-3)
    assert product(9, 9) == pytest.approx((q * k).sum().item())


def test_plain_frequencies_written_out():
    assert plain_frequencies(8, 10000.0) == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert plain_frequencies(2, 500.0) == [1.0]


def test_angles_keep_their_precision_and_rotation_that_of_its_input():
    positions = torch.tensor([[100_000]])
    cos, sin = rotary_angles(positions, [1.0], scale=1.0, dtype=torch.float32)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.item() == pytest.approx(math.cos(100_000), abs=1e-6)
    x = doubles(1, 1, 1, 2).bfloat16()
    assert rotate(x, cos, sin, adjacent_pairs=True).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_over_all_heads_is_pytorchs_on_the_flattened_heads(dtype):
    x, gain = doubles(2, 5, 3, 4).to(dtype), doubles(3, 4).to(dtype)
    ours = qk_rms_norm(x, gain, eps=0.1, over="full")
    wide = torch.promote_types(dtype, torch.float32)
    flat = F.rms_norm(x.flatten(2).to(wide), (12,), gain.flatten().to(wide), eps=0.1)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, flat.unflatten(-1, (3, 4)).to(dtype))


def test_rms_norm_of_each_head_is_pytorchs():
    x, gain = doubles(2, 5, 3, 4), doubles(3, 4)
    ours = qk_rms_norm(x, gain, eps=0.1, over="head")
    for head in range(3):
        expected = F.rms_norm(x[:, :, head], (4,), gain[head], eps=0.1)
        torch.testing.assert_close(ours[:, :, head], expected)


# ----------------------------------------------------------------------------------------- codes


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3),
    pos=st.integers(1, 4),
    heads=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=seeds,
)
def test_a_compact_code_is_the_heads_that_stay(batch, pos, heads, share, seed):
    acts = doubles(batch, pos, heads, seed=seed).requires_grad_()
    stays = torch.rand(batch, pos, heads) < share
    code = compact(acts, stays)
    dense = to_dense(code, heads)
    assert torch.equal(dense, acts * stays)
    n_slots = max(1, int(stays.sum(-1).max()))
    assert code.values.shape == code.indices.shape == (batch, pos, n_slots)
    for b in range(batch):
        for p in range(pos):
            indices, staying = code.indices[b, p].tolist(), stays[b, p].nonzero().flatten().tolist()
            assert len(set(indices)) == n_slots  # no head twice
            assert indices[: len(staying)] == staying  # in order
            assert not code.values[b, p, len(staying) :].any()
    probe = doubles(batch, pos, heads)
    (grad,) = torch.autograd.grad((dense * probe).sum(), acts)
    assert torch.equal(grad, probe * stays)


def test_where_no_head_stays_the_code_is_one_empty_slot():
    acts = doubles(2, 3, 5)
    code = compact(acts, torch.zeros(2, 3, 5, dtype=torch.bool))
    assert code.values.tolist() == [[[0.0]] * 3] * 2
    assert not decode(code, doubles(5, 4)).any()
    assert not decode(code, doubles(50, 4)).any()


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 30),
    k=st.integers(1, 30),
    batch=st.integers(1, 3),
    pos=st.integers(1, 4),
    seed=seeds,
)
def test_decoding_sparsely_or_densely_is_the_same(heads, k, batch, pos, seed):
    k = min(k, heads)
    acts, W_O = doubles(batch, pos, heads, seed=seed), doubles(heads, 5).requires_grad_()
    code = select_topk(acts, writing_norms(W_O), k)
    values = code.values.requires_grad_()
    code = Code(values, code.indices)
    expected = torch.zeros(batch, pos, 5, dtype=torch.float64)
    for b in range(batch):
        for p in range(pos):
            for value, index in zip(values[b, p], code.indices[b, p], strict=True):
                expected[b, p] += value * W_O[index]
    probe = doubles(batch, pos, 5)
    wanted = torch.autograd.grad((expected * probe).sum(), (values, W_O))
    for out in (decode(code, W_O), decode_dense(to_dense(code, heads), W_O)):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad((out * probe).sum(), (values, W_O))
        torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_heads", [16, 17])
def test_decoding_is_sparse_from_four_heads_per_slot_on(n_heads, monkeypatch):
    def refuse(*args):
        raise RuntimeError("dense")

    monkeypatch.setattr("lorsa_lens.functional.code.to_dense", refuse)
    code = Code(doubles(1, 2, 4), torch.randint(0, n_heads, (1, 2, 4)))
    if n_heads == 16:
        with pytest.raises(RuntimeError, match="dense"):
            decode(code, doubles(n_heads, 3))
    else:
        assert decode(code, doubles(n_heads, 3)).shape == (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_sparsely_in_lower_precision(dtype):
    W_O, values = doubles(40, 6), doubles(2, 3, 4)
    indices = torch.randint(0, 40, (2, 3, 4))
    exact = decode(Code(values, indices), W_O)
    out = decode(Code(values.to(dtype), indices), W_O.to(dtype))
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (out.double() - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("n_heads", [4, 40])
def test_a_head_that_is_listed_twice_counts_twice(n_heads):
    code = Code(torch.tensor([[[2.0, 3.0, 5.0]]]), torch.tensor([[[1, 0, 1]]]))
    assert to_dense(code, n_heads)[0, 0, :3].tolist() == [3.0, 7.0, 0.0]
    W_O = torch.eye(n_heads)
    assert decode(code, W_O)[0, 0, :3].tolist() == [3.0, 7.0, 0.0]


def test_a_code_in_which_all_stay():
    acts = doubles(2, 3, 5)
    code = keep_all(acts)
    assert torch.equal(to_dense(code, 5), acts)
    assert code.indices[1, 2].tolist() == [0, 1, 2, 3, 4]
    assert code.indices.untyped_storage().nbytes() == 5 * 8


# -------------------------------------------------------------------------------------- selection

ACTS = torch.tensor([[[3.0, -1.0, 0.5, 0.0], [-2.0, 0.1, 4.0, 1.0]]])  # 1 sequence, 2 tokens
NORMS = torch.tensor([1.0, 2.0, 1.0, 10.0])
# |z| * norm: [[3, 2, 0.5, 0], [2, 0.2, 4, 10]]


@pytest.mark.parametrize(("k", "threshold"), [(1, 4.0), (2, 2.0), (3, 0.5), (4, 0.0), (9, 0.0)])
def test_batch_threshold_is_the_score_of_the_last_head_that_stays(k, threshold):
    assert batch_threshold(ACTS, NORMS, k).item() == pytest.approx(threshold)
    two_sequences = ACTS.reshape(2, 1, 4)
    assert batch_threshold(two_sequences, NORMS, k).item() == pytest.approx(threshold)


def test_heads_above_the_batch_threshold():
    code = select_above(ACTS, NORMS, batch_threshold(ACTS, NORMS, 1))
    assert to_dense(code, 4).tolist() == [[[0, 0, 0, 0], [0, 0, 4, 1]]]
    code = select_above(ACTS, NORMS, batch_threshold(ACTS, NORMS, 2))  # the tie at 2 stays whole
    assert to_dense(code, 4).tolist() == [[[3, -1, 0, 0], [-2, 0, 4, 1]]]


def test_top_k_by_writing_norm():
    dense = [to_dense(select_topk(ACTS, NORMS, k), 4).tolist() for k in (1, 2)]
    assert dense[0] == [[[3, 0, 0, 0], [0, 0, 0, 1]]]
    assert dense[1] == [[[3, -1, 0, 0], [0, 0, 4, 1]]]
    positive = to_dense(select_topk(ACTS, NORMS, 3, positive=True), 4)
    torch.testing.assert_close(positive, torch.tensor([[[3, 0, 0.5, 0], [0, 0.1, 4, 1]]]))
    assert to_dense(select_positive(ACTS), 4).tolist() == ACTS.relu().tolist()


def test_no_gradient_flows_through_writing_norms():
    W_O = doubles(4, 3).requires_grad_()
    norms = writing_norms(W_O)
    assert not norms.requires_grad
    torch.testing.assert_close(norms, W_O.detach().square().sum(-1).sqrt())
    assert not batch_threshold(ACTS.double().requires_grad_(), norms, 2).requires_grad
