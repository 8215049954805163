"""The module against the naive one: values, gradients, hooks, sparse form and memory."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_lorsa, naive_selection, naive_z

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.functional.attention import attend
from lorsa_lens.functional.selection import select_jumprelu

HOOKS = [
    "hook_q",
    "hook_k",
    "hook_rot_q",
    "hook_rot_k",
    "hook_attn_scores",
    "hook_pattern",
    "hook_values",
    "hook_acts_pre",
    "hook_acts_post",
    "hook_recons",
]


@st.composite
def configs(draw, act_fns=("topk", "topk_relu", "batchtopk", "jumprelu", "relu")):
    """Fields of small Lorsas of every kind."""
    n_qk_heads = draw(st.integers(1, 3))
    n_ov_heads = n_qk_heads * draw(st.integers(1, 5))
    d_qk_head = 2 * draw(st.integers(1, 4))
    act_fn = draw(st.sampled_from(act_fns))
    k = None
    if act_fn in ("topk", "topk_relu", "batchtopk"):
        k = draw(st.integers(1, n_ov_heads))
    positions = draw(st.sampled_from(["standard", "rotary", "alibi"]))
    rotary_dim = 2 * draw(st.integers(1, d_qk_head // 2)) if positions == "rotary" else None
    return dict(
        d_model=draw(st.integers(1, 6)),
        n_qk_heads=n_qk_heads,
        d_qk_head=d_qk_head,
        n_ov_heads=n_ov_heads,
        k=k,
        act_fn=act_fn,
        positional_embedding_type=positions,
        rotary_dim=rotary_dim,
        rotary_adjacent_pairs=draw(st.booleans()),
        rotary_dtype="float64",
        attn_scale=draw(st.sampled_from([None, 1.0, 3.0])),
        attn_scores_soft_cap=draw(st.sampled_from([None, 1.5])),
        window_size=draw(st.sampled_from([None, 1, 3])),
        attention_dir=draw(st.sampled_from(["causal", "bidirectional"])),
        qk_norm=draw(st.sampled_from([None, "head"])),
        jumprelu_init_threshold=0.3,
        dtype="float64",
    )


def random_lorsa(cfg, seed=0):
    """A Lorsa none of whose parameters is zero or one."""
    torch.manual_seed(seed)
    lorsa = Lorsa(cfg)
    with torch.no_grad():
        for name, parameter in lorsa.named_parameters():
            if name != "log_threshold":
                parameter.add_(torch.randn_like(parameter) * 0.7)
    return lorsa


def small(**changes):
    values = {"d_model": 6, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 10, "k": 3}
    return LorsaConfig(**{**values, "dtype": "float64", **changes})


@settings(max_examples=60, deadline=None)
@given(fields=configs(), batch=st.integers(1, 3), n_pos=st.integers(1, 7), seed=st.integers(0, 99))
def test_values_and_gradients_equal_the_naive_lorsa(fields, batch, n_pos, seed):
    cfg = LorsaConfig(**fields)
    lorsa = random_lorsa(cfg, seed)
    lorsa.train(cfg.act_fn == "batchtopk")
    x = torch.randn(batch, n_pos, cfg.d_model, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in lorsa.named_parameters() if name != "log_threshold"]
    parameters = dict(lorsa.named_parameters())
    expected = naive_lorsa(parameters, cfg, x)
    out = lorsa(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(out)
    inputs = [x] + [parameters[name] for name in names]
    ours = torch.autograd.grad((out * probe).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs, allow_unused=True)
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros(()) if b is None else b
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-8, atol=1e-9, msg=f"gradient {name}")


def test_gradcheck_through_the_sparse_path():
    lorsa = random_lorsa(small(n_ov_heads=24, k=2, positional_embedding_type="rotary"))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in lorsa.named_parameters()]
    tensors = [parameter.detach().requires_grad_() for _, parameter in lorsa.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(lorsa, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *tensors), fast_mode=True)


def test_several_blocks_of_queries_equal_one(monkeypatch):
    lorsa = random_lorsa(small(window_size=5))
    x = torch.randn(2, 23, 6, dtype=torch.float64, requires_grad=True)
    whole = lorsa(x)
    (grad_whole,) = torch.autograd.grad(whole.square().sum(), x)
    four_rows = partial(attend, n_scores=2 * 2 * 23 * 4)
    monkeypatch.setattr("lorsa_lens.attention.attend", four_rows)
    blocks = lorsa(x)
    (grad_blocks,) = torch.autograd.grad(blocks.square().sum(), x)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(grad_blocks, grad_whole)


@pytest.mark.parametrize("act_fn", ["topk", "topk_relu", "jumprelu", "relu"])
def test_every_hook_fires_with_its_shape_and_changes_no_number(act_fn):
    k = 3 if act_fn.startswith("topk") else None
    cfg = small(act_fn=act_fn, k=k, positional_embedding_type="rotary", rotary_dtype="float64")
    lorsa = random_lorsa(cfg)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    lean = lorsa(x)
    out, cache = lorsa.run_with_cache(x)
    torch.testing.assert_close(out, lean, rtol=1e-12, atol=1e-12)
    qk, square, ov = (2, 5, 2, 4), (2, 2, 5, 5), (2, 5, 10)
    shapes = dict(zip(HOOKS, [qk] * 4 + [square] * 2 + [ov] * 3 + [(2, 5, 6)], strict=True))
    assert {name: tuple(cache[name].shape) for name in HOOKS} == shapes
    p = dict(lorsa.named_parameters())
    z = naive_z(p, cfg, x)
    torch.testing.assert_close(cache["hook_acts_pre"], z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        cache["hook_acts_post"], naive_selection(z, p, cfg), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(cache["hook_pattern"].sum(-1), torch.ones(2, 2, 5).double())


@pytest.mark.parametrize("name", HOOKS)
def test_an_edit_at_any_hook_changes_the_output(name):
    lorsa = random_lorsa(small(positional_embedding_type="rotary"))
    x = torch.randn(1, 4, 6, dtype=torch.float64)

    def edit(tensor, hook):
        return tensor.flip(1) if name not in ("hook_attn_scores", "hook_pattern") else tensor * 0.5

    with lorsa.hooks(fwd_hooks=[(name, edit)]):
        edited = lorsa(x)
    assert not torch.allclose(edited, lorsa(x))
    assert not lorsa.has_hooks()


def test_backward_hooks_see_the_dense_code():
    lorsa = random_lorsa(small())
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    seen = []
    with lorsa.hooks(bwd_hooks=[("hook_acts_post", lambda grad, hook: seen.append(grad.clone()))]):
        lorsa(x).sum().backward()
    # d(sum of outputs) / dz^i = sum over d_model of w_O^i, also for heads that did not stay
    torch.testing.assert_close(seen[0], lorsa.W_O.sum(-1).expand(1, 4, 10))


def test_muted_hooks_do_not_fire():
    lorsa = random_lorsa(small())
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    clean = lorsa(x)
    with lorsa.hooks(fwd_hooks=[("hook_recons", lambda t, hook: t * 0)]), lorsa.hooks_muted():
        torch.testing.assert_close(lorsa(x), clean)


def test_encode_and_decode_are_the_forward_pass():
    lorsa = random_lorsa(small())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    code = lorsa.encode(x)
    assert code.values.shape == code.indices.shape == (2, 5, 3)
    torch.testing.assert_close(lorsa.decode(code), lorsa(x))
    everything = lorsa.encode(x)
    with lorsa.hooks(fwd_hooks=[("hook_acts_post", lambda t, hook: t * 2)]):
        doubled = lorsa.encode(x)
    torch.testing.assert_close(doubled.values.sum(), 2 * everything.values.sum())


def test_z_pattern_sums_to_the_pre_activation_and_pattern_is_the_hooked_one():
    lorsa = random_lorsa(small())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    _, cache = lorsa.run_with_cache(x)
    heads = [7, 0, 9]
    z_pattern = lorsa.z_pattern(x, heads)
    torch.testing.assert_close(z_pattern.sum(-1), cache["hook_acts_pre"][..., heads].movedim(-1, 1))
    torch.testing.assert_close(lorsa.pattern(x, [1]), cache["hook_pattern"][:, [1]])
    with pytest.raises(ValueError, match="head 2 is out of range"):
        lorsa.pattern(x, [2])


def test_steps_with_a_state_equal_one_pass():
    lorsa = random_lorsa(small(positional_embedding_type="rotary", window_size=3))
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    state, parts = None, []
    for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
        out, state = lorsa.step(piece, past=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), lorsa(x))


def test_padding_on_the_left_changes_nothing():
    lorsa = random_lorsa(small(positional_embedding_type="rotary"))
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 3, 6, dtype=torch.float64), x), dim=1)
    keep = torch.tensor([[[False] * 3 + [True] * 6]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    out = lorsa(padded, keep=keep, positions=positions)
    torch.testing.assert_close(out[:, 3:], lorsa(x))
    assert torch.isfinite(out).all()


def test_batchtopk_learns_a_threshold_that_keeps_k_per_token_on_average():
    lorsa = random_lorsa(small(act_fn="batchtopk", n_ov_heads=40, k=4))
    x = torch.randn(4, 32, 6, dtype=torch.float64)
    untrained = lorsa.encode(x)
    assert (untrained.values != 0).sum(-1).eq(4).all()  # each token its own top k
    lorsa.train()
    for _ in range(400):
        code = lorsa.encode(torch.randn(4, 32, 6, dtype=torch.float64))
        assert int((code.values != 0).sum()) == 4 * 4 * 32
    lorsa.eval()
    mean_l0 = (lorsa.encode(x).values != 0).sum(-1).double().mean()
    assert abs(mean_l0 - 4) < 0.5


def test_jumprelu_threshold_gradient_is_the_rectangle_kernel():
    acts = torch.tensor([[[0.9, 1.05, 2.0, 0.1]]], dtype=torch.float64)
    norms = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    thresholds = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)
    code = select_jumprelu(acts, norms, thresholds, bandwidth=0.4)
    values = torch.zeros(4, dtype=torch.float64)
    values = values.scatter_add(0, code.indices[0, 0], code.values[0, 0] * 3.0)
    values.sum().backward()
    # -(threshold / bandwidth) * upstream for heads within bandwidth / 2 of their threshold
    torch.testing.assert_close(thresholds.grad, torch.tensor([-7.5, -7.5, 0.0, 0.0]).double())
    assert values.tolist() == pytest.approx([0.0, 3.15, 6.0, 0.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lower_precisions_stay_close(dtype):
    exact = random_lorsa(small(k=10))
    lorsa = Lorsa(small(k=10, dtype=dtype))
    lorsa.load_state_dict(exact.state_dict())
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    out = lorsa(x.to(lorsa.W_O.dtype))
    assert out.dtype == getattr(torch, dtype)
    tolerance = {"bfloat16": 0.06, "float16": 0.01, "float32": 1e-5}[dtype]
    scale = exact(x).abs().max()
    assert (out.double() - exact(x)).abs().max() < tolerance * scale


def test_a_wrong_width_is_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 5\).*d_model = 6"):
        Lorsa(small())(torch.randn(1, 4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \(4, 6\)"):
        Lorsa(small())(torch.randn(4, 6, dtype=torch.float64))


def test_nothing_is_tied_to_a_context_size():
    lorsa = random_lorsa(small(positional_embedding_type="rotary"))
    assert max(tensor.numel() for tensor in lorsa.state_dict().values()) == 60
    assert lorsa(torch.randn(1, 3000, 6, dtype=torch.float64)).shape == (1, 3000, 6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting")
def test_memory_of_a_long_forward_pass_stays_under_100_mb():
    """2048 tokens, 48 query-key circuits, 6144 heads; the dense recipe needs over 2 GB."""
    command = [sys.executable, "-m", "benchmarks.lorsa", "--shape", "C", "--memory", "ours"]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert 50 < float(out.stdout) < 100
