"""From text to a circuit and its files."""

from pathlib import Path
from typing import Any

from torch import nn

from lorsa_lens.interop.graph_schema import slug_of
from lorsa_lens.singular.drawing import save_page
from lorsa_lens.singular.exports import save_circuit_tracer, save_graphml
from lorsa_lens.singular.graph import Circuit
from lorsa_lens.singular.method import Method
from lorsa_lens.singular.seeds import logit_seeds, probability_seeds
from lorsa_lens.singular.stream import record_stream
from lorsa_lens.singular.tracer import trace


def trace_prompt(
    model: nn.Module,
    prompt: str,
    answer: str,
    wrong: str | None = None,
    *,
    method: Method | None = None,
) -> Circuit:
    """Trace why a model answers a prompt as it does.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        prompt: the text up to where the answer is said.
        answer: one token, with its leading space where it has one.
        wrong: another. With it the difference of the two logits is traced, without it the
            probability of the answer.
        method: how firings are explained. None: `Greedy()`.

    Raises:
        ValueError: if the prompt is empty, or an answer is not one token.
    """
    host: Any = model
    if not prompt:
        raise ValueError("prompt is empty: give the text up to where the answer is said")
    tokens = host.to_tokens(prompt)
    target = one_token(host, "answer", answer)
    stream = record_stream(model, tokens)
    if wrong is None:
        seeds = probability_seeds(stream, target)
    else:
        seeds = logit_seeds(stream, target, one_token(host, "wrong", wrong))
    return trace(
        stream,
        seeds,
        method=method,
        tokens=[host.to_string(token[None]) for token in tokens[0]],
        meta={"prompt": prompt, "answer": answer, "wrong": wrong},
    )


def save_all(circuit: Circuit, folder: Path, *, slug: str) -> Path:
    """Write `circuit.json`, `.graphml`, `.html` and `circuit-tracer.json`.

    Args:
        circuit: what to write.
        folder: where to.
        slug: what to call it: any text.

    Returns:
        The page.
    """
    circuit.save(folder / "circuit.json")
    save_graphml(circuit, folder / "circuit.graphml")
    if circuit.tokens:
        save_circuit_tracer(circuit, folder / "circuit-tracer.json", slug=slug_of(slug))
    return save_page(circuit, folder / "circuit.html", title=f"Circuit: {slug}")


def one_token(host: Any, name: str, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: if it is several; `name` is the argument that gave it.
    """
    ids = host.to_tokens(text, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        pieces = [
            host.to_string(host.to_tokens(text, prepend_bos=False)[0][i : i + 1])
            for i in range(len(ids))
        ]
        raise ValueError(
            f"{name} = {text!r} is {len(ids)} tokens, {pieces}: give one token, with its leading "
            "space where it has one"
        )
    return int(ids[0])
