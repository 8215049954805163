"""What a graph explains: logits of tokens, differences of them, any direction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.stages import Change, Reading, Stage, Writers
from lorsa_lens.singular.stream import Stream


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What to explain; made by `top_probability`, `logit`, `difference` or `direction`.

    Logits are those before a cap (Gemma 2): a cap keeps their order. They are centred, each minus
    the mean of all, since only that matters to probabilities.
    """

    kind: Literal["top_probability", "logit", "difference", "direction"]
    pos: int = -1
    """At which token."""
    mass: float = 0.95
    max_n_logits: int = 10
    token_ids: tuple[int, ...] = ()
    vector: Float[Tensor, " d_model"] | None = field(default=None, repr=False)
    label: str = ""

    @classmethod
    def top_probability(
        cls, mass: float = 0.95, *, max_n_logits: int = 10, pos: int = -1
    ) -> "Target":
        """The most probable next tokens, each weighted by its probability.

        Args:
            mass: as many as have this much probability together.
            max_n_logits: but not more.
            pos: at which token.

        Raises:
            ValueError: if `mass` is not in (0, 1], or `max_n_logits` is not positive.
        """
        if not 0 < mass <= 1:
            raise ValueError(f"mass = {mass}: a share of probability, above 0 and at most 1")
        if max_n_logits < 1:
            raise ValueError(f"max_n_logits = {max_n_logits} must be positive")
        return cls(kind="top_probability", mass=mass, max_n_logits=max_n_logits, pos=pos)

    @classmethod
    def logit(cls, token: int, *, pos: int = -1) -> "Target":
        """The logit of a token."""
        return cls(kind="logit", token_ids=(token,), pos=pos)

    @classmethod
    def difference(cls, token: int, other: int, *, pos: int = -1) -> "Target":
        """The logit of a token minus that of another."""
        return cls(kind="difference", token_ids=(token, other), pos=pos)

    @classmethod
    def direction(
        cls, vector: Float[Tensor, " d_model"], *, label: str = "direction", pos: int = -1
    ) -> "Target":
        """A direction in the output of the final norm, where the unembedding reads."""
        return cls(kind="direction", vector=vector, label=label, pos=pos)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a graph's `meta`."""
        values: dict[str, Any] = {"kind": self.kind, "pos": self.pos}
        if self.kind == "top_probability":
            values |= {"mass": self.mass, "max_n_logits": self.max_n_logits}
        elif self.kind == "direction":
            values["label"] = self.label
        else:
            values["token_ids"] = list(self.token_ids)
        return values


class Output(Stage):
    """The end of the model: what targets read of the stream. It writes nothing."""

    nodes: tuple[Node, ...]
    weights: Float[Tensor, " target"]
    """How much each counts."""
    probabilities: dict[Node, float]
    labels: dict[Node, str]

    def __init__(self, stream: Stream, target: Target, names: Sequence[str] | None = None) -> None:
        pos = _position(stream, target.pos)
        self.stream, self.pos = stream, pos
        self.layer = len(stream.layers)
        self.writers = Writers(
            nodes=(),
            vectors=stream.resid_final.new_zeros(0, stream.resid_final.shape[1]),
            activations=stream.resid_final.new_zeros(0),
            n_pos=stream.n_pos,
        )
        probabilities = stream.logits[pos].softmax(-1)
        ids = self._token_ids(target, probabilities)
        if target.kind in ("top_probability", "logit"):
            self.nodes = tuple(Node("logit", self.layer, pos, one) for one in sorted(ids))
            chosen = [node.index for node in self.nodes]
            self._directions = _centred(stream.W_U)[:, chosen].mT
            self._biases = _centred(stream.b_U)[chosen]
            self.probabilities = {n: float(probabilities[n.index]) for n in self.nodes}
            self.weights = stream.logits.new_ones(len(ids))
            if target.kind == "top_probability":
                self.weights = probabilities[chosen]
            self.labels = {n: names[n.index] for n in self.nodes} if names else {}
            return
        self.nodes = (Node("logit", self.layer, pos, 0),)
        self.weights, self.probabilities = stream.logits.new_ones(1), {}
        self.labels = {self.nodes[0]: target.label}
        if target.kind == "direction":
            self._directions = _direction(target, stream)[None]
            self._biases = stream.b_U.new_zeros(1)
            return
        token, other = ids
        self._directions = (stream.W_U[:, token] - stream.W_U[:, other])[None]
        self._biases = (stream.b_U[token] - stream.b_U[other])[None]
        texts = [names[one] if names else str(one) for one in ids]
        self.labels = {self.nodes[0]: " - ".join(texts)}

    def _token_ids(self, target: Target, probabilities: Float[Tensor, " vocab"]) -> list[int]:
        for token in target.token_ids:
            if not 0 <= token < len(probabilities):
                raise ValueError(
                    f"target token {token}: the model has tokens 0 to {len(probabilities) - 1}"
                )
        if target.kind != "top_probability":
            return list(target.token_ids)
        ordered = probabilities.sort(descending=True)
        n = int((ordered.values.cumsum(0) < target.mass).sum()) + 1
        return [int(token) for token in ordered.indices[: min(n, target.max_n_logits)]]

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        rows = [self.nodes.index(node) for node in nodes]
        directions = self._directions[rows]
        norm = self.stream.final_norm
        at = torch.full((len(rows),), self.pos)
        c = directions.new_zeros(len(rows), self.stream.n_pos, directions.shape[1])
        c[:, self.pos] = norm.pull(directions, at)
        constants = directions @ norm.bias + self._biases[rows]
        final = (norm.share(self.stream.resid_final) + norm.bias)[self.pos]
        return Reading(c, constants, directions @ final + self._biases[rows])

    def value(self, normalized: Float[Tensor, " d_model"]) -> Float[Tensor, " target"]:
        """Every target, given what the final norm returned at their token."""
        return self._directions @ normalized + self._biases

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        return self.writers.activations, torch.zeros_like(change)


def _position(stream: Stream, pos: int) -> int:
    if not -stream.n_pos <= pos < stream.n_pos:
        raise ValueError(f"target pos = {pos}, but the prompt has {stream.n_pos} tokens")
    return pos % stream.n_pos


def _centred(values: Float[Tensor, "*d vocab"]) -> Float[Tensor, "*d vocab"]:
    return values - values.mean(dim=-1, keepdim=True)


def _direction(target: Target, stream: Stream) -> Float[Tensor, " d_model"]:
    d_model = len(stream.W_U)
    if target.vector is None or tuple(target.vector.shape) != (d_model,):
        shape = None if target.vector is None else list(target.vector.shape)
        raise ValueError(f"target direction has shape {shape}: [{d_model}] for this model")
    return target.vector.detach().double()
