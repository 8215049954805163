"""Sizes at which everything is compared, and random Lorsas of them."""

from dataclasses import dataclass, replace

import torch

from lorsa_lens import Lorsa, LorsaConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Lorsa and of what it reads."""

    d_model: int
    n_qk_heads: int
    d_qk_head: int
    n_ov_heads: int
    k: int
    pos: int
    batch: int
    rotary_dim: int

    def changed(self, **sizes: int) -> "Shape":
        """The same with other sizes."""
        return replace(self, **sizes)

    def build(self) -> tuple[Lorsa, torch.Tensor]:
        """A random Lorsa and a random input."""
        torch.manual_seed(0)
        cfg = LorsaConfig(
            d_model=self.d_model,
            n_qk_heads=self.n_qk_heads,
            d_qk_head=self.d_qk_head,
            n_ov_heads=self.n_ov_heads,
            k=self.k,
            act_fn="topk_relu",
            positional_embedding_type="rotary",
            rotary_dim=self.rotary_dim,
        )
        return Lorsa(cfg), torch.randn(self.batch, self.pos, self.d_model)


SHAPES = {
    "A": Shape(768, 48, 64, 6144, 64, 256, 4, 16),
    "B": Shape(128, 8, 32, 1024, 16, 128, 16, 32),
    "C": Shape(768, 48, 64, 6144, 64, 2048, 1, 16),
    "D": Shape(128, 256, 32, 256, 16, 128, 16, 32),
    "E": Shape(2048, 16, 128, 16384, 64, 512, 1, 128),
}
"""A: like pythia-160m. B: small. C: a long text. D: a query-key circuit for each head. E: like the
published 8x Lorsas of Qwen 3 1.7B."""
