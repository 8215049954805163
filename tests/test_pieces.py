"""Strings of tokens, against the tokenizer's own decoding."""

import re
from dataclasses import replace

import pytest
import torch
import zoo

from lorsa_lens import Lorsa
from lorsa_lens.analysis.pieces import readable_pieces
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.dashboard import read_heads, write_site

TEXTS = [
    "Москва спит. Москва не спит.",
    "東京は日本の首都です。東京、東京",
    "مرحبا بالعالم مرحبا",
    "नमस्ते दुनिया",
    "naïve café\nline\t\xa0end \U0001f600 Ġ <s>",
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer with merges of several scripts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def as_bytes(piece):
    parts = re.split("<0x([0-9A-F]{2})>", piece)
    return b"".join(
        bytes.fromhex(part) if number % 2 else part.encode() for number, part in enumerate(parts)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_bytes_of_the_text(byte_level, text):
    pieces = readable_pieces(byte_level, len(byte_level))
    ids = byte_level(text)["input_ids"]
    assert b"".join(as_bytes(pieces[token]) for token in ids) == text.encode()


def test_pieces_are_what_the_tokenizer_decodes(byte_level):
    pieces = readable_pieces(byte_level, len(byte_level) + 3)
    whole = 0
    for token, piece in enumerate(pieces[:-3]):
        decoded = byte_level.decode([token])
        if "\ufffd" not in decoded:
            assert piece == decoded
            whole += 1
        else:
            assert re.search("<0x[0-9A-F]{2}>", piece)
    assert whole > 128
    assert {"Москва", "東京"} <= {piece.strip() for piece in pieces}
    assert pieces[byte_level.eos_token_id] == "<|end|>"
    assert pieces[-3:] == ["", "", ""]


def test_other_tokenizers_are_left_as_they_are(byte_level):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁ein", "Ċ", "<0x0A>", "<0xE6>", "é", "Ð"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert readable_pieces(plain, 7) == ["<unk>", " ein", "\n", "\n", "<0xE6>", "é", "Ð"]


def test_the_table_shows_other_scripts(byte_level, tmp_path):
    model = zoo.KINDS[0].build(torch.float32)
    pieces = readable_pieces(byte_level, len(byte_level))
    ids = [token for token, piece in enumerate(pieces) if piece.strip() in ("Москва", "東京")]
    strings = Vocabulary.of(model)
    shown = tuple(pieces[ids[token % 2]] for token in range(len(strings)))
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    facts = read_heads(
        model, lorsa, zoo.tokens(2, 8), [0], vocabulary=replace(strings, strings=shown)
    )
    write_site(tmp_path / "site", facts)
    for page in ("index.html", "heads/L1.0.html"):
        text = (tmp_path / "site" / page).read_text(encoding="utf-8")
        assert "Москва" in text or "東京" in text
        assert "Ð" not in text
