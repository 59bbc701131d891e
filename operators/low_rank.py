"""The best approximation of a matrix by a product of two thin ones: the factors of an adapter.

For `D = U S V'` with singular values `s_1 >= s_2 >= ...` no matrix of rank r is nearer to D in the
Frobenius norm than `D_r = sum_{j<=r} s_j u_j v_j'` (Eckart and Young 1936), and

    ||D - D_r||^2 = sum_{j>r} s_j^2        ||D_r||^2 = ||D||^2 - ||D - D_r||^2

The factors share the values: `B = U_r sqrt(S_r)`, `A = sqrt(S_r) V_r'`, so that `B A = D_r` and
both have the same norm.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.merging.singular import triplets

_BLOCK_ELEMENTS = 1 << 22  # of the product, compared at once
_ROUNDING = 1e-12  # of sums in float64


@dataclass(frozen=True, slots=True)
class Factors:
    """`D ~ B A`: b (m, r) and a (r, n), float64."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[1]


@dataclass(frozen=True, slots=True)
class Fit:
    """How near a product of factors P is to a matrix D; the fits of several matrices add up.

    Attributes:
        delta, product: `||D||^2` and `||P||^2`; inner: `<D, P>`; residual: `||D - P||^2`.
    """

    delta: float = 0.0
    product: float = 0.0
    inner: float = 0.0
    residual: float = 0.0

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(
            self.delta + other.delta,
            self.product + other.product,
            self.inner + other.inner,
            self.residual + other.residual,
        )

    @property
    def kept(self) -> float:
        """`sqrt(1 - ||D - P||^2 / ||D||^2)`, for `P = D_r` the share `||P|| / ||D||` of the norm;
        in [0, 1], 1 where D is zero.
        """
        return math.sqrt(max(0.0, 1.0 - self.residual / self.delta)) if self.delta else 1.0

    @property
    def error(self) -> float:
        """`||D - P|| / ||D||`; 0 where D is zero."""
        return math.sqrt(self.residual / self.delta) if self.delta else 0.0

    @property
    def cosine(self) -> float:
        """`<D, P> / (||D|| ||P||)` in [-1, 1]; 1 where D is zero, else 0 where P is zero."""
        if self.delta == 0:
            return 1.0
        scale = math.sqrt(self.delta) * math.sqrt(self.product)
        return max(-1.0, min(1.0, self.inner / scale)) if scale else 0.0


def low_rank_factors(
    delta: Tensor, most: int | None = None, share: float | None = None
) -> Factors | None:
    """The factors of `D_r`; None for a matrix of zeros.

    The signs of singular vectors are free: here the largest element of each column of U is
    positive. Singular values within float32 rounding of zero are left out, whatever the rank (see
    `operators.merging.singular`).

    Args:
        delta: D (m, n), finite.
        most: the largest rank; None: any.
        share: the smallest rank whose product keeps this share of `||D||^2`; in (0, 1].
    """
    found = triplets(delta, most)
    if len(found.s) == 0:
        return None
    rank = len(found.s)
    if share is not None:
        rank = rank_keeping(found.s, float(delta.double().square().sum()), share)
    u, s, v = found.u[:, :rank], found.s[:rank], found.v[:, :rank]
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    root = s.sqrt()
    turned = root * largest.sign()
    return Factors(u * turned, (v * turned).T)


def rank_keeping(values: Tensor, total: float, share: float) -> int:
    """The smallest r with `sum_{j<=r} s_j^2 >= share * total`; all values if they do not reach it.

    Args:
        values: singular values (k,), k >= 1, the largest first.
        total: `||D||^2`, including singular values that were left out.
        share: in (0, 1].
    """
    below = values.square().cumsum(0) < share * total * (1 - _ROUNDING)
    return min(int(below.sum()) + 1, len(values))


def fit_of(delta: Tensor, b: Tensor, a: Tensor) -> Fit:
    """How near `B A` is to D (m, n), in float64, some rows at a time.

    Args:
        b (m, r), a (r, n): in the dtype that is stored, so that its rounding counts.
    """
    a, result = a.double(), Fit()
    rows = max(1, _BLOCK_ELEMENTS // max(1, delta.shape[1]))
    for first in range(0, delta.shape[0], rows):
        part = delta[first : first + rows].double()
        product = b[first : first + rows].double() @ a
        squares = (part, product, part - product)
        whole, made, left = (float(torch.sum(each * each)) for each in squares)
        result += Fit(whole, made, float(torch.sum(part * product)), left)
    return result
