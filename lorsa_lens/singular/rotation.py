"""Rotary positions as a linear map for each position: `rot_t(x) = x cos_t + turned(x) sin_t`."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.config import AttentionSpec
from lorsa_lens.functional.rotary import plain_frequencies, rotary_angles


@dataclass(frozen=True)
class Rotation:
    """Rotations of queries and keys at the positions of one prompt, 1 where nothing is rotated."""

    cos: Float[Tensor, "*pos dim"]
    sin: Float[Tensor, "*pos dim"]
    n_rotated: int
    adjacent_pairs: bool

    def at(self, positions: Tensor | slice | int) -> "Rotation":
        """The rotations at some positions; one position gives a rotation that broadcasts."""
        return Rotation(
            self.cos[positions], self.sin[positions], self.n_rotated, self.adjacent_pairs
        )

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Rotate the last dimension; leading dimensions broadcast against the positions."""
        return x * self.cos + self.turned(x) * self.sin

    def turned(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """A quarter turn of every rotated pair, 0 elsewhere."""
        pairs = "(pair two)" if self.adjacent_pairs else "(two pair)"
        first, second = rearrange(x[..., : self.n_rotated], f"... {pairs} -> two ... pair", two=2)
        turned = rearrange(torch.stack((-second, first)), f"two ... pair -> ... {pairs}")
        return torch.cat((turned, torch.zeros_like(x[..., self.n_rotated :])), dim=-1)

    def transposed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The transposed map, so that `q . rot(k)` is `transposed(q) . k`."""
        return x * self.cos - self.turned(x) * self.sin


def rotation_of(spec: AttentionSpec, d_head: int, positions: Int[Tensor, " pos"]) -> Rotation:
    """The rotations that a spec prescribes, in float64 of the spec's own precision of angles."""
    rotated = 0
    if spec.positional_embedding_type == "rotary":
        rotated = d_head if spec.rotary_dim is None else spec.rotary_dim
    shape = (len(positions), d_head)
    cos = torch.ones(shape, dtype=torch.float64, device=positions.device)
    sin = torch.zeros(shape, dtype=torch.float64, device=positions.device)
    if rotated:
        frequencies = spec.rotary_frequencies or plain_frequencies(rotated, spec.rotary_base)
        dtype = getattr(torch, spec.rotary_dtype)
        pair_cos, pair_sin = rotary_angles(
            positions[None], frequencies, scale=spec.rotary_scale, dtype=dtype
        )
        layout = "(pair two)" if spec.rotary_adjacent_pairs else "(two pair)"
        cos[:, :rotated] = repeat(pair_cos[0], f"pos pair -> pos {layout}", two=2)
        sin[:, :rotated] = repeat(pair_sin[0], f"pos pair -> pos {layout}", two=2)
    return Rotation(cos, sin, rotated, spec.rotary_adjacent_pairs)
