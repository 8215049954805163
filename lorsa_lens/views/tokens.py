"""Token strings made safe and visible for circuitsvis.

circuitsvis writes tokens into the page as HTML (so ``<s>`` vanishes and ``<img onerror=...>`` would
run), drops white space from axis labels, and shows a new line as a blank. The strings made here
read the same in a heat map, in coloured text and in a table; they hold no white space and no HTML.
"""

import html
import re
import unicodedata
from collections.abc import Iterable

EMPTY = "∅"
"""What the empty string is shown as."""

SPACE = "·"
"""What a space is shown as."""

_MARKS = str.maketrans(
    {
        "\u2581": " ",  # sentencepiece's word start, "▁"
        "Ġ": " ",  # byte-level BPE's space
        "Ċ": "\n",  # byte-level BPE's new line
    }
)
_VISIBLE = {" ": SPACE, "\n": "⏎", "\t": "⇥"}
_JOINERS = "\u200c\u200d"
_INVISIBLE_CATEGORIES = frozenset({"Cf", "Cs", "Zl", "Zp", "Zs"})

_LEFT, _RIGHT = "\u2039", "\u203a"  # single angle quotes, which look like "<" and ">"
_KEPT_AMPERSAND = "&\u2060"

_NAME = re.compile(rf"<([^<>·{_LEFT}{_RIGHT}]+)>")
_TAG_START = re.compile(r"<(?=[A-Za-z/!?])")


def display_token(token: str) -> str:
    r"""Make one token safe and visible.

    * A new line becomes ``⏎``, a tab ``⇥``, a space ``·``, the empty string ``∅``; other control
      characters become their control picture (``␀``, ``␍``), other invisible characters their
      number (``‹U+202E›``). The joiners of Persian, Indic and emoji text stay inside a token.
    * Tokenizer marks become what they stand for: ``▁`` and ``Ġ`` a space, ``Ċ`` and ``<0x0A>`` a
      new line. Tokens are otherwise taken as text: byte-level tokens of other characters are not
      decoded.
    * ``<s>``, ``<|endoftext|>``, ``</script>`` become ``‹s›``, ``‹|endoftext|›``, ``‹/script›``; a
      lone ``<`` or ``>`` stays. ``&amp;`` and the like stay too: an invisible word joiner (U+2060)
      after the ``&`` keeps HTML from reading them as character references.

    Applying the function twice changes nothing more.

    Args:
        token: The token as text, as `to_str_tokens` gives it, or as the tokenizer stores it.

    Returns:
        A string that is not empty, has no white space, and that HTML shows letter by letter.

    Raises:
        TypeError: If `token` is not a string.

    Example:
        >>> [display_token(token) for token in ("▁cat", "\n", "<s>", "a < b")]
        ['·cat', '⏎', '‹s›', 'a·<·b']
    """
    if not isinstance(token, str):
        raise TypeError(f"token must be a str, got {type(token).__name__}")
    text = token.translate(_MARKS).replace("<0x0A>", "\n").replace("<0x09>", "\t")
    text = text.replace(_KEPT_AMPERSAND, "&")
    if not text:
        return EMPTY
    alone = not text.strip(_JOINERS)
    text = "".join(_visible(char, alone) for char in text)
    text = _TAG_START.sub(_LEFT, _NAME.sub(rf"{_LEFT}\1{_RIGHT}", text))
    return text.replace("&", _KEPT_AMPERSAND) if html.unescape(text) != text else text


def display_tokens(tokens: Iterable[str]) -> list[str]:
    """Apply `display_token` to each token.

    Args:
        tokens: The tokens of one sequence.

    Returns:
        As many strings as there are tokens.

    Raises:
        TypeError: If `tokens` is one string instead of several, or holds something else.
    """
    if isinstance(tokens, str):
        raise TypeError(
            "tokens is one string; pass the sequence of its tokens, "
            "for example model.to_str_tokens(text)"
        )
    return [display_token(token) for token in tokens]


def _visible(char: str, alone: bool) -> str:
    """Return what stands for a character; `alone` if the token is nothing but joiners."""
    if char in _VISIBLE:
        return _VISIBLE[char]
    if char in _JOINERS and not alone:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if 0x80 <= code < 0xA0 or unicodedata.category(char) in _INVISIBLE_CATEGORIES:
        return f"{_LEFT}U+{code:04X}{_RIGHT}"
    return char
