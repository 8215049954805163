"""A model whose layer 1 reads tokens as one-hot vectors, and heads made by hand to read them.

The residual stream before layer 1 has four blocks: the token, the one before, the one before that,
and the position. So every behaviour is a bilinear form that can be written down.
"""

import torch

from lorsa_lens import Lorsa, LorsaConfig
from lorsa_lens.analysis.strings import Vocabulary

WORD_LIST = (
    "Apple Amber Bread Basin Cloud Cedar Drum Delta Eagle Ember Forest Fjord Garden Glade Honey "
    "Harbor Island Inlet Jacket Jasper Kelp Kite Lagoon Lamp Maple Mast"
)
WORDS = WORD_LIST.split()
LETTERS = list("ABCDEFGHIJKLM")
NAMES = ["Mary", "John", "Alice", "Bob"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DIGITS = [str(digit) for digit in range(10)]
STRINGS = (
    "<bos>",
    *(f" {word}" for word in (*WORDS, *LETTERS, *NAMES, *DAYS)),
    *DIGITS, "+", "=", ".", ",",
)  # fmt: skip
VOCABULARY = Vocabulary(STRINGS, special=frozenset([0]), bos=0)
N_POS = 40
N = len(STRINGS)
D_MODEL = 3 * N + N_POS
TOKEN, BEFORE, BEFORE_THAT = (slice(i * N, (i + 1) * N) for i in range(3))
PLACE = slice(3 * N, D_MODEL)
SHARP = 60.0


def ids(*words):
    return [VOCABULARY.id_of(word) for word in words]


def marked(tokens):
    vector = torch.zeros(N)
    vector[list(tokens)] = 1.0
    return vector


def model():
    """Layer 0 copies the two tokens before into blocks of their own; layer 1 writes nothing."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_heads=2, d_head=N, d_vocab=N, n_ctx=N_POS,
        attn_only=True, normalization_type=None, init_weights=False, device="cpu",
    )  # fmt: skip
    hooked = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.zero_()
        hooked.embed.W_E[:, TOKEN] = torch.eye(N)
        hooked.pos_embed.W_pos[:, PLACE] = torch.eye(N_POS)
        hooked.unembed.W_U[TOKEN] = torch.eye(N)
        attn = hooked.blocks[0].attn
        for head, block in enumerate((BEFORE, BEFORE_THAT)):
            offset = head + 1
            attn.W_Q[head, PLACE, :N_POS] = SHARP * torch.eye(N_POS)
            shift = torch.zeros(N_POS, N_POS)
            at = torch.arange(N_POS - offset)
            shift[at, at + offset] = 1.0
            attn.W_K[head, PLACE, :N_POS] = shift * attn.attn_scale
            attn.W_V[head, TOKEN, :N] = torch.eye(N)
            attn.W_O[head, :N, block] = torch.eye(N)
    return hooked


def forms():
    """By behaviour: the bilinear form [d_model, d_model], what is read, and what is written."""
    everything = torch.ones(N)
    everything[0] = 0.0  # attention rests on BOS, where there is nothing to read
    words = VOCABULARY.words
    rest = torch.zeros(D_MODEL, D_MODEL)
    rest[:, 0] = 0.125  # every query, a little: it has up to four blocks

    def form(query, key, matrix):
        out = rest.clone()
        out[query, key] += matrix
        return out

    def offset(n):
        shift = torch.zeros(N_POS, N_POS)
        at = torch.arange(N_POS - n)
        shift[at + n, at] = 1.0
        return form(PLACE, PLACE, shift)

    def to(tokens, from_tokens=range(N)):
        return form(TOKEN, TOKEN, marked(from_tokens)[:, None] * marked(tokens)[None, :])

    nowhere = torch.zeros(N)
    eye = torch.eye(N)
    duplicate = form(TOKEN, TOKEN, eye)
    duplicate[PLACE, PLACE] -= torch.eye(N_POS)
    induction = form(TOKEN, BEFORE, eye)
    gapped = form(BEFORE, BEFORE_THAT, eye)
    gapped[TOKEN, BEFORE] -= 2 * eye
    prefixes = torch.zeros(N, N)
    for short, shorter in enumerate(STRINGS):
        for long, longer in enumerate(STRINGS):
            prefixes[short, long] = short > 0 and longer != shorter and longer.startswith(shorter)
    initials = torch.zeros(N, N)
    for letter in LETTERS:
        for word in words:
            if STRINGS[word].strip()[0] == letter:
                initials[VOCABULARY.id_of(letter), word] = 1.0
    mary, monday, tuesday = ids("Mary", "Monday", "Tuesday")
    days = ids(*DAYS)
    recent_day = to(days)
    recent_day[PLACE, PLACE] += 0.5 * (torch.arange(N_POS) / N_POS)[None, :]
    digits, (plus, equals) = marked(ids(*DIGITS)), ids("+", "=")
    first_sum, second_sum = rest.clone(), rest.clone()
    for matrix, sign in ((first_sum, -2.0), (second_sum, 1.0)):
        matrix[equals, TOKEN] += digits * (1.0 if sign < 0 else 0.5)
        for block in (BEFORE, BEFORE_THAT):
            matrix[equals, block] += sign * eye[plus]
    only_a = marked([w for w in words if STRINGS[w].strip()[0] == "A"])
    rare = VOCABULARY.words[1::2]
    return {
        "previous token": (offset(1), everything, nowhere),
        "token two before": (offset(2), everything, nowhere),
        "current token": (form(PLACE, PLACE, torch.eye(N_POS)), everything, nowhere),
        "first token": (rest, torch.ones(N), nowhere),
        "duplicate token": (duplicate, everything, nowhere),
        "induction": (induction, everything, nowhere),
        "induction with gap": (gapped, everything, nowhere),
        "name mover": (to(ids(*NAMES)), eye[mary], eye[mary]),
        "copy suppression": (to(ids(*NAMES)), eye[mary], -eye[mary]),
        "successor": (recent_day, eye[monday], eye[tuesday]),
        "subtoken induction": (form(TOKEN, TOKEN, prefixes), everything, nowhere),
        "first letter": (form(TOKEN, BEFORE, initials), only_a, eye[VOCABULARY.id_of("A")]),
        "delimiter": (to(ids(".", ",")), everything, nowhere),
        "topic anchor": (to(rare), everything, nowhere),
        "first operand": (first_sum, everything, nowhere),
        "second operand": (second_sum, everything, nowhere),
    }


def lorsa(n_random=8):
    """One circuit and head for each behaviour, then random ones."""
    planted = forms()
    n_heads = len(planted) + n_random
    made = Lorsa(
        LorsaConfig(
            d_model=D_MODEL, n_qk_heads=n_heads, d_qk_head=D_MODEL, n_ov_heads=n_heads,
            attn_scale=1.0, layer=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for head, (matrix, reads, writes) in enumerate(planted.values()):
            made.W_Q[head] = SHARP * matrix
            made.W_K[head] = torch.eye(D_MODEL)
            made.W_V[head] = torch.nn.functional.pad(reads, (0, D_MODEL - N))
            made.W_O[head] = torch.nn.functional.pad(writes, (0, D_MODEL - N))
            made.W_O[head, -1] += 1.0  # written, but not to the logits
    return made
