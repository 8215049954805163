"""The sparse decode, the tiled attention and the lean selection, each against plain dense maths."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorsa_lens import Lorsa, LorsaConfig, attention
from lorsa_lens.functional import (
    active_rows,
    precision,
    projection,
    selection,
    tiles,
)
from lorsa_lens.functional.attention import (
    attend,
    attention_pattern,
    attention_scores,
    mix_values,
)
from lorsa_lens.functional.masks import AttentionMask
from lorsa_lens.functional.selection import select_topk
from lorsa_lens.functional.sparse_decode import decode_code, gradient_for_values
from tests.naive import naive_lorsa

seeds = st.integers(0, 2**32 - 1)


class Allocations(TorchDispatchMode):
    """Every storage that an operator makes: its name and the number of elements.

    An operator of our own counts as one: what it makes inside is looked at by itself.
    """

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if is_dense(t)}
        for t in tree_leaves(out):
            if is_dense(t) and storage_of(t) not in given:
                self.made.append((str(func), t.untyped_storage().nbytes() // t.element_size()))
        return out

    def of_at_least(self, size):
        return sorted(name for name, n in self.made if n >= size)


def storage_of(t):
    return t.untyped_storage()._cdata


def is_dense(t):
    return isinstance(t, torch.Tensor) and t.layout == torch.strided


def lorsa_of(seed, *, group, n_qk_heads=2, d_qk_head=4, k=None, act_fn="topk", **changes):
    torch.manual_seed(seed)
    n_ov = group * n_qk_heads
    cfg = LorsaConfig(
        d_model=5,
        n_qk_heads=n_qk_heads,
        d_qk_head=d_qk_head,
        n_ov_heads=n_ov,
        k=k or n_ov,
        act_fn=act_fn,
        positional_embedding_type="rotary",
        rotary_dtype="float64",
        dtype="float64",
        **changes,
    )
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.7)
    return lorsa


# ----------------------------------------------------------------------------------------- decode


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 7),
    heads=st.integers(1, 40),
    k=st.integers(1, 40),
    zeros=st.booleans(),
    twice=st.booleans(),
    seed=seeds,
)
def test_sparse_decode_and_its_gradients_are_those_of_the_dense_product(
    tokens, heads, k, zeros, twice, seed
):
    torch.manual_seed(seed)
    k = min(k, heads)
    indices = torch.stack([torch.randperm(heads)[:k] for _ in range(tokens)])[None]
    if twice:
        indices[..., -1] = indices[..., 0]  # a head that is named two times counts two times
    values = torch.randn(1, tokens, k, dtype=torch.float64)
    values = (values * (0 if zeros else 1)).requires_grad_()
    W_O = torch.randn(heads, 3, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(1, tokens, heads, dtype=torch.float64).scatter_add(-1, indices, values)
    expected, out = dense @ W_O, decode_code(values[0], indices[0], W_O)[None]
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), (values, W_O))
    theirs = torch.autograd.grad((expected * probe).sum(), (values, W_O))
    torch.testing.assert_close(ours, theirs)


def test_gradient_for_values_without_mkl_is_the_same(monkeypatch):
    indices = torch.tensor([[3, 0], [7, 7]])
    grad, W_O = torch.randn(2, 4), torch.randn(9, 4)
    sampled = gradient_for_values(grad, indices, W_O)
    torch.testing.assert_close(sampled, torch.einsum("tm,tkm->tk", grad, W_O[indices]))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr("lorsa_lens.functional.sparse_decode.GATHERED", 8)  # one token at a time
    torch.testing.assert_close(gradient_for_values(grad, indices, W_O), sampled)


# -------------------------------------------------------------------------------------- selection


@settings(max_examples=80, deadline=None)
@given(
    pos=st.integers(1, 9),
    heads=st.integers(1, 24),
    k=st.integers(1, 24),
    held=st.integers(1, 60),
    members=st.sampled_from([2, 3, 8]),
    kind=st.sampled_from(["random", "ties", "zeros", "negative"]),
    positive=st.booleans(),
    seed=seeds,
)
def test_topk_in_two_stages_keeps_the_largest_scores(
    pos, heads, k, held, members, kind, positive, seed
):
    torch.manual_seed(seed)
    acts, k = torch.randn(2, pos, heads, dtype=torch.float64), min(k, heads)
    acts = {"random": acts, "ties": acts.round(), "zeros": acts * 0, "negative": -acts.abs()}[kind]
    acts.requires_grad_()
    norms = torch.rand(heads, dtype=torch.float64).add(0.1) if kind != "ties" else torch.ones(heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SCORES_HELD", held)
        patch.setattr(selection, "MEMBERS", members)
        code = select_topk(acts, norms, k, positive=positive)
    z = acts.detach().clamp(min=0) if positive else acts.detach()
    expected = (z.abs() * norms).sort(-1, descending=True).values[..., :k]
    kept = (code.values.detach().abs() * norms[code.indices]).sort(-1, descending=True).values
    torch.testing.assert_close(kept, expected)
    assert torch.equal(code.values.detach(), z.gather(-1, code.indices))
    assert all(len(set(row.tolist())) == k for row in code.indices.flatten(0, 1))
    (grad,) = torch.autograd.grad(code.values.sum(), acts)
    live = (acts > 0) if positive else torch.ones_like(acts, dtype=torch.bool)
    stays = torch.zeros_like(acts).scatter(-1, code.indices, 1.0) * live
    assert torch.equal(grad, stays)


# ----------------------------------------------------------------------------------- whole Lorsas


@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from([1, 3, 4, 16]),  # 4 is d_qk_head; from 16 on, values lie by circuit
    n_pos=st.integers(1, 9),
    k=st.sampled_from([1, 2, None]),
    act_fn=st.sampled_from(["topk", "topk_relu"]),
    window=st.sampled_from([None, 2]),
    cap=st.sampled_from([None, 1.5]),
    few=st.sampled_from([0.0, 1.0]),  # gradients of active queries only, or of all
    frozen=st.booleans(),
    shift=st.sampled_from([0.0, -50.0]),
    n_scores=st.sampled_from([1, 20, 1000]),
    seed=st.integers(0, 999),
)
def test_values_and_every_gradient_are_the_naive_ones(
    group, n_pos, k, act_fn, window, cap, few, frozen, shift, n_scores, seed
):
    lorsa = lorsa_of(
        seed, group=group, k=k, act_fn=act_fn, window_size=window, attn_scores_soft_cap=cap
    )
    with torch.no_grad():
        lorsa.b_V.add_(shift)  # with relu, no head is positive
    parameters = dict(lorsa.named_parameters())
    x = torch.randn(2, n_pos, 5, dtype=torch.float64, requires_grad=True)
    expected = naive_lorsa(parameters, lorsa.cfg, x)
    inputs = {"x": x} if frozen else {"x": x, **parameters}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SCORES", n_scores)
        patch.setattr(active_rows, "FEW", few)
        patch.setattr(attention, "HELD", 10 * n_scores)
        patch.setattr(projection, "HELD", 10 * n_scores)
        with torch.no_grad():
            lean = lorsa(x)
            stepped, _ = lorsa.step(x)
        lorsa.requires_grad_(not frozen)
        out = lorsa(x)
        probe = torch.randn_like(out)
        ours = torch.autograd.grad((out * probe).sum(), list(inputs.values()), allow_unused=True)
    lorsa.requires_grad_()
    for values in (lean, stepped, out):
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    theirs = torch.autograd.grad((expected * probe).sum(), list(inputs.values()), allow_unused=True)
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=f"gradient {name}")


@pytest.mark.parametrize("few", [0.0, 1.0])
@pytest.mark.parametrize("own", [True, False])
def test_gradients_where_some_keys_are_hidden(few, own, monkeypatch):
    monkeypatch.setattr(active_rows, "FEW", few)
    keep = torch.rand(2, 6 if own else 1, 8) < 0.6
    q, k = torch.randn(2, 6, 3, 4), torch.randn(2, 8, 3, 4)
    v, slopes = torch.randn(2, 8, 3, 5), torch.tensor([0.5, 0.1, 0.0])
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    mask = AttentionMask(6, 8, keep=keep)
    options = {"divisor": 2.0, "alibi_slopes": slopes.double()}
    scores = attention_scores(*inputs[:2], mask, **options)
    dense = mix_values(attention_pattern(scores), rearrange(inputs[2], "b k h g -> b k (h g)"))
    probe = torch.randn_like(dense) * (torch.rand(2, 6, 1) < 0.5)
    theirs = torch.autograd.grad((dense * probe).sum(), inputs)
    ours = torch.autograd.grad((attend(*inputs, mask, **options) * probe).sum(), inputs)
    # A query that sees nothing: the dense softmax has no gradient there.
    torch.testing.assert_close(ours, tuple(t.nan_to_num(0.0) for t in theirs))


def test_a_wide_group_in_float32():
    lorsa = lorsa_of(0, group=1024, n_qk_heads=1, k=8)
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    expected = naive_lorsa(dict(lorsa.named_parameters()), lorsa.cfg, x)
    out = lorsa.float()(x.float())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_training_steps_are_deterministic():
    grads = []
    for _ in range(2):
        lorsa = lorsa_of(3, group=16, k=2).float()
        lorsa(torch.randn(2, 40, 5)).square().sum().backward()
        grads.append([parameter.grad for parameter in lorsa.parameters()])
    assert all(map(torch.equal, *grads))


# -------------------------------------------------------------------------------------- precision


def chosen_alike(one, other):
    """Share of slots that keep the same head."""
    pairs = zip(
        one.indices.flatten(0, 1).tolist(), other.indices.flatten(0, 1).tolist(), strict=True
    )
    return sum(len(set(a) & set(b)) for a, b in pairs) / one.indices.numel()


def test_bfloat16_that_would_be_emulated_is_float32(monkeypatch):
    lorsa = lorsa_of(0, group=16, k=4).float()
    x = torch.randn(2, 40, 5)
    expected = lorsa.encode(x)
    for native, alike in ((False, 1.0), (True, 0.9)):
        monkeypatch.setattr(precision, "has_bfloat16_products", lambda _, native=native: native)
        with torch.autocast("cpu", torch.bfloat16):
            code = lorsa.encode(x)
            out = lorsa(x)
        assert code.values.dtype == out.dtype == torch.float32
        assert chosen_alike(code, expected) >= alike
        exact = torch.equal(out, lorsa(x))
        assert exact != native


def test_weights_in_bfloat16_are_computed_with_in_float32_where_that_is_faster(monkeypatch):
    lorsa = lorsa_of(0, group=16, k=4).bfloat16()
    lorsa.cfg = lorsa.cfg.replace(dtype="bfloat16")
    x = torch.randn(2, 40, 5).bfloat16()
    wide = lorsa_of(0, group=16, k=4)
    wide.load_state_dict({name: t.double() for name, t in lorsa.state_dict().items()})
    expected = wide(x.double())
    errors = []
    for native in (False, True):
        monkeypatch.setattr(precision, "has_bfloat16_products", lambda _, native=native: native)
        with torch.no_grad():
            out = lorsa(x)
        assert out.dtype == torch.bfloat16
        errors.append((out.double() - expected).abs().mean().item())
    assert errors[0] < errors[1]


# ----------------------------------------------------------------------------------------- memory


def small_tiles(monkeypatch):
    monkeypatch.setattr(selection, "SCORES_HELD", 2**12)
    monkeypatch.setattr(tiles, "SCORES", 2**12)
    for module in (attention, projection):
        monkeypatch.setattr(module, "HELD", 2**12)


def test_no_large_tensor_but_activations(monkeypatch):
    """With 256 tokens of 512 heads, only the pre-activations have a place for each."""
    small_tiles(monkeypatch)
    lorsa = lorsa_of(0, group=64, n_qk_heads=8, d_qk_head=2, k=4)
    x = torch.randn(1, 256, 5, dtype=torch.float64)
    with Allocations() as seen, torch.no_grad():
        lorsa(x)
    assert seen.of_at_least(256 * 512) == ["aten.new_empty.default"]
    # no scores of all queries: those would be 8 * 256 * 256
    assert len(seen.of_at_least(256 * 64 + 1)) == 1


def test_training_holds_values_activations_and_their_gradients(monkeypatch):
    small_tiles(monkeypatch)
    lorsa = lorsa_of(0, group=64, n_qk_heads=8, d_qk_head=2, k=4)
    x = torch.randn(1, 256, 5, dtype=torch.float64)
    with Allocations() as seen:
        lorsa(x).square().sum().backward()
    assert seen.of_at_least(256 * 64 + 1) == [
        "aten.new_zeros.default",  # gradient of the activations: the chosen ones, among zeros
        "lorsa_lens.mix.default",  # activations
        "lorsa_lens.mix_backward.default",  # gradient of the values
        "lorsa_lens.project.default",  # values
    ]


@pytest.mark.parametrize("alone", [True, False])
def test_attention_makes_nothing_larger_than_its_gradients(alone, monkeypatch):
    """Inside its operators: no [head, query, key], however the queries are worked on."""
    small_tiles(monkeypatch)
    q, k = (torch.randn(1, 256, 8, 2) for _ in range(2))
    v, grad = torch.randn(1, 256, 8, 4), torch.zeros(1, 256, 32)
    grad[:, ::8, 0] = 1.0
    tiling = tiles.Tiling(AttentionMask(256, 256), 1.0, None, None)
    with Allocations() as seen:
        tiles.mix_by_tiles(q, k, v, tiling, torch.empty(1, 256, 32))
        if alone:
            active = active_rows.active_rows(grad, group=4)
            active_rows.mix_backward_of_rows(grad, q, k, v, tiling, active)
        else:
            tiles.mix_by_tiles_backward(grad, q, k, v, tiling)
    assert max(n for _, n in seen.made) <= 256 * 32  # values; all scores would be 64 times that


# ---------------------------------------------------------------------------------------- compile


COMPILED = """
import torch
from lorsa_lens import Lorsa, LorsaConfig
cfg = LorsaConfig(d_model=5, n_qk_heads=2, d_qk_head=4, n_ov_heads=32, k=2,
                  positional_embedding_type="rotary", dtype="float64")
lorsa = Lorsa(cfg)
x = torch.randn(2, 9, 5, dtype=torch.float64)
compiled = torch.compile(lorsa.forward, fullgraph=True, backend="aot_eager")
runs = []
for run in (lorsa, compiled):
    out = run(x)
    runs.append((out, *torch.autograd.grad(out.square().sum(), list(lorsa.parameters()))))
torch.testing.assert_close(*runs)
"""


def test_compiles_to_one_graph_with_its_backward_pass():
    """In a process without the checks of annotations, at which graphs break."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
