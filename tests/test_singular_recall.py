"""What is known of the associative-recall model comes out; random models look like their null."""

import runpy
from pathlib import Path

import pytest
import torch
import zoo

from lorsa_lens import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.singular import (
    compare_levels,
    intervene,
    logit_seeds,
    random_control,
    record_stream,
    save_level_page,
    sparsity,
    trace,
)
from lorsa_lens.testbed import RecallLanguage, load_model, run_network
from lorsa_lens.testbed.models import load_weights
from lorsa_lens.testbed.scores import rule_accuracy
from lorsa_lens.training import TrainingConfig, train_on

EXAMPLES = Path(__file__).parents[1] / "examples"
recall_prompt = runpy.run_path(str(EXAMPLES / "trace_recall.py"))["recall_prompt"]
N_PROMPTS = 12


@pytest.fixture(scope="module")
def model():
    return load_model("recall")


@pytest.fixture(scope="module")
def traced(model):
    """Prompts, taken apart, with the circuit of each answer."""
    found = []
    for seed in range(N_PROMPTS):
        prompt, answer = recall_prompt(seed)
        stream = record_stream(model, prompt)
        assert int(stream.logits[-1].argmax()) == answer
        others = stream.logits[-1].clone()
        others[answer] = -torch.inf
        seeds = logit_seeds(stream, answer, int(others.argmax()))
        found.append((stream, trace(stream, seeds), int((prompt == answer).nonzero()[0])))
    return found


# ----------------------------------------------------------------------------------- language


def test_the_model_recalls_pairs():
    weights, config = load_weights("recall")
    labels = RecallLanguage(repeats=0.0).sample(256, seed=3)
    assert rule_accuracy(run_network(weights, labels.tokens, config).logits, labels, 1)[0] > 0.9


def test_labels_of_pairs_by_hand():
    tokens = torch.tensor([[0, 5, 9, 7, 2, 5, 9, 3, 8, 5]])
    labels = RecallLanguage().label(tokens)
    assert labels.answer[0].tolist() == [-1, -1, -1, -1, -1, 9, -1, -1, -1, 9]
    assert labels.source[0].tolist() == [-1, -1, -1, -1, -1, 2, -1, -1, -1, 6]
    assert labels.rule[0].tolist() == [-1, -1, -1, -1, -1, 0, -1, -1, -1, 0]


def test_samples_are_pairs_or_repeats():
    pairs = RecallLanguage(n_pairs=3, n_items=10, repeats=0.0).sample(20, seed=0)
    assert pairs.tokens.shape == (20, 21)
    for row in pairs.tokens.tolist():
        values = dict(zip(row[1::2], row[2::2], strict=True))
        assert len(values) <= 3
        assert all(values[key] == value for key, value in zip(row[1::2], row[2::2], strict=True))
    repeats = RecallLanguage(repeats=1.0).sample(20, seed=0).tokens[:, 1:]
    for row in repeats:
        periods = [p for p in range(8, 18) if torch.equal(row[p:], row[:-p])]
        assert periods
    again = RecallLanguage().sample(4, seed=7).tokens
    assert torch.equal(again, RecallLanguage().sample(4, seed=7).tokens)
    assert not torch.equal(again, RecallLanguage().sample(4, seed=8).tokens)


def test_impossible_languages_are_refused():
    with pytest.raises(ValueError, match="n_pairs must be 1 to 16"):
        RecallLanguage(n_pairs=17)
    with pytest.raises(ValueError, match="repeats must be between 0 and 1"):
        RecallLanguage(repeats=1.5)
    with pytest.raises(ValueError, match="n_sequences must be at least 1"):
        RecallLanguage().sample(0, seed=0)


# ------------------------------------------------------------------------------------ circuits


def test_one_source_edge_from_the_previous_token_head(traced):
    for stream, circuit, value in traced:
        last = stream.n_pos - 1
        edges = [e for e in circuit.edges if e.down.id == f"head.L1.0.{last}.{value}"]
        (source,) = [e for e in edges if e.side == "src"]
        assert source.up.id == f"head.L0.0.{value}.{value - 1}"
        assert source.weight >= 0.9
        assert {e.up.kind for e in edges if e.side == "dest"} == {"embedding"}


def test_ablation_against_random_vectors_of_the_complement(traced):
    drops, controls = [], []
    for stream, circuit, _ in traced:
        for edge in circuit.edges:
            if edge.down.kind == "head" and edge.weight >= 0.3:
                drops.append(change(intervene(stream, edge)))
                random = [random_control(stream, edge, seed=seed) for seed in range(4)]
                controls += [change(intervene(stream, control)) for control in random]
    assert len(drops) >= 2 * N_PROMPTS
    assert sum(drops) / len(drops) <= -0.5
    assert abs(sum(controls) / len(controls)) <= 0.1


def change(report):
    (effect,) = report.effects
    return effect.attention_after - effect.attention_before


def test_singular_vectors_are_special_where_something_was_learned(traced):
    rows = {row.statistic: row for row in sparsity([stream for stream, _, _ in traced[:3]])}
    assert set(rows) == {"cumulative", "relative", "rolls_tovee", "greedy_dest", "greedy_src"}
    for row in rows.values():
        assert row.ratio <= 0.7
        assert row.n_firings > 50


@pytest.mark.parametrize("name", ["learned", "rotary-partial"])
def test_they_are_not_on_random_models(name):
    stream = record_stream(zoo.by_name(name).build(torch.float32), zoo.tokens(1, 14))
    rows = {row.statistic: row for row in sparsity(stream, greedy=False)}
    assert rows["cumulative"].ratio >= 0.85
    assert rows["cumulative"].n_firings > 10
    with pytest.raises(ValueError, match="a count needs its null"):
        sparsity(stream, n_rotations=0)


# -------------------------------------------------------------------------------------- levels


@pytest.fixture(scope="module")
def compared(model, traced):
    """Lorsas trained with the package's trainer: of the sizes it defaults to, and four circuits."""
    seen = RecallLanguage().sample(1024, seed=1).tokens
    found = []
    for n_qk_heads, n_ov_heads in ((1, 1024), (4, 128)):
        lorsa = Lorsa.from_attention(model, 1, n_qk_heads=n_qk_heads, n_ov_heads=n_ov_heads, k=10)
        batch = 32 * seen.shape[1]
        config = TrainingConfig(
            train_batch_size_tokens=batch, context_size=seen.shape[1], training_tokens=150 * batch
        )
        train_on({1: lorsa}, record_attention(model, seen, [1]), config)
        comparisons = [
            compare_levels(stream, lorsa, stream.n_pos - 1, value) for stream, _, value in traced
        ]
        found.append(comparisons)
    return found


def test_a_lorsa_owes_its_attention_to_the_same_components(compared):
    one_circuit, _ = compared
    for comparison in one_circuit:
        (circuit,) = comparison.comparisons
        assert circuit.sides["src"].jaccard == 1.0
        assert circuit.sides["dest"].jaccard >= 0.7
        assert all(agreement.pearson >= 0.95 for agreement in circuit.sides.values())


def test_several_circuits_share_the_components_of_one_head(compared):
    for comparisons in compared:
        assert comparisons[0].mean("src", "jaccard") == 1.0
        for comparison in comparisons:
            assert comparison.heads == (0,)
            assert comparison.comparisons
            assert comparison.mean("src", "jaccard") >= 0.7
            assert comparison.mean("dest", "jaccard") >= 0.7
            for side in ("dest", "src"):
                assert comparison.mean(side, "pearson") >= 0.95
                assert comparison.mean(side, "overlap") > comparison.mean(side, "overlap_null")


def test_what_one_level_says_the_other_needs(compared):
    for comparisons in compared:
        for comparison in comparisons:
            for circuit in comparison.comparisons:
                assert circuit.attention > 0.9
                assert circuit.pattern_distance < 0.1
                for agreement in circuit.sides.values():
                    assert agreement.ablated_original < 0.3
                    if len(comparison.comparisons) == 1:
                        assert agreement.ablated < circuit.attention - 0.3
            for side in ("dest", "src"):  # of four circuits, on average
                assert comparison.mean(side, "ablated") < 0.6


def test_the_exact_lift_agrees_in_everything(model, traced, tmp_path):
    stream, _, value = traced[0]
    comparison = compare_levels(stream, Lorsa.from_attention(model, 1), stream.n_pos - 1, value)
    (circuit,) = comparison.comparisons
    assert circuit.pattern_distance < 1e-9
    assert circuit.attention == pytest.approx(comparison.head_attention[0])
    for agreement in circuit.sides.values():
        assert agreement.jaccard == 1.0
        assert agreement.pearson == pytest.approx(1.0)
        assert agreement.overlap == pytest.approx(1.0)
        assert agreement.overlap_null < 0.5
        assert agreement.ablated == pytest.approx(agreement.ablated_original)
        assert agreement.n_selected == agreement.n_selected_original
    page = save_level_page(comparison, tmp_path / "levels.html").read_text()
    assert "L1.qk0" in page
    assert f"token {stream.n_pos - 1} to {value}" in page


def test_where_nothing_attends_there_is_nothing_to_compare(model, traced, tmp_path):
    stream, _, value = traced[0]
    lorsa = Lorsa.from_attention(model, 1)
    other = compare_levels(stream, lorsa, stream.n_pos - 1, value - 1)
    assert other.heads == other.comparisons == ()
    assert other.mean("src", "jaccard") != other.mean("src", "jaccard")  # NaN
    assert save_level_page([other], tmp_path / "none.html").exists()
    with pytest.raises(ValueError, match="give 0 <= src <= dest <= 33"):
        compare_levels(stream, lorsa, 3, 5)
    lorsa.cfg = lorsa.cfg.replace(layer=None)
    with pytest.raises(ValueError, match=r"cfg\.layer is None"):
        compare_levels(stream, lorsa, 5, 3)
