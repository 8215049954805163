"""Figures of one layer: the heads that were named, at work on one sequence."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lorsa_lens import views
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.demo.story import Finding, Story
from lorsa_lens.functional.code import to_dense
from lorsa_lens.lorsa import Lorsa

Section = views.Heading | views.Text | views.Table | views.Figure

MAX_TOKENS = 48
"""Tokens of the sequence that figures show."""

MAX_HEADS = 8
"""Heads in a figure."""

MAX_CANDIDATES = 20
"""Heads of a relation among which the one to show is chosen."""


class _Scene(NamedTuple):
    """What to show: a sequence, and the heads at work on it by relation."""

    row: int
    heads: dict[str, int]


def layer_figures(story: Story, lorsa: Lorsa) -> list[Section]:
    """The z patterns of named heads and the patterns of their circuits; nothing if none is named.

    The sequence is the one on which heads of most relations are at work, and for each relation
    the head that is most active on it is shown.
    """
    layer = lorsa.cfg.layer
    found = [finding for finding in story.findings if finding.layer == layer and finding.heads]
    if layer is None or not found:
        return []
    scene = _scene(story, lorsa, found)
    record = story.records[layer].batch(slice(scene.row, scene.row + 1)).seen_by(lorsa)
    heads = list(scene.heads.values())
    circuits = sorted({head // lorsa.cfg.group_size for head in heads})
    n_shown = min(MAX_TOKENS, record.x.shape[1])
    tokens = story.subject.str_tokens(story.subject.test_tokens[scene.row])[:n_shown]
    with torch.no_grad():
        pattern = lorsa.pattern(record.x, circuits, **record.context)
        acts = to_dense(lorsa.encode(record.x, **record.context), lorsa.cfg.n_ov_heads)
        stays = rearrange(acts[..., heads] != 0, "b q h -> b h q 1")
        z_pattern = lorsa.z_pattern(record.x, heads, **record.context) * stays
    names = [f"{head_name(layer, head)} {relation}" for relation, head in scene.heads.items()]
    return [
        views.Heading(f"Layer {layer}: what the heads fetch", level=3),
        views.Text(
            "For each relation, the Lorsa head most active on this sequence: what each token "
            "(column) gives it, at the tokens (rows) where it stays. The other rows are blank."
        ),
        views.z_pattern_view(z_pattern[0, :, :n_shown, :n_shown], tokens, head_names=names),
        views.Text("The query-key circuits that these heads share."),
        views.attention_view(
            pattern[0, :, :n_shown, :n_shown],
            tokens,
            head_names=[f"L{layer} QK {circuit}" for circuit in circuits],
        ),
    ]


def _scene(story: Story, lorsa: Lorsa, found: list[Finding]) -> _Scene:
    """The sequence on which heads of most relations stay at a token of the relation."""
    activity = {}
    for finding in found:
        heads = finding.heads[:MAX_CANDIDATES]
        at_work = story.subject.sources[finding.relation][:, :MAX_TOKENS] >= 0
        acts = _activity(story, lorsa, finding.layer, heads) * at_work[..., None]
        activity[finding.relation] = acts.amax(1)  # [sequence, candidate]
    present = torch.stack([acts.amax(-1) > 0 for acts in activity.values()]).sum(0)
    row = int(present.argmax())
    candidates = {finding.relation: finding.heads for finding in found}
    shown = {
        relation: candidates[relation][int(acts[row].argmax())]
        for relation, acts in activity.items()
        if float(acts[row].max()) > 0
    }
    return _Scene(row, dict(list(shown.items())[:MAX_HEADS]))


@torch.no_grad()
def _activity(
    story: Story, lorsa: Lorsa, layer: int, heads: list[int], batch_size: int = 16
) -> Float[Tensor, "batch pos head"]:
    """Absolute activations of some heads on the shown part of all test sequences."""
    record, parts = story.records[layer], []
    for start in range(0, record.x.shape[0], batch_size):
        part = record.batch(slice(start, start + batch_size)).seen_by(lorsa)
        acts = to_dense(lorsa.encode(part.x, **part.context), lorsa.cfg.n_ov_heads)
        parts.append(acts[:, :MAX_TOKENS, heads].abs().cpu())
    return torch.cat(parts)
