"""A head's scores, taken apart and put together again, on every kind of attention."""

import numpy as np
import pytest
import torch
import zoo
from einops import einsum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorsa_lens import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.singular import Greedy, QKHead, basis, break_down, record_stream
from lorsa_lens.singular.basis import checked_svd, haar, head_basis
from lorsa_lens.singular.breakdown import SIDES
from lorsa_lens.singular.components import Firing

N_POS = 9


def random_matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("kind", zoo.kind_params)
def test_terms_sum_to_the_cached_scores_in_every_basis(kind):
    model, tokens = kind.build(torch.float32), zoo.tokens(1, N_POS)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        records = record_attention(model, tokens, range(len(model.blocks)))
    for layer, record in records.items():
        x = (record.x if record.qk_input is None else record.qk_input)[0]
        keep = None if record.keep is None else record.keep[0]
        pattern = cached(cache, f"blocks.{layer}.attn.hook_pattern")
        scores = cached(cache, f"blocks.{layer}.attn.hook_attn_scores")
        n_heads = record_heads(model, layer)
        for head in (0, n_heads - 1):
            for name in ("singular", "rotated", "identity"):
                form = QKHead.from_attention(model, layer, head, basis=name, seed=3)
                reading = form.reading(x, positions=record.positions[0], keep=keep)
                terms = reading.terms(N_POS - 1, 3)
                assert terms.sum() == pytest.approx(reading.raw[N_POS - 1, 3].item(), abs=1e-5)
                summed = reading.scores(reading.a @ reading.b.mT / form.divisor)
                if pattern is not None:
                    torch.testing.assert_close(summed.softmax(-1), pattern[head], atol=1e-4, rtol=0)
                # Where a bridge leaves attention to Hugging Face, both hooks show the pattern.
                if scores is not None and not torch.equal(scores, pattern):
                    seen = reading.visible
                    torch.testing.assert_close(summed[seen], scores[head][seen], atol=1e-4, rtol=0)


def cached(cache, name):
    """An activation of the one prompt; None where this host's attention does not show it."""
    try:
        return cache[name][0].double()
    except KeyError:
        return None


def record_heads(model, layer):
    from lorsa_lens.hosts import host_of

    return len(host_of(model).read_attention(layer).W_Q)


STREAM_KINDS = [
    p for p in zoo.kind_params if p.values[0].name != "bert" and "native" not in p.values[0].name
]


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_components_sum_to_the_raw_scores_on_both_sides(kind):
    """Against the heads' own queries and keys: unfolded norms, post-norms, QK norms and all."""
    model = kind.build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, N_POS))
    layer, dest = len(stream.layers) - 1, N_POS - 2
    reading = stream.reading(layer, 1)
    seen = reading.visible[dest]
    for side in SIDES:
        for split in (False, True):
            terms = break_down(stream, Firing(layer, 1, dest, 2), side, split_embedding=split)
            parts = torch.stack([terms.part(c) for c in range(len(terms.components))])
            total = parts.sum((0, 1))
            torch.testing.assert_close(total[seen], reading.raw[dest][seen], atol=1e-4, rtol=0)
            weights = random_matrix(N_POS) * seen
            torch.testing.assert_close(
                terms.weighted(weights), einsum(parts, weights, "c k t, t -> c k").flatten()
            )
            torch.testing.assert_close(terms.row(7), parts.flatten(0, 1)[7])


def test_embeddings_are_told_apart():
    stream = record_stream(zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 6))
    assert stream.token_embedding.abs().max() > 0.1
    assert stream.position_embedding.abs().max() > 0.1
    torch.testing.assert_close(
        stream.token_embedding + stream.position_embedding, stream.layers[0].resid_pre
    )
    firing = Firing(1, 0, 4, 2)
    whole = break_down(stream, firing, "dest")
    split = break_down(stream, firing, "dest", split_embedding=True)
    kinds = [c.kind for c in split.components[-3:]]
    assert kinds == ["token", "position", "offset"]
    torch.testing.assert_close(split.part(-3) + split.part(-2), whole.part(-2))


def test_a_repeated_token_has_one_token_embedding():
    """The position part is what differs between two places of the same token."""
    model, tokens = zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 6).clone()
    tokens[0, 4] = tokens[0, 1]
    stream = record_stream(model, tokens)
    torch.testing.assert_close(stream.token_embedding[4], stream.token_embedding[1])
    assert (stream.position_embedding[4] - stream.position_embedding[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "bridge-gemma2", "rotary-adjacent", "shortformer"])
def test_what_a_head_writes_of_each_source_sums_to_attention(name):
    stream = record_stream(zoo.by_name(name).build(torch.float32), zoo.tokens(1, N_POS))
    for layer in stream.layers:
        parts = [layer.head_out(h, s) for h in range(len(layer.pattern)) for s in range(N_POS)]
        total = torch.stack(parts).sum(0) + layer.bias_out
        torch.testing.assert_close(total, layer.attn_out, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_taken_apart_is_refused():
    from lorsa_lens import UnsupportedAttentionError, splice

    model = zoo.by_name("learned").build(torch.float32)
    with pytest.raises(ValueError, match=r"tokens has shape \[2, 5\]: give the ids of one prompt"):
        record_stream(model, zoo.tokens(2, 5))
    with splice(model, Lorsa.from_attention(model, 1)), pytest.raises(ValueError, match="spliced"):
        record_stream(model, zoo.tokens(1, 5))
    with pytest.raises(ValueError, match="head = 4: layer 1 has heads 0 to 3"):
        QKHead.from_attention(model, 1, 4)
    with pytest.raises(ValueError, match="reads one prompt"):
        QKHead.from_attention(model, 1, 0).reading(torch.zeros(4, 5))
    bert = zoo.by_name("bert").build(torch.float32)
    with pytest.raises(UnsupportedAttentionError, match="no sum of what attention"):
        record_stream(bert, zoo.tokens(1, 5))


# -------------------------------------------------------------------------------------- Lorsas


@pytest.mark.parametrize("name", ["learned", "llama", "gemma2", "qk-norm", "rotary-adjacent"])
def test_a_lorsas_circuit_is_the_head_it_was_lifted_from(name):
    model = zoo.by_name(name).build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, N_POS))
    lorsa = Lorsa.from_attention(model, 1)
    for head in range(len(stream.layers[1].pattern)):
        circuit = stream.read(QKHead.from_lorsa(lorsa, head, model=model))
        torch.testing.assert_close(circuit.pattern, stream.layers[1].pattern[head])
        torch.testing.assert_close(circuit.head.basis.S, stream.reading(1, head).head.basis.S)
        assert circuit.head.name == f"L1.qk{head}"


def test_a_lorsa_that_reads_the_normalized_stream():
    """The published kind: its weights act before the affine part of the norm."""
    model = zoo.by_name("learned").build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, N_POS))
    lorsa = Lorsa.from_attention(model, 1, init="tied", input_site="ln1_normalized")
    reading = stream.read(QKHead.from_lorsa(lorsa, 2, model=model))
    norm = stream.layers[1].norm
    r = stream.layers[1].resid_pre
    plain = (r - r.mean(-1, keepdim=True)) / (r.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = lorsa.pattern(plain[None].float(), [2])[0, 0]
    torch.testing.assert_close(reading.pattern.float(), expected, atol=1e-5, rtol=1e-4)
    assert (norm.gain - 1).abs().max() > 0.1  # else the test would say nothing
    for side in SIDES:
        terms = SIDES[side](stream, reading, 7)
        total = sum(terms.part(c).sum(0) for c in range(len(terms.components)))
        torch.testing.assert_close(total[:8], reading.raw[7][:8], atol=1e-4, rtol=0)


def test_a_lorsa_without_a_layer_is_refused():
    model = zoo.by_name("learned").build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        QKHead.from_lorsa(lorsa, 0)


# --------------------------------------------------------------------------------------- bases


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(2, 12), d_head=st.integers(1, 6), seed=st.integers(0, 99))
def test_bases_are_exact_for_any_query_and_key(d_in, d_head, seed):
    d_head = min(d_in, d_head)
    W_Q, W_K = random_matrix(d_in, d_head, seed=seed), random_matrix(d_in, d_head, seed=seed + 100)
    q, k = random_matrix(d_head, seed=1), random_matrix(d_head, seed=2)
    for name in ("singular", "rotated", "identity"):
        U, S, V, G_Q, G_K = head_basis(W_Q, W_K, basis=name, seed=seed)
        assert ((q @ G_Q) * (G_K @ k)).sum() == pytest.approx((q @ k).item(), abs=1e-6)
        if name == "singular":
            torch.testing.assert_close((U * S) @ V.mT, W_Q @ W_K.mT, atol=1e-8, rtol=1e-6)
            torch.testing.assert_close(U.mT @ U, torch.eye(d_head, dtype=U.dtype))
            assert bool((S.diff() <= 0).all())


def test_singular_values_are_those_of_the_whole_form():
    W_Q, W_K = random_matrix(20, 6), random_matrix(20, 6, seed=1)
    S = np.linalg.svd((W_Q @ W_K.mT).numpy(), compute_uv=False)[:6]
    np.testing.assert_allclose(head_basis(W_Q, W_K).S, S, rtol=1e-9)


def test_the_residual_of_a_deficient_head_is_reported():
    W_Q, W_K = random_matrix(10, 4), random_matrix(10, 4, seed=1)
    assert head_basis(W_Q, W_K).residual < 1e-9
    W_Q[:, 3] = W_Q[:, 0]
    deficient = head_basis(W_Q, W_K)
    assert deficient.residual > 0.1
    q, k = random_matrix(4, seed=2), random_matrix(4, seed=3)
    carried = ((q @ deficient.G_Q) * (deficient.G_K @ k)).sum()
    assert abs(carried - q @ k) > 1e-3  # a biased query leaves the row space
    inside = random_matrix(10, seed=4) @ W_Q
    carried = ((inside @ deficient.G_Q) * (deficient.G_K @ k)).sum()
    assert carried.item() == pytest.approx((inside @ k).item(), abs=1e-9)


def test_the_residual_of_scores_is_reported():
    model = zoo.by_name("rotary").build(torch.float32)
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, :, 3] = model.blocks[1].attn.W_Q[0, :, 2]
    stream = record_stream(model, zoo.tokens(1, 6))
    reading, sound = stream.reading(1, 0), stream.reading(1, 1)
    assert sound.residual.abs().max() < 1e-9
    assert reading.residual.abs().max() > 1e-3
    summed = reading.a @ reading.b.mT / reading.head.divisor
    torch.testing.assert_close(summed + reading.residual, reading.raw)


def test_a_wrong_decomposition_falls_back_to_another_driver(monkeypatch):
    matrix = random_matrix(6, 4)
    exact = torch.linalg.svd(matrix, full_matrices=False)

    def wrong(matrix):
        return exact[0], exact[1] * 1.01, exact[2]

    def failing(matrix):
        raise RuntimeError("did not converge")

    drivers = basis.SVD_DRIVERS[1:]
    for bad in (wrong, failing):
        monkeypatch.setattr(basis, "SVD_DRIVERS", [bad, *drivers])
        torch.testing.assert_close(checked_svd(matrix)[1], exact[1])
    for driver in drivers:
        U, S, Vh = driver(matrix)
        torch.testing.assert_close((U * S) @ Vh, matrix)
    monkeypatch.setattr(basis, "SVD_DRIVERS", [wrong, failing])
    with pytest.raises(ArithmeticError, match=r"no singular value decomposition of a \(6, 4\)"):
        checked_svd(matrix)


def test_haar_is_orthogonal_seeded_and_centred():
    Q = haar(5, 0)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(5, dtype=Q.dtype))
    assert torch.equal(Q, haar(5, 0))
    assert not torch.equal(Q, haar(5, 1))
    mean = torch.stack([haar(3, seed) for seed in range(400)]).mean(0)
    assert mean.abs().max() < 0.12  # without the signs of R, the diagonal would not be centred


def test_an_unknown_basis_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="basis = 'pca' must be one of"):
        head_basis(random_matrix(4, 2), random_matrix(4, 2), basis="pca")


# -------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, storage)
        return out


def test_the_tensor_of_all_terms_is_never_formed():
    n_pos = 48
    model = zoo.by_name("rotary").build(torch.float32)
    stream = record_stream(model, zoo.tokens(1, n_pos))
    d_head = model.cfg.d_head
    whole = 1 * (model.cfg.n_heads + 4) * d_head * n_pos * n_pos
    with Largest() as largest:
        reading = stream.reading(1, 1)
        for side in SIDES:
            explanation = Greedy().explain_side(stream, reading, n_pos - 1, 7, side)
            terms = break_down(stream, Firing(1, 1, n_pos - 1, 7), side)
            terms.weighted(reading.raw[-1])
            terms.row(5)
            assert explanation.removal.before > 0
    assert 0 < largest.numel <= whole / 4
