"""The heads that track names, in a small language model that was trained on stories.

stories260K (a Llama with 260,000 parameters, https://huggingface.co/karpathy/tinyllamas) writes
"One day, Timmy ..." by looking back for "Timmy". We train a Lorsa on one layer, find the heads that
fetch an earlier copy of a name where that name comes next, and switch them off. The attention head
that does it most is found by the same score (in stories260K it is L2H6) and set to its mean, and
random heads, as frequent and as strong, are switched off for comparison.

    python examples/name_tracking_on_tinystories.py --model path/to/stories260k
    python examples/name_tracking_on_tinystories.py --model roneneldan/TinyStories-1M --layer 4
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lorsa_lens import Lorsa
from lorsa_lens.analysis import (
    Behaviour,
    Vocabulary,
    carrying_heads,
    describe_heads,
    head_effects,
    known_behaviours,
    validate,
)
from lorsa_lens.analysis.causal import Validation
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.demo.subjects import Subject, from_model
from lorsa_lens.recording import record_attention
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.views import Figure, Table, Text, compare_view

NO_MODEL = """\
{error}

Give --model a folder with a Hugging Face model, or an id on the hub:
* stories260K as a Hugging Face model. The hub has it in the formats of llama2.c
  (karpathy/tinyllamas, folder stories260K) and llama.cpp (ggml-org/models,
  tinyllamas/stories260K.gguf); transformers reads the second with gguf_file=..., and
  save_pretrained then makes the folder.
* any other model of TinyStories, for example roneneldan/TinyStories-1M."""

N_CTX = 256
"""Tokens of a sequence: long enough for names to come back."""

N_READ, N_CHANGED = 96, 64
"""Sequences on which heads are found, and others on which they are switched off."""

N_POS = 48
"""Tokens of the figure."""


class Found(NamedTuple):
    """What the example found."""

    attention_head: int
    """The attention head with the highest score."""

    heads: list[int]
    """Lorsa heads that track names, strongest first."""

    attention_cost: float
    """Nats that a name costs, where it is due, when the attention head is set to its mean."""

    validation: Validation
    """The same when the Lorsa heads are switched off, and for random heads."""


def trained_lorsa(subject: Subject, layer: int, options: Any) -> Lorsa:
    """A Lorsa of the layer: loaded if there is a folder, else trained."""
    if options.lorsa is not None:
        return Lorsa.from_pretrained(options.lorsa)
    n_pos = subject.train_tokens.shape[1]
    per_step = 8 * n_pos
    config = TrainingConfig(
        n_ov_heads=options.heads,
        k=options.k,
        context_size=n_pos,
        train_batch_size_tokens=per_step,
        training_tokens=options.steps * per_step,
    )
    return train(subject.model, subject.train_tokens, [layer], config)[layer]


def find(
    model: Any, lorsa: Lorsa, behaviour: Behaviour, tokens: Int[Tensor, "batch pos"]
) -> tuple[int, list[int]]:
    """The attention head with the highest score, and as many Lorsa heads as it has dimensions."""
    frame = describe_heads(model, lorsa, tokens, behaviours=[behaviour])
    attention = frame[frame["kind"] == "attention"]
    best = int(attention.loc[attention["score"].idxmax(), "head"])
    n_heads = Lorsa.from_attention(model, lorsa.cfg.layer or 0).cfg.group_size
    return best, carrying_heads(frame, n_heads)["head"].tolist()


def attention_cost(
    model: Any, layer: int, head: int, behaviour: Behaviour, tokens: Int[Tensor, "batch pos"]
) -> tuple[float, float]:
    """Nats that setting an attention head to its mean costs: where a name is due, and elsewhere."""
    exact = Lorsa.from_attention(model, layer)  # the layer itself: a group of heads for each head
    size = exact.cfg.group_size
    own = list(range(head * size, (head + 1) * size))
    cost = head_effects(model, exact, tokens, {layer: own}, to="mean").cost
    due = behaviour.sources(tokens).any(-1)[:, :-1]
    return cost[due].mean().item(), cost[~due].mean().item()


@torch.no_grad()
def figure(model: Any, lorsa: Lorsa, found: Found, subject: Subject, due: Tensor) -> Figure:
    """The attention head beside the Lorsa heads, on the stretch with most names."""
    row = int(due[:, :N_POS].sum(1).argmax())
    tokens, layer = subject.test_tokens[row : row + 1, :N_POS], lorsa.cfg.layer or 0
    record = record_attention(model, tokens, [layer])[layer]
    part = record.seen_by(lorsa)
    exact = Lorsa.from_attention(model, layer)
    return compare_view(
        exact.pattern(record.x, [found.attention_head], **record.context)[0, 0],
        lorsa.z_pattern(part.x, found.heads[:5], **part.context)[0],
        subject.str_tokens(tokens[0]),
        attention_name=f"L{layer}H{found.attention_head}",
        head_names=[f"L{layer}.{head}" for head in found.heads[:5]],
    )


def options_of(argv: Sequence[str] | None) -> Any:
    """The options of the command line."""
    parser = example_options(__doc__, "name_tracking")
    parser.add_argument("--model", default="stories260k", help="folder or hub id of the model")
    parser.add_argument("--tokens", type=Path, help="token ids (.npy) or text; else it writes them")
    parser.add_argument("--lorsa", type=Path, help="folder of a trained Lorsa; else one is trained")
    parser.add_argument("--layer", type=int, default=2, help="the layer (default 2)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default 120)")
    parser.add_argument("--heads", type=int, default=512, help="Lorsa heads (default 512)")
    parser.add_argument("--k", type=int, default=16, help="heads that stay (default 16)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Found:
    """Run the example."""
    options = options_of(argv)
    layer = options.layer
    sizes = {"n_train": 256, "n_ctx": N_CTX}
    try:
        subject = from_model(options.model, tokens_file=options.tokens, layers=[layer], **sizes)
    except ValueError as error:
        sys.exit(NO_MODEL.format(error=error))
    model, tokens = subject.model, subject.test_tokens[:N_CHANGED]
    behaviour = known_behaviours(Vocabulary.of(model)).get("name mover")
    if behaviour is None:
        sys.exit("The vocabulary of this model has no two first names that are one token each.")

    lorsa = trained_lorsa(subject, layer, options)
    best, heads = find(model, lorsa, behaviour, subject.train_tokens[:N_READ])
    if not heads:
        sys.exit(f"No head of layer {layer} tracks names: try another layer, or more steps.")
    cost, elsewhere = attention_cost(model, layer, best, behaviour, tokens)
    validation = validate(model, lorsa, heads, behaviour, tokens, n_random=3)
    found = Found(best, heads, cost, validation)
    random_elsewhere = validation.random_costs_elsewhere
    rows: list[list[str | float]] = [
        [f"attention head L{layer}H{best}, at its mean", cost, elsewhere],
        [f"{len(heads)} Lorsa heads, off", validation.cost, validation.cost_elsewhere],
        [
            f"{len(heads)} random Lorsa heads, off (mean of {len(random_elsewhere)} draws)",
            validation.random_cost,
            sum(random_elsewhere) / len(random_elsewhere),
        ],
    ]
    show(
        options.out,
        f"Heads of {subject.name} that track names",
        Text(
            "Nats added to the loss, at tokens where the next one is a name that was said before, "
            f"and at all others ({validation.n_queries} such tokens)."
        ),
        Table(["switched off", "where a name is due", "elsewhere"], rows),
        Text("The strongest: " + ", ".join(f"L{layer}.{head}" for head in heads[:8])),
        figure(model, lorsa, found, subject, behaviour.sources(tokens).any(-1)),
    )
    return found


if __name__ == "__main__":
    main()
