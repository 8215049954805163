"""Bases of a head's query-key form: singular vectors, a random rotation of them, or none.

With `Omega = W_Q W_K^T = sum_k u_k s_k v_k^T`, the maps `G_Q = pinv(W_Q) U diag(s)` and
`G_K = V^T pinv(W_K)^T` act on queries and keys, so that `q k^T = sum_k (q G_Q)_k (G_K k)_k` for any
query and key, biased and rotated ones too. (ACC++, arXiv 2602.13483, written in head space.)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Basis = Literal["singular", "rotated", "identity"]
"""The singular vectors, a random rotation of them, or the head's own dimensions."""

RECONSTRUCTION_TOLERANCE = 1e-4
"""Largest error of `U S V^T`, relative to the largest entry, before another driver is tried."""

Svd = tuple[Tensor, Tensor, Tensor]


class HeadBasis(NamedTuple):
    """Vectors `u_k`, `v_k` in the head's input space, and the maps of queries and keys to them."""

    U: Float[Tensor, "d_in k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "d_in k"]
    G_Q: Float[Tensor, "d_head k"]
    G_K: Float[Tensor, "k d_head"]

    @property
    def residual(self) -> float:
        """Largest entry of `G_Q G_K - 1`: 0 unless `W_Q` or `W_K` lacks full column rank."""
        identity = torch.eye(len(self.G_Q), dtype=self.G_Q.dtype, device=self.G_Q.device)
        return float((self.G_Q @ self.G_K - identity).abs().max())


def head_basis(
    W_Q: Float[Tensor, "d_in d_head"],
    W_K: Float[Tensor, "d_in d_head"],
    *,
    basis: Basis = "singular",
    seed: int = 0,
) -> HeadBasis:
    """The basis of one head.

    Args:
        W_Q: the head's query matrix.
        W_K: its key matrix.
        basis: `singular` vectors of `W_Q W_K^T`, largest first; `rotated`: these rotated by one
            random orthogonal matrix (the null against which sparsity is read); `identity`: the
            head's own dimensions, where `U` and `V` are `W_Q` and `W_K` themselves.
        seed: of the rotation.

    Raises:
        ValueError: if there is no such basis.
        ArithmeticError: if no driver of the SVD reproduces `W_Q W_K^T`.
    """
    if basis not in get_args(Basis):
        raise ValueError(f"basis = {basis!r} must be one of {get_args(Basis)}")
    d_head = W_Q.shape[-1]
    if basis == "identity":
        identity = torch.eye(d_head, dtype=W_Q.dtype, device=W_Q.device)
        return HeadBasis(W_Q, torch.ones_like(W_Q[0]), W_K, identity, identity)
    q_Q, r_Q = torch.linalg.qr(W_Q)
    q_K, r_K = torch.linalg.qr(W_K)
    left, S, right = checked_svd(r_Q @ r_K.mT)
    U, V = (q_Q @ left)[:, :d_head], (q_K @ right.mT)[:, :d_head]
    S = S[:d_head]
    G_Q = torch.linalg.pinv(W_Q) @ (U * S)
    G_K = V.mT @ torch.linalg.pinv(W_K).mT
    if basis == "rotated":
        Q = haar(len(S), seed).to(W_Q)
        U, V, G_Q, G_K = U @ Q, V @ Q, G_Q @ Q, Q.mT @ G_K
    return HeadBasis(U, S, V, G_Q, G_K)


def haar(n: int, seed: int) -> Float[Tensor, "n n"]:
    """A random orthogonal matrix, uniform over all (Mezzadri, arXiv math-ph/0609050)."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signed: Tensor = Q * R.diagonal().sign()
    return signed


def checked_svd(matrix: Float[Tensor, "m n"]) -> Svd:
    """`torch.linalg.svd` (thin), by another driver where it does not reproduce the matrix.

    LAPACK's divide and conquer was seen to fail without notice on heads of real models.

    Raises:
        ArithmeticError: if no driver does.
    """
    limit = RECONSTRUCTION_TOLERANCE * matrix.abs().max()
    for driver in SVD_DRIVERS:
        try:
            U, S, Vh = driver(matrix)
        except (np.linalg.LinAlgError, RuntimeError):
            continue
        if bool(((U * S) @ Vh - matrix).abs().max() <= limit):
            return U, S, Vh
    raise ArithmeticError(
        f"no singular value decomposition of a {tuple(matrix.shape)} matrix reproduces it: are "
        "all its entries finite?"
    )


def _torch_svd(matrix: Tensor) -> Svd:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh


def _transposed_svd(matrix: Tensor) -> Svd:
    V, S, Uh = torch.linalg.svd(matrix.mT.contiguous(), full_matrices=False)
    return Uh.mT, S, V.mT


def _numpy_svd(matrix: Tensor) -> Svd:
    factors = np.linalg.svd(matrix.detach().cpu().numpy(), full_matrices=False)
    U, S, Vh = (torch.as_tensor(factor).to(matrix) for factor in factors)
    return U, S, Vh


SVD_DRIVERS: list[Callable[[Tensor], Svd]] = [_torch_svd, _numpy_svd, _transposed_svd]
"""Drivers of the SVD, in the order in which they are tried."""


def low_rank_svd(left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> Svd:
    """`left @ right^T = U diag(S) V^T` by way of small factors."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    U, S, Vh = checked_svd(r_left @ r_right.mT)
    return q_left @ U, S, q_right @ Vh.mT
