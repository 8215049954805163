"""QK tracing: pairs of nodes sum to the score, and name what a head looks for."""

import copy
import json
import math

import jaxtyping
import pytest
import torch
import zoo
from circuits_models import language_of, replaced

from lorsa_lens import Lorsa, splice
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.low_rank import LowRank
from lorsa_lens.circuits.qk_parts import qk_parts
from lorsa_lens.circuits.qk_tracing import trace_qk
from lorsa_lens.circuits.replacement import local_replacement
from lorsa_lens.singular.qk_head import QKHead

KINDS = [
    "learned", "rotary-adjacent", "llama", "gemma2", "qk-norm", "shortformer", "alibi",
    "bridge-gpt2", "bridge-gptneox", "bridge-llama", "bridge-gemma2", "bridge-qwen3",
]  # fmt: skip
QUERY = 9


def lorsa_of(model, layer, seed=0):
    return Lorsa.from_attention(
        model, layer, n_ov_heads=24, k=4, init="random", seed=seed
    ).requires_grad_(requires_grad=False)


def scores_of(model, lorsa, tokens):
    """The scores as the Lorsa itself computes them: capped, with ALiBi."""
    name = f"blocks.{lorsa.cfg.layer}.attn.lorsa.hook_attn_scores"
    with splice(model, lorsa):
        _, cache = model.run_with_cache(tokens[None], names_filter=name)
    return cache[name][0].double()


def as_the_model_has_it(trace, reading):
    """What a score before cap and ALiBi becomes."""
    cap = trace.head.spec.attn_scores_soft_cap
    total = trace.matrix().sum().item()
    capped = total if cap is None else cap * math.tanh(total / cap)
    return capped + reading.bias[trace.query, trace.key].item()


# ---------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("name", KINDS)
def test_pairs_sum_to_the_score_at_every_key(name):
    model, tokens = zoo.by_name(name).build(torch.float32), zoo.tokens(1, 12)[0]
    layer = 1
    below, lorsa = lorsa_of(model, 0), lorsa_of(model, layer, seed=1)
    replacement = local_replacement(model, [below, lorsa], tokens)
    scores = scores_of(model, lorsa, tokens)
    for circuit in (0, 3):
        head = QKHead.from_lorsa(lorsa, circuit, model=model)
        reading = replacement.stream.read(head)
        for key in reading.visible[QUERY].nonzero()[:, 0].tolist():
            trace = trace_qk(replacement, head, query=QUERY, key=key)
            size = scores[circuit, QUERY, : QUERY + 1].abs().max().item()
            expected = scores[circuit, QUERY, key].item()
            assert as_the_model_has_it(trace, reading) == pytest.approx(expected, abs=1e-4 * size)
    trace = trace_qk(replacement, head, query=QUERY)
    for of in ("score", "relative", "weight"):
        whole = pytest.approx(trace.total(of), abs=2e-5 * (1 + abs(trace.total("score"))))
        assert trace.matrix(of).sum().item() == whole
        assert trace.pairs(of, n=None)["contribution"].sum() == whole
        assert trace.query_marginals(of)["contribution"].sum() == whole
        assert trace.key_marginals(of)["contribution"].sum() == whole
        assert trace.kinds(of)["contribution"].sum() == whole
        assert trace.by_key(of).sum().item() == whole
    kinds = set(trace.kinds()["query_kind"]) | set(trace.kinds()["key_kind"])
    assert {"token", "head", "reading bias", "error", "mlp"} <= kinds


@pytest.mark.parametrize("name", ["learned", "llama", "gemma2"])
def test_heads_of_the_model_itself(name):
    model, tokens = zoo.by_name(name).build(torch.float32), zoo.tokens(1, 12)[0]
    replacement = local_replacement(model, [], tokens, attention="heads_by_source")
    hook = "blocks.1.attn.hook_attn_scores"
    _, cache = model.run_with_cache(tokens[None], names_filter=hook)
    for head in range(2):
        node = Node("attention_head", 1, QUERY, head, 4)
        trace = trace_qk(replacement, node)
        assert (trace.query, trace.key) == (QUERY, 4)
        reading = replacement.stream.reading(1, head)
        expected = cache[hook][0, head, QUERY, 4].item()
        assert as_the_model_has_it(trace, reading) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    sources = {
        node.source for node in trace.queries.nodes if node and node.kind == "attention_head"
    }
    assert sources == set(range(5 if name == "gemma2" else 0, QUERY + 1))  # a window of 5


def test_one_pair_by_hand():
    model, tokens = zoo.by_name("learned").build(torch.float64), zoo.tokens(1, 12)[0]
    replacement = local_replacement(model, [], tokens, attention="heads")
    trace = trace_qk(replacement, Node("attention_head", 1, QUERY, 2), key=3)
    block, hook = model.blocks[1], "blocks.1.hook_resid_pre"
    resid = model.run_with_cache(tokens[None], names_filter=hook)[1][hook][0]
    scale = resid.var(-1, unbiased=False).add(model.cfg.eps).sqrt()

    def share(y, pos):
        return (y - y.mean()) * block.ln1.w / scale[pos]

    matrix = trace.matrix()
    for a, query_node in enumerate(trace.queries.nodes):
        for b, key_node in enumerate(trace.keys.nodes):
            if query_node is None or key_node is None or key_node.pos != 3:
                continue
            q = share(replacement.vector(query_node), QUERY) @ block.attn.W_Q[2]
            k = share(replacement.vector(key_node), 3) @ block.attn.W_K[2]
            expected = (q @ k).item() / block.attn.attn_scale
            assert matrix[a, b].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    own = trace.queries.nodes.index(None), trace.keys.nodes.index(None)
    assert trace.keys.pos[own[1]] == 0  # the first key's
    q = block.ln1.b @ block.attn.W_Q[2] + block.attn.b_Q[2]
    k = block.ln1.b @ block.attn.W_K[2] + block.attn.b_K[2]
    at_first = trace_qk(replacement, Node("attention_head", 1, QUERY, 2), key=0).matrix()[own]
    assert at_first.item() == pytest.approx((q @ k).item() / block.attn.attn_scale, rel=1e-6)


# ----------------------------------------------------------------- against alternatives, weights


@pytest.fixture(scope="module")
def capped():
    model, tokens = zoo.by_name("gemma2").build(torch.float64), zoo.tokens(1, 12)[0]
    replacement = local_replacement(model, [], tokens, attention="heads")
    return trace_qk(replacement, Node("attention_head", 1, QUERY, 1), key=5)


def test_relative_is_the_score_less_the_mean_over_other_keys(capped):
    scores = capped.scores[: QUERY + 1]
    others = torch.cat((scores[:5], scores[6:]))
    assert capped.total("relative") == pytest.approx((scores[5] - others.mean()).item())
    by_key = capped.by_key("relative")
    assert by_key[5].item() == pytest.approx(scores[5].item(), rel=1e-5)
    assert by_key[2].item() == pytest.approx(-scores[2].item() / QUERY, rel=1e-5)


def test_integrated_gradients_by_autograd(capped):
    scores = capped.scores[: QUERY + 1]
    total = torch.zeros_like(scores)
    n_steps = 400
    for step in range(n_steps):  # midpoints
        path = (scores * (step + 0.5) / n_steps).requires_grad_()
        weight = torch.softmax(2.0 * torch.tanh(path / 2.0), dim=0)[5]
        total += torch.autograd.grad(weight, path)[0] / n_steps
    torch.testing.assert_close(
        capped.by_key("weight")[: QUERY + 1], total * scores, rtol=1e-3, atol=1e-5
    )
    assert capped.baseline == pytest.approx(1 / (QUERY + 1))
    change = capped.pattern[5].item() - capped.baseline
    assert capped.matrix("weight").sum().item() == pytest.approx(change, abs=1e-4)


# -------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_induction_heads_look_for_the_token_that_previous_token_heads_brought(name):
    model, lorsas = replaced(name)
    labels = language_of(name).sample(8, seed=5)
    right = {"query": 0, "key": 0, "pair": 0, "previous": 0}
    total = 0
    for tokens, sources in zip(labels.tokens, labels.source, strict=True):
        replacement = local_replacement(model, lorsas.values(), tokens)
        x = replacement.stream.layers[0].x.float()[None]
        for query in (sources >= 0).nonzero()[:, 0].tolist()[:4]:
            trace = trace_qk(replacement, QKHead.from_lorsa(lorsas[1], 1), query=query)
            if trace.key != int(sources[query]) or trace.pattern[trace.key] < 0.5:
                continue  # it does not attend to the source
            assert trace.total("weight") == pytest.approx(
                trace.matrix("weight").sum().item(), abs=1e-4
            )
            assert trace.low_rank("relative").effective_rank < 4
            total += 1
            best = trace.pairs("relative", n=1).to_dict("records")[0]
            brought = trace.key_marginals("weight", n=1)["node"][0]
            right["query"] += trace.query_marginals("weight", n=1)["node"][0] == f"token@{query}"
            right["key"] += is_head_at(brought, trace.key)
            right["pair"] += best["query_node"] == f"token@{query}" and is_head_at(
                best["key_node"], trace.key
            )
            if is_head_at(best["key_node"], trace.key):  # where did it fetch from? measured apart
                index = int(best["key_node"].split(".")[2].split("@")[0])
                z_pattern = lorsas[0].z_pattern(x, [index], queries=[trace.key])[0, 0, 0]
                right["previous"] += int(z_pattern.abs().argmax()) == trace.key - 1
    assert total >= 8
    for what, count in right.items():
        assert count / total >= 0.9, (what, right, total)


def is_head_at(name, pos):
    return name.startswith("head.L0.") and name.endswith(f"@{pos}")


def test_the_pair_that_was_planted_comes_first():
    model, lorsas = replaced("induction")
    tokens = language_of("induction").sample(1, seed=3).tokens[0]
    replacement = local_replacement(model, lorsas.values(), tokens)
    head = QKHead.from_lorsa(lorsas[1], 0)
    reading, query, key = replacement.stream.read(head), 12, 4
    planted, ends = copy.deepcopy(lorsas[1]), []
    for side, at, W, b in (
        ("dest", query, planted.W_Q, planted.b_Q),
        ("src", key, planted.W_K, planted.b_K),
    ):
        parts = qk_parts(replacement, reading, side, [at])
        nodes = [node for node in parts.nodes if node is not None]
        norm = replacement.stream.layers[1].norm
        vectors = torch.stack([replacement.vector(node) for node in nodes])
        shares = norm.share(vectors, torch.full((len(nodes),), at))
        chosen = next(i for i, node in enumerate(nodes) if node.kind == "head")
        target = torch.nn.functional.one_hot(torch.tensor(chosen), len(nodes)).double()
        with torch.no_grad():
            W[0] = 0.0
            W[0, :, 0] = torch.linalg.lstsq(shares, target).solution.float()
            b[0] = 0.0
            b[0, 0] = -(norm.bias @ W[0, :, 0].double()).float()
        ends.append(nodes[chosen])
    trace = trace_qk(replacement, QKHead.from_lorsa(planted, 0), query=query, key=key)
    pairs = trace.pairs()
    assert (pairs["query_node"][0], pairs["key_node"][0]) == (ends[0].id, ends[1].id)
    assert pairs["contribution"][0] == pytest.approx(trace.total(), rel=1e-3)
    assert abs(pairs["contribution"][1]) < 1e-3 * pairs["contribution"][0]
    assert trace.low_rank().rank_at(0.999) == 1
    loaded = trace.low_rank(n=1, n_nodes=1).components
    assert list(loaded["node"]) == [ends[0].id, ends[1].id]
    assert loaded["energy"][0] == pytest.approx(1.0, abs=1e-4)


# -------------------------------------------------------------------------------- what comes out


def test_low_rank_summary_by_hand(capped):
    summary = capped.low_rank()
    expected = torch.linalg.svdvals(capped.matrix())[: len(summary.singular_values)]
    torch.testing.assert_close(
        torch.tensor(summary.singular_values, dtype=torch.float64)[:8], expected[:8]
    )
    frame = summary.components
    two = LowRank(singular_values=(3.0, 3.0, 0.0), components=frame)
    assert two.effective_rank == pytest.approx(2.0)
    assert [two.rank_at(energy) for energy in (0.4, 0.5, 0.9, 1.0)] == [1, 1, 2, 2]


def test_a_node_of_the_graph_and_its_json():
    model, lorsas = replaced("induction")
    tokens = language_of("induction").sample(1, seed=3).tokens[0]
    replacement = local_replacement(model, lorsas.values(), tokens)
    node = next(n for n in reversed(replacement.nodes) if n.kind == "head" and n.layer == 1)
    trace = trace_qk(replacement, node)
    assert trace.query == node.pos
    assert trace.head.index == node.index // lorsas[1].cfg.group_size
    assert trace.pattern[trace.key] == trace.pattern.max()
    values = json.loads(json.dumps(trace.to_dict(n=5), allow_nan=False))
    assert [len(row) for row in values["pair_wise"]] == [3] * 5
    assert [len(row) for row in values["top_q_marginal"]] == [2] * 5
    assert values["top_k_marginal"][0][0] == trace.key_marginals()["node"][0]
    assert values["total"] == pytest.approx(trace.total())
    assert repr(trace) == f"QKTracing(L1.qk{trace.head.index}, {node.pos} -> {trace.key})"


def test_what_cannot_be_traced(monkeypatch):
    model, tokens = zoo.by_name("learned").build(torch.float32), zoo.tokens(1, 12)[0]
    lorsa = lorsa_of(model, 1)
    frozen = local_replacement(model, lorsa, tokens)
    head = QKHead.from_lorsa(lorsa, 0)
    with pytest.raises(ValueError, match=r"attention of layer 0 is no node: .* attention='heads'"):
        trace_qk(frozen, head, query=3)
    replacement = local_replacement(model, lorsa, tokens, attention="heads")
    with pytest.raises(ValueError, match="query = 12: give a position from 0 to 11"):
        trace_qk(replacement, head, query=12)
    with pytest.raises(ValueError, match=r"key = 4: L1.qk0 at token 3 sees \[0, 1, 2, 3\]"):
        trace_qk(replacement, head, query=3, key=4)
    with pytest.raises(ValueError, match="token@3 is no head of the prompt's Lorsas"):
        trace_qk(replacement, Node("token", -1, 3))
    trace = trace_qk(replacement, head, query=3)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="of = 'loudness' must be one of"):
        trace.total("loudness")
