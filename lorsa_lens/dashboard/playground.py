"""A prompt of one's own: the heads at work on it, and what the model says when some are changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.dashboard.gallery import Prompt, read_prompts
from lorsa_lens.functional.code import to_dense
from lorsa_lens.interventions import Hook, scale_heads, set_heads, steer_heads
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.splicing import run_with_hooks_with_lorsas

MAX_CHARS = 4000
"""Characters of a prompt."""

MAX_TOKENS = 256
"""Tokens of a prompt."""

MAX_EDITS = 16
"""Changes at once."""

MAX_VALUE = 1e6
"""Of a change, either way."""

_HOOKS = {"scale": scale_heads, "set": set_heads, "add": steer_heads}


@dataclass(frozen=True)
class Edit:
    """A change of one head's activation.

    Attributes:
        layer: Which layer.
        head: Which head of it.
        kind: `scale` multiplies the activation by the value, `set` puts the value in its place,
            `add` adds the value.
        value: A finite number.
        position: Where; None: at every token of the prompt.

    Raises:
        ValueError: If the kind is another, or the value is not finite.
    """

    layer: int
    head: int
    kind: str
    value: float
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _HOOKS:
            raise ValueError(f"kind must be one of {', '.join(_HOOKS)}, got {self.kind!r:.40}")
        if not abs(self.value) <= MAX_VALUE:
            raise ValueError(f"value must lie within ±{MAX_VALUE:g}, got {self.value}")

    def hook(self) -> Hook:
        """The hook for `hook_acts_post` of the layer's Lorsa."""
        positions = None if self.position is None else [self.position]
        return _HOOKS[self.kind]([self.head], self.value, positions)


class Prediction(NamedTuple):
    """One token as the next, before and after the changes."""

    token: str
    logit_before: float
    logit_after: float
    probability_before: float
    probability_after: float


class Fetch(NamedTuple):
    """A head at a token at which it stays: its activation, and what each token contributes."""

    query: int
    z: float
    z_pattern: list[float]


class Playground:
    """A model and its Lorsas, ready for prompts. Prompts are plain text of any content.

    With no changes, predictions are the model's own. Changed layers have their Lorsas in place,
    with the error term, so that predictions differ by what was changed and by nothing else.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: by layer.

    Raises:
        ValueError: if the model has no tokenizer, or there are no Lorsas.
    """

    def __init__(self, model: nn.Module, lorsas: Mapping[int, Lorsa]) -> None:
        if not lorsas:
            raise ValueError("lorsas is empty: give at least one")
        self.model, self.lorsas = cast(Any, model), dict(sorted(lorsas.items()))
        self.strings = Vocabulary.of(model)
        self.max_tokens = min(MAX_TOKENS, int(self.model.cfg.n_ctx))
        self._last: tuple[str, Tensor] | None = None

    def tokens(self, prompt: str) -> Int[Tensor, "1 pos"]:
        """The tokens of a prompt, with a BOS token where the model wants one.

        Raises:
            ValueError: if the prompt is empty, too long, or no text.
        """
        if not prompt or len(prompt) > MAX_CHARS:
            raise ValueError(f"the prompt must have 1 to {MAX_CHARS} characters, not {len(prompt)}")
        if any(0xD800 <= ord(char) < 0xE000 for char in prompt):
            raise ValueError("the prompt holds half of a surrogate pair, which is no character")
        tokens: Tensor = self.model.to_tokens(prompt, truncate=False)
        if not 1 <= tokens.shape[1] <= self.max_tokens:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens: give 1 to {self.max_tokens} of them"
            )
        return tokens

    def read(self, prompt: str, n_heads: int = 5) -> Prompt:
        """The prompt's tokens, and the heads that write most at each."""
        tokens = self.tokens(prompt)
        (found,) = read_prompts(
            self.model, self.lorsas, tokens, vocabulary=self.strings, n_heads=n_heads
        )
        return found

    @torch.no_grad()
    def z_pattern(self, prompt: str, layer: int, head: int) -> list[Fetch]:
        """Where a head stays on a prompt, and from which tokens it fetches there.

        Raises:
            ValueError: if there is no such head, or the prompt cannot be read.
        """
        self._check_head(layer, head)
        tokens, lorsa = self.tokens(prompt), self.lorsas[layer]
        record = record_attention(self.model, tokens, [layer])[layer].seen_by(lorsa)
        code = lorsa.encode(record.x, **record.context)
        acts = to_dense(code, lorsa.cfg.n_ov_heads)[0, :, head]
        moved = lorsa.z_pattern(record.x, [head], **record.context)[0, 0]
        return [
            Fetch(query, acts[query].item(), moved[query].tolist())
            for query in torch.nonzero(acts)[:, 0].tolist()
        ]

    def steer(
        self, prompt: str, edits: Sequence[Edit], position: int = -1, n_tokens: int = 10
    ) -> list[Prediction]:
        """What comes after a token of the prompt, before and after some changes.

        Args:
            prompt: any text.
            edits: changes, all made in one pass.
            position: after which token; negative ones count from the end.
            n_tokens: the likeliest tokens before, and as many after.

        Returns:
            The tokens, the likeliest after the changes first.

        Raises:
            ValueError: if there is no such head or position, there are too many changes, or the
                prompt cannot be read.
        """
        tokens = self.tokens(prompt)
        n_pos = tokens.shape[1]
        if len(edits) > MAX_EDITS:
            raise ValueError(f"there are {len(edits)} changes: give at most {MAX_EDITS}")
        for edit in edits:
            self._check_head(edit.layer, edit.head)
        for given in (position, *(edit.position for edit in edits)):
            if given is not None and not -n_pos <= given < n_pos:
                raise ValueError(f"position = {given}, the prompt has tokens 0 to {n_pos - 1}")
        if self._last is None or self._last[0] != prompt:
            self._last = (prompt, self._logits(tokens, []))
        before = self._last[1][position]
        after = self._logits(tokens, edits)[position] if edits else before
        return self._predictions(before, after, n_tokens)

    @torch.no_grad()
    def _logits(
        self, tokens: Int[Tensor, "1 pos"], edits: Sequence[Edit]
    ) -> Float[Tensor, "pos vocab"]:
        changed = {edit.layer: self.lorsas[edit.layer] for edit in edits}
        hooks = [(f"blocks.{edit.layer}.attn.lorsa.hook_acts_post", edit.hook()) for edit in edits]
        logits: Tensor = run_with_hooks_with_lorsas(
            self.model, tokens, lorsas=changed.values(), error_term=True, fwd_hooks=hooks
        )
        return logits[0].float().cpu()

    def _predictions(self, before: Tensor, after: Tensor, n_tokens: int) -> list[Prediction]:
        n_tokens = min(n_tokens, len(before))
        shown = {*before.topk(n_tokens).indices.tolist(), *after.topk(n_tokens).indices.tolist()}
        order = sorted(shown, key=lambda token: (-after[token].item(), token))
        p_before, p_after = before.softmax(-1), after.softmax(-1)
        columns = (before, after, p_before, p_after)
        return [
            Prediction(self.strings.strings[token], *(column[token].item() for column in columns))
            for token in order
        ]

    def _check_head(self, layer: int, head: int) -> None:
        if layer not in self.lorsas:
            raise ValueError(f"there is no Lorsa for layer {layer}: there are {list(self.lorsas)}")
        n_heads = self.lorsas[layer].cfg.n_ov_heads
        if not 0 <= head < n_heads:
            raise ValueError(f"layer {layer} has heads 0 to {n_heads - 1}, not {head}")
