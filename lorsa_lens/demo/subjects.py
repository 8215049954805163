"""What the demo is about: a model, text, and the sources that its heads may fetch from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lorsa_lens.analysis.relations import RELATIONS
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.loading import load_host
from lorsa_lens.testbed import CyclicLanguage, load_language, load_model
from lorsa_lens.testbed.models import ModelName

N_TEST = 128
"""Sequences that are measured, not trained on."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model and all that the demo needs to know about it."""

    name: str
    """Short, for files."""
    title: str
    """One line, for people."""
    load: tuple[str, str]
    """The import and the expression that load the model in a notebook."""
    model: nn.Module
    train_tokens: Int[Tensor, "n_train train_pos"]
    test_tokens: Int[Tensor, "n_test pos"]
    predicted: Bool[Tensor, "n_test pos"] | None
    """Positions of the test tokens whose next token counts for the cross entropy. None: all."""
    sources: dict[str, Int[Tensor, "n_test pos"]]
    """By relation, the position of each test token's source, -1 where it has none."""
    str_tokens: Callable[[Tensor], list[str]]
    """The readable strings of one sequence."""
    sizes: dict[str, int]
    """`n_qk_heads`, `n_ov_heads` and `k` of its Lorsas."""
    layers: list[int]
    """Which layers get a Lorsa."""


def from_testbed(name: ModelName, *, n_train: int = 4096, seed: int = 0) -> Subject:
    """A model of the testbed on its own language, whose rules are the relations."""
    language, model = load_language(name), load_model(name)
    train = language.sample(n_train, seed=seed + 1)
    if name == "induction":  # so short that each token has one earlier occurrence to fetch from
        language = CyclicLanguage(n_ctx=19, min_period=9)
    test = language.sample(N_TEST, seed=seed + 2)
    titles = {
        "rules": "Eleven rules in one layer of three heads",
        "induction": "Induction in two attention-only layers",
    }
    sources = {
        rule: test.source.masked_fill(test.rule != index, -1)
        for index, rule in enumerate(language.rules)
    }
    if name == "induction":  # what its first layer is for
        sources = {
            "induction": sources["induction"],
            "previous token": RELATIONS["previous token"](test.tokens),
        }
    return Subject(
        name=name,
        title=titles[name],
        load=("from lorsa_lens.testbed import load_model", f'load_model("{name}")'),
        model=model,
        train_tokens=train.tokens,
        test_tokens=test.tokens,
        predicted=test.answer >= 0,
        sources=sources,
        str_tokens=language.str_tokens,
        sizes={"n_qk_heads": 8, "n_ov_heads": 256, "k": 4},
        layers=list(range(host_of(model).n_layers)),
    )


def from_model(
    name: str,
    *,
    tokens_file: Path | None = None,
    layers: list[int] | None = None,
    n_train: int = 256,
    n_ctx: int = 128,
    seed: int = 0,
) -> Subject:
    """Any language model, on given text or on text sampled from itself.

    Args:
        name: a folder with a Hugging Face model and its tokenizer, or an id on the hub.
        tokens_file: `.npy` with token ids [sequence, pos], or a text file, which is cut into
            contexts that start with the BOS token. None: the model writes.
        layers: which layers get a Lorsa. None: all.
        n_train: sequences to train on.
        n_ctx: tokens per sequence.
        seed: for sampling.

    Raises:
        ValueError: if the model cannot be loaded, has no tokenizer, or a layer of it does not exist
            or cannot be replaced; if the file is none of the above, or holds too few tokens or ids
            outside the vocabulary.
    """
    model = load_host(name)
    if model.tokenizer is None:
        raise ValueError(f"the model {name} has no tokenizer: put its files beside the weights")
    host = host_of(model)
    chosen = sorted(set(range(host.n_layers) if layers is None else layers))
    for layer in chosen:
        host.read_attention(layer)  # refuses what a Lorsa cannot replace, before any work
    n_ctx = min(n_ctx, int(model.cfg.n_ctx))
    n_sequences = n_train + N_TEST
    short_name = Path(name).resolve().name
    if tokens_file is None:
        tokens = _sampled(model, n_sequences, n_ctx, seed)
    else:
        tokens = _read_tokens(model, tokens_file, n_sequences, n_ctx)
    n_test = min(N_TEST, tokens.shape[0] // 3)
    test = tokens[:n_test]
    n_heads = int(model.cfg.n_heads)
    return Subject(
        name=short_name,
        title=f"{short_name}: {host.n_layers} layers, d_model {host.d_model}",
        load=("from lorsa_lens.hosts.loading import load_host", f"load_host({name!r})"),
        model=model,
        train_tokens=tokens[n_test:],
        test_tokens=test,
        predicted=None,
        sources={relation: find(test) for relation, find in RELATIONS.items()},
        str_tokens=lambda ids: list(model.tokenizer.convert_ids_to_tokens(ids.tolist())),
        sizes={
            "n_qk_heads": n_heads,
            "n_ov_heads": 8 * host.d_model // n_heads * n_heads,
            "k": max(4, host.d_model // 12),
        },
        layers=chosen,
    )


def _sampled(model: Any, n_sequences: int, n_ctx: int, seed: int) -> Tensor:
    """Sequences that the model writes itself at temperature 1, after its first token."""
    prompt = torch.tensor(_first_token(model) or [0]).expand(n_sequences, 1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        written: Tensor = model.generate(
            prompt,
            max_new_tokens=n_ctx - 1,
            do_sample=True,
            temperature=1.0,
            stop_at_eos=False,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
    return written.to("cpu")


def _first_token(model: Any) -> list[int]:
    """What sequences start with: the BOS token, or the EOS token where that is its stand-in."""
    ids = (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id)
    return [int(token) for token in ids if token is not None][:1]


def _read_tokens(model: Any, path: Path, n_sequences: int, n_ctx: int) -> Tensor:
    ids = _read_ids(path) if path.suffix == ".npy" else _tokenized(model, path, n_ctx)
    ids = ids[:n_sequences, :n_ctx]
    if ids.shape[0] < 3 or ids.shape[1] < 2:
        raise ValueError(
            f"{path} gives {ids.shape[0]} sequences of {ids.shape[1]} tokens: at least 3 of at "
            "least 2 are needed"
        )
    d_vocab = int(model.cfg.d_vocab)
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        raise ValueError(f"{path} holds ids outside 0 to {d_vocab - 1}, the model's vocabulary")
    return ids


def _read_ids(path: Path) -> Tensor:
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{path} holds {ids.dtype} of shape {list(ids.shape)}: give integers [sequence, pos]"
        )
    return torch.from_numpy(ids.astype(np.int64))


def _tokenized(model: Any, path: Path, n_ctx: int) -> Tensor:
    """The tokens of a text, cut into whole contexts that all start with the first token."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    # Otherwise it warns of texts longer than the model's context.
    encoded = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = _first_token(model)
    n_own = n_ctx - len(first)
    starts = range(0, len(encoded) - n_own + 1, n_own)
    contexts = [first + encoded[start : start + n_own] for start in starts]
    return torch.tensor(contexts, dtype=torch.long).view(len(contexts), n_ctx)
