"""How tokenizers store the strings of tokens, and what these stand for."""

import re
from typing import Any

_SPACES = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a space
_NEWLINE = "\u010a"  # how byte-level BPE writes a newline


def readable_pieces(tokenizer: Any, n_tokens: int) -> list[str]:
    """The strings of the first tokens, with spaces and newlines as such.

    Byte-level tokenizers write a character for each byte; here these are characters of the text
    again. Bytes that are only a part of a character are written as SentencePiece does: `<0xE6>`.

    Args:
        tokenizer: of Hugging Face.
        n_tokens: ids 0 to `n_tokens - 1`; those without a token get the empty string.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(n_tokens)))
    if not _is_byte_level(tokenizer):
        return [_readable(piece) for piece in pieces]
    added = tokenizer.get_added_vocab()  # written as they are
    return [_readable(piece) if piece in added else _decoded(piece) for piece in pieces]


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return hasattr(tokenizer, "byte_decoder")
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`).

    Printable bytes of Latin-1 stand for themselves, the others for characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_PART = re.compile("[\udc80-\udcff]")  # a byte that could not be decoded, as Python keeps it


def _decoded(piece: str | None) -> str:
    if piece is None or not all(char in _BYTES for char in piece):
        return _readable(piece)
    text = bytes(_BYTES[char] for char in piece).decode("utf-8", errors="surrogateescape")
    return _PART.sub(lambda part: f"<0x{ord(part[0]) - 0xDC00:02X}>", text)


def _readable(piece: str | None) -> str:
    if piece is None:
        return ""
    for space in _SPACES:
        piece = piece.replace(space, " ")
    return piece.replace(_NEWLINE, "\n").replace("<0x0A>", "\n")
