"""Global circuits: virtual weights are what they say, and weights alone tell the program."""

import copy

import jaxtyping
import pytest
import torch
import zoo
from circuits_models import language_of, replaced

from lorsa_lens import Lorsa, splice
from lorsa_lens.analysis.relations import induction
from lorsa_lens.analysis.vocabulary import logit_weights
from lorsa_lens.circuits.coactivation import measure_coactivation
from lorsa_lens.circuits.global_circuit import GlobalCircuit
from lorsa_lens.circuits.global_page import global_sections
from lorsa_lens.circuits.global_tables import (
    composition_graph,
    end_table,
    pair_table,
    save_composition_graph,
    score_table,
    value_table,
)
from lorsa_lens.circuits.items import Item
from lorsa_lens.circuits.programs import alignments, program, roles
from lorsa_lens.circuits.qk_tracing import trace_qk
from lorsa_lens.circuits.replacement import local_replacement
from lorsa_lens.hosts import host_of
from lorsa_lens.recording import record_attention
from lorsa_lens.singular.qk_head import QKHead
from lorsa_lens.testbed import load_model
from lorsa_lens.views import save

ATTN_ONLY = {"attn_only": True, "d_mlp": None, "act_fn": None}
ROTARY = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "final_rms": True}
HOSTS = {
    "layer norm": lambda: zoo.hooked(torch.float64, **ATTN_ONLY),
    "folded": lambda: zoo.hooked(torch.float64, processed=True, **ATTN_ONLY),
    "no norm": lambda: zoo.hooked(torch.float64, normalization_type=None, **ATTN_ONLY),
    "rotary, grouped": lambda: zoo.hooked(
        torch.float64, n_key_value_heads=2, rotary_dim=4, **ROTARY, **ATTN_ONLY
    ),
    "post norm": lambda: zoo.hooked(
        torch.float64, use_normalization_before_and_after=True, **ROTARY, **ATTN_ONLY
    ),
    "bridge": lambda: load_model("induction", host="bridge"),
}


def build(name):
    if name == "bridge":
        zoo.by_name("bridge-native")
    elif zoo.lacks("attn-only"):
        pytest.skip("the installed TransformerLens has no HookedTransformer")
    return HOSTS[name]()


def lorsas_of(model, **changes):
    sizes = {"n_ov_heads": 24, "k": 6, "init": "random", **changes}
    made = [Lorsa.from_attention(model, layer, seed=layer, **sizes) for layer in (0, 1)]
    for lorsa in made:
        torch.nn.init.normal_(lorsa.b_V, std=0.3)
        lorsa.requires_grad_(requires_grad=False)
    return made


def spliced_cache(model, lorsas, tokens):
    with splice(model, lorsas):
        return model.run_with_cache(tokens)[1]


# ------------------------------------------------------------------------------- exact, one token


def scales_of(model, lorsas, token):
    """The cache of a prompt of one token, and the scales of all norms on it."""
    cache = spliced_cache(model, lorsas, torch.tensor([[token]]))
    cfg = host_of(model).model.cfg

    def scale(name):
        vector = cache[name][0, 0]
        if cfg.normalization_type is None:
            return 1.0
        centred = vector - vector.mean() if "LN" in cfg.normalization_type else vector
        return centred.square().mean().add(cfg.eps).sqrt().item()

    scales = {n: scale(f"blocks.{n}.hook_resid_pre") for n in (0, 1)}
    scales[2] = scale("blocks.1.hook_resid_post")
    post_scales = {}
    if getattr(cfg, "use_normalization_before_and_after", False):
        post_scales = {n: scale(f"blocks.{n}.attn.lorsa.hook_recons") for n in (0, 1)}
    return cache, {"scales": scales, "post_scales": post_scales}


@pytest.mark.parametrize("name", HOSTS)
def test_on_one_token_the_parts_sum_to_scores_and_values(name):
    """Attention has no choice there, and every norm has one scale: all of it can be checked."""
    model = build(name)
    lorsas, token = lorsas_of(model), 7
    cache, scales = scales_of(model, lorsas, token)
    acts = {n: cache[f"blocks.{n}.attn.lorsa.hook_acts_post"][0, 0] for n in (0, 1)}
    circuit = GlobalCircuit(model, lorsas, activations=acts, n_pos=5, **scales)
    items, scores = circuit.pair_scores(1, 2, offset=0)
    there = [
        number
        for number, item in enumerate(items.items)
        if item.kind in ("constant", "head") or item.index == (token if item.kind == "token" else 0)
    ]
    expected = cache["blocks.1.attn.lorsa.hook_attn_scores"][0, 2, 0, 0].item()
    assert scores[there][:, there].sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    above = circuit.layers[1]
    values = items.vectors[there].sum(0) @ above.W_V + above.b_V
    acts_pre = cache["blocks.1.attn.lorsa.hook_acts_pre"][0, 0]
    torch.testing.assert_close(values, acts_pre.double(), rtol=1e-4, atol=1e-5)
    from_heads = items.vectors[items.of_kind("head")].sum(0) @ above.W_V
    torch.testing.assert_close(acts[0].double() @ circuit.value_weights(0, 1), from_heads)
    assert from_heads.abs().max() > 1e-2


@pytest.mark.parametrize("name", ["layer norm", "folded", "rotary, grouped"])
def test_logits_are_those_of_the_vocabulary_tools(name):
    model = build(name)
    lorsas = lorsas_of(model)
    circuit = GlobalCircuit(model, lorsas, scales={2: 2.0})
    raw = logit_weights(model, lorsas[1], range(24))
    expected = (raw - raw.mean(1, keepdim=True)) / 2.0
    torch.testing.assert_close(circuit.logit_weights(1), expected, rtol=1e-4, atol=1e-5)


def test_rotation_over_a_distance():
    model = build("rotary, grouped")
    lorsas = lorsas_of(model)
    cache, scales = scales_of(model, lorsas, 7)
    acts = {0: cache["blocks.0.attn.lorsa.hook_acts_post"][0, 0]}
    circuit = GlobalCircuit(model, lorsas, activations=acts, **scales)
    x = cache["blocks.1.hook_resid_pre"] / scales["scales"][1] * model.blocks[1].ln1.w
    for offset in (0, 3):
        items, scores = circuit.pair_scores(1, 1, offset=offset)
        there = [i for i, item in enumerate(items.items) if item.kind != "token" or item.index == 7]
        q, _ = lorsas[1].queries_and_keys(x, positions=torch.tensor([[offset + 4]]))
        _, k = lorsas[1].queries_and_keys(x, positions=torch.tensor([[4]]))
        expected = (q[0, 0, 1] @ k[0, 0, 1]).item() / lorsas[1].cfg.score_divisor
        assert scores[there][:, there].sum().item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- by naive loops


@pytest.fixture(scope="module")
def random_circuit():
    model = build("rotary, grouped")
    return GlobalCircuit(model, lorsas_of(model), tokens=range(4, 20), n_pos=3)


@pytest.mark.parametrize("side", ["query", "key"])
def test_matches_by_loops(random_circuit, side):
    circuit, offset = random_circuit, 2
    low, high = circuit.layers[0], circuit.layers[1]
    tokens = circuit.embeddings.tokens
    rotate_q, rotate_k = high.rotation(offset)
    found = circuit.matches(0, 1, side, offset=offset)
    for head, number in ((0, 0), (5, 3), (23, 1)):
        W_Q, W_K = high.queries[number].W, high.keys[number].W
        table = torch.zeros(16, 16)
        for asked in range(16):
            for fetched in range(16):
                written = (tokens[fetched] @ low.W_V[:, head]) * low.W_O[head]
                ends = (tokens[asked], written) if side == "key" else (written, tokens[asked])
                score = rotate_q(ends[0] @ W_Q) @ rotate_k(ends[1] @ W_K)
                table[asked, fetched] = score / lorsa_divisor(high)
        expected = (table.diagonal().mean() - table.mean()).item()
        assert found[head, number].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def lorsa_divisor(folded):
    return folded.circuits[0].divisor


def test_alignment_of_one_circuit_by_loops(random_circuit):
    low, high = random_circuit.layers[0], random_circuit.layers[1]
    centred = random_circuit.embeddings.token_deviations
    rotate_q, rotate_k = high.rotation(1)
    scores = (
        rotate_q(centred @ high.queries[2].W)
        @ rotate_k(centred @ low.W_V[:, 6:12] @ low.W_O[6:12] @ high.keys[2].W).mT
    )
    gram = torch.linalg.eigvalsh(centred.mT @ centred)
    rank = gram.sum() ** 2 / gram.square().sum()
    expected = scores.diagonal().sum() / (scores.norm() * rank.sqrt())
    assert alignments(random_circuit, 0, 1)[1, 2].item() == pytest.approx(expected.item())
    assert alignments(random_circuit, 0, 1).abs().max() < 0.5  # of random weights


def test_strengths_by_all_that_the_other_side_may_be(random_circuit):
    circuit = random_circuit
    low, high = circuit.layers[0], circuit.layers[1]
    rotate_q, rotate_k = high.rotation(1)
    head, number = 3, 2
    key = rotate_k(low.activations[head] * low.W_O[head] @ high.keys[number].W)
    embedded = circuit.embeddings
    squares = []
    for token in embedded.tokens:
        for position in embedded.positions:
            stream = token + position + low.b_O
            query = rotate_q(stream @ high.queries[number].W + high.queries[number].b)
            squares.append((query @ key / high.circuits[0].divisor).square())
    expected = torch.stack(squares).mean()
    for other in range(24):  # each at 6 of 24 tokens, independent of the rest
        query = rotate_q(low.activations[other] * low.W_O[other] @ high.queries[number].W)
        expected += 6 / 24 * (query @ key / high.circuits[0].divisor).square()
    found = circuit.strengths(0, 1, "key")[head, number]
    assert found.item() == pytest.approx(expected.sqrt().item(), rel=1e-5)


def test_copying_and_typical_activations_by_loops(random_circuit):
    circuit, folded = random_circuit, random_circuit.layers[1]
    logits = circuit.logit_weights(1)[:, list(circuit.embeddings.token_ids)]
    values = circuit.embeddings.tokens @ folded.W_V
    expected = torch.stack([torch.cov(torch.stack((values[:, j], logits[j])), correction=0)[0, 1]
                            for j in range(24)])  # fmt: skip
    torch.testing.assert_close(circuit.copying(1), expected)
    first = circuit.layers[0]
    fetched = circuit.embeddings.tokens @ first.W_V + first.b_V  # rotary: no positions in it
    torch.testing.assert_close(circuit.activations[0], fetched.square().mean(0).sqrt())


def test_distances_are_those_of_the_pattern_between_mean_tokens():
    model = build("layer norm")
    lorsas = lorsas_of(model)
    circuit = GlobalCircuit(model, lorsas, n_pos=12, scales={0: 0.7})
    stream = model.W_pos[:12].double() + model.W_E.double().mean(0)
    x = (stream - stream.mean(-1, keepdim=True)) / 0.7 * model.blocks[0].ln1.w + model.blocks[
        0
    ].ln1.b
    pattern = lorsas[0].pattern(x[None], range(4))[0]
    for back in (0, 1, 5):
        queries = torch.arange(5, 12)
        expected = pattern[:, queries, queries - back].mean(1)
        torch.testing.assert_close(circuit.distances(0)[:, back], expected, rtol=1e-4, atol=1e-6)
    assert circuit.distances(0).shape == (4, 6)


# -------------------------------------------------------------------------------- co-activation


@pytest.mark.parametrize("name", ["rotary, grouped", "post norm"])
def test_expected_attributions_by_loops(name):
    model = build(name)
    lorsas = lorsas_of(model)
    circuit, tokens = GlobalCircuit(model, lorsas), zoo.tokens(3, 6)
    statistics = measure_coactivation(circuit, [tokens[:2], tokens[2:]], batch_size=1)
    assert statistics.n_tokens == 18
    cache = spliced_cache(model, lorsas, tokens)
    z = [cache[f"blocks.{n}.attn.lorsa.hook_acts_post"].double() for n in (0, 1)]
    pattern = cache["blocks.1.attn.lorsa.hook_pattern"].double()
    resid = cache["blocks.1.hook_resid_pre"].double()
    scale = resid.square().mean(-1).add(model.cfg.eps).sqrt()
    W_O, gain = lorsas[0].W_O.double().expand(3, 6, -1, -1), model.blocks[1].ln1.w.double()
    if name == "post norm":
        recons = cache["blocks.0.attn.lorsa.hook_recons"].double()
        post = recons.square().mean(-1).add(model.cfg.eps).sqrt()
        W_O = W_O * model.blocks[0].ln1_post.w / post[..., None, None]
    active = [(acts != 0).any(1).any(0).nonzero()[:, 0].tolist() for acts in z]
    for i, j in zip(active[0][:3], active[1][:3], strict=True):
        moved = torch.zeros(3, 6, dtype=torch.float64)
        for b in range(3):
            for q in range(6):
                for k in range(q + 1):
                    read = (W_O[b, k, i] * gain / scale[b, k]) @ lorsas[1].W_V[j].double()
                    moved[b, q] += pattern[b, j // 6, q, k] * z[0][b, k, i] * read
        stays = z[1][..., j] != 0
        found = statistics.expected(circuit, 0, 1)[i, j].item()
        assert found == pytest.approx((moved * stays).mean().item(), rel=1e-4, abs=1e-7)
        size = z[1][..., j].abs()
        found = statistics.expected(circuit, 0, 1, target_weighted=True)[i, j].item()
        assert found == pytest.approx(
            ((moved * size).sum() / size.sum()).item(), rel=1e-4, abs=1e-7
        )
    stays = (z[1] != 0).double().mean((0, 1))
    torch.testing.assert_close(statistics.frequency[1].double(), stays)
    assert statistics.scales[1] == pytest.approx(1 / (1 / scale).mean().item(), rel=1e-4)


def test_expected_scores_by_autograd():
    """What a head adds to relative scores: the derivative by how much of it the keys read."""
    model = build("rotary, grouped")
    lorsas, tokens = lorsas_of(model), zoo.tokens(1, 6)
    circuit = GlobalCircuit(model, lorsas)
    statistics = measure_coactivation(circuit, tokens)
    cache = spliced_cache(model, lorsas, tokens)
    resid = cache["blocks.1.hook_resid_pre"].double()
    scale = resid.square().mean(-1, keepdim=True).add(model.cfg.eps).sqrt()
    z = cache["blocks.0.attn.lorsa.hook_acts_post"].double()
    share = torch.ones(24, dtype=torch.float64, requires_grad=True)
    changed = resid + (z * (share - 1)) @ lorsas[0].W_O.double()
    x = [stream / scale * model.blocks[1].ln1.w.double() for stream in (resid, changed)]
    doubled = copy.deepcopy(lorsas[1]).double()
    q, k = doubled.queries_and_keys(x[0])
    q_changed, k_changed = doubled.queries_and_keys(x[1])
    pattern = cache["blocks.1.attn.lorsa.hook_pattern"].double()[0]
    visible = torch.ones(6, 6, dtype=torch.float64).tril()
    D = pattern - visible / visible.sum(-1, keepdim=True)
    for number in (0, 3):
        for found, ends in ((statistics.key, (q, k_changed)), (statistics.query, (q_changed, k))):
            scores = ends[0][0, :, number] @ ends[1][0, :, number].mT / doubled.cfg.score_divisor
            (expected,) = torch.autograd.grad(
                (D[number] * scores).sum() / 6, share, retain_graph=True
            )
            torch.testing.assert_close(found[0, 1][:, number], expected, rtol=1e-4, atol=1e-7)


def test_a_corpus_corrects_the_circuit():
    model, lorsas = replaced("induction")
    language = language_of("induction")
    circuit = GlobalCircuit(model, lorsas, n_pos=language.n_ctx)
    statistics = measure_coactivation(circuit, language.sample(16, seed=8).tokens)
    corrected = statistics.corrected(circuit)
    assert corrected.layers[1].norm.scale.item() == pytest.approx(statistics.scales[1])
    torch.testing.assert_close(corrected.activations[0], statistics.activations[0])
    dead = statistics.frequency[0] == 0
    assert dead.any()
    assert (corrected.strengths(0, 1, "key")[dead] == 0).all()
    table = score_table(corrected, statistics=statistics, rank_by="expected", n=5)
    assert list(table["expected"]) == sorted(table["expected"], reverse=True)
    best = value_table(circuit, statistics=statistics, n=3)
    assert best["expected"].abs().is_monotonic_decreasing
    assert {"weight", "effect", "target_weighted"} <= set(best.columns)


# ------------------------------------------------------------------------------------- induction


def measured(name):
    """Truth, from patterns on text: heads of the previous token, and circuits of induction."""
    model, lorsas = replaced(name)
    tokens = language_of(name).sample(64, seed=2).tokens
    records = record_attention(model, tokens, [0, 1])
    seen = records[0].seen_by(lorsas[0])
    acts = lorsas[0].encode(seen.x)
    mass = torch.zeros(lorsas[0].cfg.n_ov_heads, tokens.shape[1])
    for head in acts.indices.unique().tolist():
        z_pattern = lorsas[0].z_pattern(seen.x, [head])[:, 0].abs()
        active = ((acts.indices == head) & (acts.values != 0)).any(-1)
        for back in range(4):
            diagonal = z_pattern.diagonal(-back, 1, 2) * active[:, back:]
            mass[head, back] = diagonal.sum()
    previous = {head for head in range(len(mass)) if mass[head].any() and mass[head].argmax() == 1}
    pattern = lorsas[1].pattern(records[1].seen_by(lorsas[1]).x, range(lorsas[1].cfg.n_qk_heads))
    source = induction(tokens)
    batch, query = (source >= 0).nonzero(as_tuple=True)
    weight = pattern[batch, :, query, source[batch, query]].mean(0)
    return model, lorsas, previous, {c for c, w in enumerate(weight.tolist()) if w > 0.5}


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_weights_alone_rank_previous_token_heads_into_the_keys_of_induction_circuits(name):
    model, lorsas, previous, inducing = measured(name)
    circuit = GlobalCircuit(model, lorsas, n_pos=language_of(name).n_ctx)
    table = score_table(circuit, n=None)
    n_heads, n_circuits = lorsas[0].cfg.n_ov_heads, lorsas[1].cfg.n_qk_heads
    assert len(table) == n_heads * n_circuits * 2
    true = [
        row["side"] == "key"
        and int(row["head"][3:]) in previous
        and int(row["circuit"].split("qk")[1]) in inducing
        for row in table.to_dict("records")
    ]
    assert len(inducing) == n_circuits
    top = max(1, len(true) // 100)
    assert all(true[:top])
    assert sum(true[: 5 * top]) >= 0.9 * 5 * top
    assert sum(true) < 0.5 * len(true)  # so chance is below a half
    assert table["share"][top - 1] <= 0.01
    query_side = table[table["side"] == "query"]["match"].sum()
    assert table[table["side"] == "key"]["match"].sum() > 10 * abs(query_side)


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_pairs_that_a_prompt_shows_are_in_the_top_percent_of_all_pairs(name):
    model, lorsas = replaced(name)
    language = language_of(name)
    circuit = GlobalCircuit(model, lorsas, n_pos=language.n_ctx)
    items, scores = circuit.pair_scores(1, 0)
    places = {item: number for number, item in enumerate(items.items)}
    labels = language.sample(6, seed=5)
    ranked = []
    for tokens, sources in zip(labels.tokens, labels.source, strict=True):
        replacement = local_replacement(model, lorsas.values(), tokens)
        for query in (sources >= 0).nonzero()[:, 0].tolist()[:3]:
            trace = trace_qk(replacement, QKHead.from_lorsa(lorsas[1], 0), query=query)
            if trace.key != int(sources[query]):
                continue
            best = trace.pairs("relative", n=1).to_dict("records")[0]
            head = int(best["key_node"].split(".")[2].split("@")[0])
            assert best["query_node"] == f"token@{query}"
            row = places[Item("token", -1, int(tokens[query]))]
            column = places[Item("head", 0, head)]
            ranked.append((scores > scores[row, column]).double().mean().item())
    assert len(ranked) >= 10
    assert max(ranked) < 0.01


@pytest.mark.parametrize("name", ["recall", "induction"])
def test_the_program(name):
    model, lorsas, _, _ = measured(name)
    language = language_of(name)
    circuit = GlobalCircuit(model, lorsas, n_pos=language.n_ctx)
    found = {role.name: role for role in roles(circuit)}
    for circuit_number in range(lorsas[0].cfg.n_qk_heads):
        assert 1 in found[f"L0.qk{circuit_number}"].distances
        assert found[f"L0.qk{circuit_number}"].matches == {}
    for circuit_number in range(lorsas[1].cfg.n_qk_heads):
        role = found[f"L1.qk{circuit_number}"]
        assert role.distances == {}
        assert set(role.matches) == {(0, low) for low in range(lorsas[0].cfg.n_qk_heads)}
        assert min(role.matches.values()) > 0
    text = program(circuit, strings=language.vocab)
    assert text.startswith("layer 0: ")
    assert "by positions alone it looks" in text
    assert "L1.qk0: it looks for the token at hand among what was fetched by L0.qk" in text
    assert circuit.copying(1).sum() > 5 * circuit.copying(0).sum().abs()


# -------------------------------------------------------------------------------- tables, graphs


def test_sections_of_a_page(tmp_path):
    model, lorsas = replaced("recall")
    language = language_of("recall")
    circuit = GlobalCircuit(model, lorsas)
    statistics = measure_coactivation(circuit, language.sample(4, seed=1).tokens)
    sections = global_sections(circuit, statistics=statistics, strings=language.vocab, n=3)
    page = save(tmp_path / "global.html", *sections).read_text()
    for text in ("by positions alone it looks 1 back", "What L1.qk1 looks for", "of a corpus"):
        assert text in page
    assert "&#x27;word" in page or "'word" in page


def test_tables_and_graph(tmp_path):
    model, lorsas = replaced("recall")
    language = language_of("recall")
    circuit = GlobalCircuit(model, lorsas)
    pairs = pair_table(circuit, 1, 0, n=4, strings=language.vocab)
    assert (pairs["query_kind"][0], pairs["key_kind"][0]) == ("token", "head")
    assert pairs["query"][0].startswith("'word")
    _, scores = circuit.pair_scores(1, 0)
    assert pairs["score"][0] == pytest.approx(scores.max().item())
    ends = end_table(circuit, 0, strings=language.vocab, n=None)
    (key,) = ends[ends["head"] == pairs["key"][0]].to_dict("records")
    assert key["reads"] == pairs["query"][0]  # it looks for what that head fetches
    assert end_table(circuit, 1)["raises"].str.startswith("token ").all()
    effects = value_table(circuit, n=None)["effect"].abs()
    assert effects.is_monotonic_decreasing
    graph = composition_graph(circuit, n=10)
    sides = [side for _, _, side in graph.edges(data="side")]
    assert sides.count("key") == 10
    assert sides.count("value") == 10
    for circuit_node, head, data in graph.edges(data=True):
        if data["side"] == "pattern":
            group = circuit.layers[graph.nodes[head]["layer"]].group_size
            assert graph.nodes[circuit_node]["index"] == graph.nodes[head]["index"] // group
    assert "L1.qk0" in save_composition_graph(graph, tmp_path / "global.graphml").read_text()
    with pytest.raises(ValueError, match="rank_by = 'expected' must be one of"):
        score_table(circuit, rank_by="expected")


def test_what_is_refused(monkeypatch):
    model, lorsas = replaced("recall")
    circuit = GlobalCircuit(model, lorsas)
    with pytest.raises(ValueError, match="low = 1, high = 0: heads act on layers above"):
        circuit.value_weights(1, 0)
    with pytest.raises(ValueError, match=r"layer = 3: there are Lorsas of layers \[0, 1\]"):
        circuit.pair_scores(3, 0)
    with pytest.raises(ValueError, match="circuit = 2: layer 1 has 2"):
        circuit.pair_scores(1, 2)
    monkeypatch.setattr("lorsa_lens.circuits.global_circuit.MAX_ITEMS", 100)
    with pytest.raises(ValueError, match="make the circuit with fewer tokens"):
        circuit.pair_scores(1, 0)
    with pytest.raises(ValueError, match="lorsas is empty"):
        GlobalCircuit(model, [])
    with pytest.raises(ValueError, match="two Lorsas are for layer 0"):
        GlobalCircuit(model, [lorsas[0], lorsas[0]])
    with pytest.raises(ValueError, match="tokens must be ids from 0 to 32"):
        GlobalCircuit(model, lorsas, tokens=[33])
    with pytest.raises(ValueError, match="n_pos = 40: the model has positions for 1 to 39"):
        GlobalCircuit(model, lorsas, n_pos=40)
    with pytest.raises(ValueError, match="tokens is empty"):
        measure_coactivation(circuit, [])
    unplaced = copy.copy(lorsas[0])
    unplaced.cfg = lorsas[0].cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        GlobalCircuit(model, unplaced)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="side = 'value' must be one of"):
        circuit.matches(0, 1, "value")
