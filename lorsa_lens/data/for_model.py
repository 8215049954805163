"""Contexts as a language model wants them: read with its tokenizer, with its special tokens."""

from pathlib import Path
from typing import Any

from torch import nn

from lorsa_lens.data.contexts import Contexts
from lorsa_lens.data.hugging_face import is_dataset
from lorsa_lens.data.packing import pack
from lorsa_lens.data.sources import open_documents
from lorsa_lens.data.text import special_token_ids


def contexts_for_model(
    model: nn.Module,
    tokens: Any,
    context_size: int,
    *,
    prepend_bos: bool = True,
    exclude_special_tokens: bool = True,
    n_epochs: int | None = 1,
) -> Contexts:
    """Text or token ids, packed into contexts for a model.

    Args:
        model: a HookedTransformer or a TransformerBridge; its tokenizer, if it has one, reads text
            and says which tokens are special.
        tokens: anything that `open_documents` reads.
        context_size: positions per context.
        prepend_bos: whether contexts begin with the tokenizer's BOS.
        exclude_special_tokens: whether special tokens do not count.
        n_epochs: times through the documents; None for no end.

    Raises:
        ValueError: as `open_documents` and `pack` do.
    """
    tokenizer = getattr(model, "tokenizer", None)
    excluded = exclude_special_tokens and tokenizer is not None
    return pack(
        open_documents(tokens, tokenizer=tokenizer if _may_be_text(tokens) else None),
        context_size,
        bos_token_id=getattr(tokenizer, "bos_token_id", None) if prepend_bos else None,
        special_token_ids=special_token_ids(tokenizer) if excluded else (),
        n_epochs=n_epochs,
    )


def _may_be_text(tokens: Any) -> bool:
    """Whether it may hold text, which a tokenizer must read, rather than token ids."""
    if isinstance(tokens, str | Path):
        return Path(tokens).suffix not in (".npy", ".bin")
    return is_dataset(tokens)
