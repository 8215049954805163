"""What each node does to the targets when everything follows, to first order."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.replay import Replay


@dataclass(frozen=True, eq=False)
class FirstOrderEffects:
    """The changes that ablating each node would make, were the model linear around the prompt.

    A graph's own predictions hold patterns, norms and MLPs' Jacobians; these let them follow, as
    gradients do. So they foretell live ablations of heads better, but are no sums over edges. A
    whole MLP is no small change. A norm after attention or an MLP keeps its scale for what the
    module itself writes.
    """

    nodes: tuple[Node, ...]
    changes: Float[Tensor, "node target"]
    weights: Float[Tensor, " target"]
    """Of each target in their sum."""

    def of(self, node: Node) -> float:
        """Change of the targets together, if this node is ablated.

        Raises:
            ValueError: if it is not at work on this prompt.
        """
        if node not in self.nodes:
            raise ValueError(f"{node.id} is not at work on this prompt")
        return float(self.changes[self.nodes.index(node)] @ self.weights)

    def top(
        self, n: int, kinds: Iterable[str] = ("head", "attention_head", "feature", "mlp")
    ) -> list[Node]:
        """The nodes without which the targets would fall most, the most needed first.

        Args:
            n: how many, at most: nodes that hold the targets back do not count.
            kinds: of which kinds.
        """
        wanted, together = set(kinds), self.changes @ self.weights
        found = [
            self.nodes[i]
            for i in together.argsort().tolist()
            if together[i] < 0 and self.nodes[i].kind in wanted
        ]
        return found[:n]


def first_order_effects(replay: Replay) -> FirstOrderEffects:
    """One live run of the prompt, and a reverse pass for each target.

    Args:
        replay: the prompt, with its targets.
    """
    stages = replay.replacement.stages
    gradients = replay.live_gradients()
    effects = [
        -stage.writers.effects(gradient) for stage, gradient in zip(stages, gradients, strict=True)
    ]
    return FirstOrderEffects(
        nodes=replay.replacement.nodes,
        changes=torch.cat(effects, dim=1).T,
        weights=replay.output.weights,
    )
