"""Cards, comparisons and plots: what they show, and what they refuse."""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch

from lorsa_lens.views import (
    Card,
    Excerpt,
    HeadFacts,
    compare_view,
    head_card,
    layer_overview,
    plot_behaviours,
    plot_densities,
    plot_effective_heads,
    plot_fvu_by_k,
    plot_training,
    render,
)

TOKENS = ["<s>", "</script>", "\n", "<b>x</b>", "\u202e"]
EXCERPT = Excerpt(TOKENS, 4, -2.5, [0.6, -0.3, 0.01, 0.09, 0.0])
FACTS = HeadFacts(
    layer=3,
    head=7,
    behaviours={"induction": 0.75, "<i>": 0.5},
    density=0.02,
    excerpts=[EXCERPT],
    raises=[("</script>", 1.5)],
    lowers=[("a", -1.0), ("b", -0.5)],
    origins={0: 0.25, 5: 0.75},
    effective_heads=1.6,
)


def test_a_card_shows_everything_as_text():
    page = render(head_card(FACTS), title="card")
    assert "induction (0.75); &lt;i&gt; (0.50)" in page
    assert page.count("<g><title>") == 3  # one source gives less than 5%, one nothing
    for share, source in ((60, 0), (30, 1), (9, 3)):
        assert f"{share}% of |A·v|" in page
        assert f"from position {source} (" in page
    assert "z = -2.5 at position 4 (framed)" in page
    assert "<td>unknown</td>" in page  # the largest |z| was not given
    assert "3.5, share of what it carries: 0.75" in page
    for markup in ("<b>", "<i>", "</script>", "<s>", "\u202e"):
        assert markup not in page


def test_far_tokens_are_left_out_of_a_context():
    tokens = [f"t{number}" for number in range(40)]
    excerpt = Excerpt(tokens, 30, 1.0, [float(number == 10) for number in range(40)])
    page = head_card(replace(FACTS, excerpts=[excerpt])).to_html()
    shown = [number for number in range(40) if f">t{number}<" in page]
    assert shown == [8, 9, 10, 11, 12, 28, 29, 30, 31, 32]
    assert page.count(">…<") == 3


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="17 excerpts, one card draws at most 16"):
        head_card(replace(FACTS, excerpts=[EXCERPT] * 17))
    with pytest.raises(ValueError, match="2 values for 1 tokens"):
        Excerpt(["a"], 0, 1.0, [1.0, 2.0])
    with pytest.raises(ValueError, match="query is 1"):
        Excerpt(["a"], 1, 1.0, [1.0])
    with pytest.raises(ValueError, match="finite"):
        Excerpt(["a"], 0, 1.0, [math.nan])
    with pytest.raises(ValueError, match=r"one layer, got layers \[3, 4\]"):
        layer_overview([FACTS, replace(FACTS, layer=4)])
    with pytest.raises(ValueError, match="no parts"):
        Card("empty", [])


def test_an_overview_counts_heads():
    heads = [replace(FACTS, head=head, density=10.0**-head) for head in range(1, 6)]
    heads.append(replace(FACTS, head=9, density=0.0, behaviours={}, effective_heads=math.nan))
    page = layer_overview(heads).to_html()
    assert "Layer 3: 6 heads" in page
    for label, n in (("dead", 1), ("&lt; 0.0001", 1), ("&lt; 0.01", 1), ("≥ 0.1", 1)):
        assert f"<title>{label}, heads: {n}</title>" in page
    assert "L3.1 L3.2 L3.3 L3.4 L3.5" in page
    assert "<title>2, heads: 5</title>" in page


def test_a_comparison_is_drawn_on_one_scale():
    pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    z_pattern = torch.tensor([[[4.0, 0.0], [-2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    spec = compare_view(pattern, z_pattern, ["a", "b"], attention_name="1.0").spec
    assert spec.props["attention"] == [
        [[1.0, 0.0], [0.25, 0.75]],
        [[1.0, 0.0], [-0.5, 0.25]],
        [[0.0, 0.0], [0.0, 0.0]],
    ]
    assert spec.props["attentionHeadNames"] == ["1.0", "Head 0", "Head 1"]
    assert (spec.props["minValue"], spec.props["maxValue"]) == (-1.0, 1.0)
    bare = inspect.unwrap(compare_view)
    with pytest.raises(ValueError, match=r"pattern must be \[query, key\]"):
        bare(pattern[None], z_pattern, ["a", "b"])
    with pytest.raises(ValueError, match="within 0 to 1"):
        compare_view(pattern * 2, z_pattern, ["a", "b"])
    with pytest.raises(ValueError, match="at most 16"):
        compare_view(pattern, z_pattern[:1].expand(16, -1, -1), ["a", "b"])


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_training_is_plotted_from_the_file(tmp_path, pyplot):
    rows = [
        {"step": step, "blocks.0/losses/mse_loss": 1 / step, "blocks.1/losses/mse_loss": 2 / step}
        for step in (1, 2, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, ax = pyplot.subplots()
    assert plot_training(tmp_path, ax=ax) is ax
    assert [line.get_label() for line in ax.lines] == ["blocks.0", "blocks.1"]
    assert ax.lines[1].get_xydata().tolist() == [[1, 2.0], [2, 1.0], [4, 0.5]]
    with pytest.raises(ValueError, match="has no metric 'loss'; it has losses/mse_loss"):
        plot_training(tmp_path, "loss")


def test_numbers_are_plotted(pyplot):
    ax = plot_fvu_by_k({"Lorsa": {8: 0.5, 4: 0.75}})
    assert ax.lines[0].get_xydata().tolist() == [[4, 0.75], [8, 0.5]]
    ax = plot_densities({"L0": torch.tensor([0.0, 0.01, 0.011, 0.5])})
    assert ax.get_legend().get_texts()[0].get_text() == "L0 (1 dead)"
    ax = plot_effective_heads({"L0": torch.tensor([1.0, 2.5, math.nan])})
    assert ax.get_xlabel() == "effective attention heads"
    for plot, message in (
        (lambda: plot_fvu_by_k({"x": {}}), "at least one K"),
        (lambda: plot_densities({"x": torch.tensor([1.5])}), "within 0 to 1"),
        (lambda: plot_effective_heads({"x": torch.tensor([math.nan])}), "no numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            plot()


def test_behaviours_are_counted_once_for_each_head(pyplot):
    pandas = pytest.importorskip("pandas")
    rows = [("induction", 2, "ov", 1), ("induction", 2, "ov", 1), ("induction", 2, "ov", 4),
            ("previous token", 0, "ov", 1), ("induction", 0, "qk", 1)]  # fmt: skip
    frame = pandas.DataFrame(rows, columns=["behaviour", "layer", "kind", "head"])
    ax = plot_behaviours(frame)
    assert ax.images[0].get_array().tolist() == [[0, 0, 2], [1, 0, 0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["induction", "previous token"]
    with pytest.raises(ValueError, match="no rank-1 head"):
        plot_behaviours(frame[frame["kind"] == "qk"])
