"""Any model of the hub: train a Lorsa on one layer, and see what its heads do.

What the other examples do with small models whose rules are known, on GPT-2, Pythia or whatever
TransformerLens loads. It needs the network, or a local folder with a Hugging Face model. The
default is a first look on little text that the model writes itself; for Lorsas to keep, give real
text and many more steps to `lorsa-lens train`.

    python examples/gpt2_pythia.py
    python examples/gpt2_pythia.py --model EleutherAI/pythia-70m --layer 3 --behaviour induction
    python examples/gpt2_pythia.py --model path/to/folder --tokens text.txt --steps 2000
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
    Vocabulary,
    describe_heads,
    known_behaviours,
    named_heads,
    validate,
)
from lorsa_lens.analysis.behaviours.prompts import Prompter
from lorsa_lens.analysis.causal import Validation
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.demo.subjects import Subject, from_model
from lorsa_lens.evaluation import Fidelity, evaluate
from lorsa_lens.recording import record_attention
from lorsa_lens.training import TrainingConfig, train_on
from lorsa_lens.views import Figure, Heading, Table, Text, z_pattern_view
from lorsa_lens.views.page import Section

N_CTX = 64
"""Tokens of a sequence."""

N_CHECKED = 8
"""Heads of the chosen behaviour that are switched off: its strongest."""


class Found(NamedTuple):
    """What the example found."""

    layer: int
    fidelity: Fidelity

    heads: list[int]
    """Lorsa heads with the chosen behaviour, strongest first."""

    validation: Validation | None
    """What switching off the strongest costs; None if there are none."""


def trained_lorsa(subject: Subject, layer: int, options: Any) -> Lorsa:
    """A Lorsa of one layer, from what the layer receives and returns on little text."""
    n_sequences, n_pos = subject.train_tokens.shape
    per_step = min(16, n_sequences) * n_pos
    config = TrainingConfig(
        context_size=n_pos,
        train_batch_size_tokens=per_step,
        training_tokens=options.steps * per_step,
    )
    sizes: dict[str, Any] = {**subject.sizes, "n_ov_heads": options.heads, "k": options.k}
    lorsa = Lorsa.from_attention(subject.model, layer, act_fn=config.act_fn, **sizes)
    record = record_attention(subject.model, subject.train_tokens, [layer], progress=True)
    return train_on({layer: lorsa}, record, config)[layer]


def fidelity_table(fidelity: Fidelity) -> Table:
    """How faithful the Lorsa is on other text."""
    names = ["ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "fvu", "dead"]
    return Table(names, [[float(getattr(fidelity, name)) for name in names]])


def behaviour_table(named: Any) -> Table:
    """A row for each behaviour that heads have."""
    rows = [
        [
            behaviour,
            float(group["attended"].iloc[0]),
            len(group),
            float(group["score"].mean()),
            " ".join(group["name"].head(5)),
        ]
        for behaviour, group in named.groupby("behaviour", sort=False)
    ]
    return Table(["behaviour", "best attention head", "Lorsa heads", "score", "strongest"], rows)


def validation_table(validation: Validation, n_heads: int) -> Table:
    """What switching the heads off costs, beside random heads."""
    random_elsewhere = validation.random_costs_elsewhere
    rows = [
        [f"{n_heads} heads", validation.cost, validation.cost_elsewhere],
        [
            f"{n_heads} random heads like them",
            validation.random_cost,
            sum(random_elsewhere) / len(random_elsewhere),
        ],
    ]
    return Table(["off", "nats where it is asked for", "nats elsewhere"], rows)


def prompts_for(model: Any, behaviour: str) -> Int[Tensor, "batch pos"]:
    """Prompts made for a behaviour.

    Raises:
        ValueError: if the model's vocabulary has no such behaviour, or there are no prompts for it.
    """
    vocabulary = Vocabulary.of(model)
    known = known_behaviours(vocabulary)
    made = [name for name, one in known.items() if one.prompts is not None]
    if behaviour not in made:
        raise ValueError(f"--behaviour {behaviour} must be one of: {', '.join(made)}")
    draw = known[behaviour].prompts
    return draw(Prompter(vocabulary, min(48, int(model.cfg.n_ctx)), seed=1), 32)


@torch.no_grad()
def figure(subject: Subject, lorsa: Lorsa, heads: list[int], prompt: Tensor) -> Figure:
    """What heads fetch on one prompt."""
    layer = lorsa.cfg.layer or 0
    part = record_attention(subject.model, prompt[None], [layer])[layer].seen_by(lorsa)
    z_pattern = lorsa.z_pattern(part.x, heads, **part.context)[0]
    names = [f"L{layer}.{head}" for head in heads]
    return z_pattern_view(z_pattern, subject.str_tokens(prompt), head_names=names)


def options_of(argv: Sequence[str] | None) -> Any:
    """The options of the command line."""
    parser = example_options(__doc__, "gpt2_pythia")
    parser.add_argument("--model", default="gpt2", help="hub id or folder (default gpt2)")
    parser.add_argument("--tokens", type=Path, help="token ids (.npy) or text; else it writes them")
    parser.add_argument("--layer", type=int, help="the layer (default: the last of the first half)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default 150)")
    parser.add_argument("--heads", type=int, default=1536, help="Lorsa heads (default 1536)")
    parser.add_argument("--k", type=int, default=64, help="heads that stay (default 64)")
    parser.add_argument("--behaviour", default="induction", help="checked by switching heads off")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Found:
    """Run the example."""
    options = options_of(argv)
    asked = None if options.layer is None else [options.layer]
    sizes = {"n_train": 128, "n_ctx": N_CTX}
    try:
        subject = from_model(options.model, tokens_file=options.tokens, layers=asked, **sizes)
        prompts = prompts_for(subject.model, options.behaviour)
    except ValueError as error:
        sys.exit(str(error))
    model, layers = subject.model, subject.layers
    layer = layers[max(0, len(layers) // 2 - 1)]

    lorsa = trained_lorsa(subject, layer, options)
    (fidelity,) = evaluate(model, lorsa, subject.test_tokens[:32])
    named = named_heads(describe_heads(model, lorsa))
    named = named[named["kind"] == "ov"]
    heads = named[named["behaviour"] == options.behaviour]["head"].tolist()
    sections: list[Section] = [
        fidelity_table(fidelity),
        Heading(f"What heads of layer {layer} do"),
        Text("By prompts made for each behaviour; the score of the best attention head beside."),
        behaviour_table(named),
        Heading(f"Switched off: {options.behaviour}"),
    ]
    validation = None
    if heads:
        behaviour = known_behaviours(Vocabulary.of(model))[options.behaviour]
        strongest = heads[:N_CHECKED]
        validation = validate(model, lorsa, strongest, behaviour, prompts, n_random=3)
        sections += [
            validation_table(validation, len(strongest)),
            figure(subject, lorsa, strongest, prompts[0]),
        ]
    else:
        sections.append(Text("No head has this behaviour: try another layer, or more steps."))
    show(options.out, f"{subject.name}, layer {layer}", *sections)
    return Found(layer, fidelity, heads, validation)


if __name__ == "__main__":
    main()
