"""What a rounding keeps of a change: the delta that was computed against the one that is written.

For weights `W` (float32) that are written as `R(W)` in a smaller dtype, beside the base `W_0` they
were made from,

    e = W - W_0        w = R(W) - W_0

With a base of the same dtype, a change below half the spacing of the numbers there is lost, and one
above it becomes a whole spacing. So `|w| / |e|` alone can be near 1, or above, where little of the
change is left; the cosine of e and w tells the two apart.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.kernels import CHUNK
from operators.kernels.merging import MergingKernels

LANES = 64  # of the partial sums
_KNOWN = (torch.float32, torch.bfloat16)  # dtypes that the compiled pass reads


@dataclass(frozen=True, slots=True)
class Rounding:
    """Sums over the elements of e and w; the sums of ranges add up.

    Attributes:
        exact, written, inner: `<e, e>`, `<w, w>` and `<e, w>`, float64.
        num_exact, num_written: elements where e is not 0, and where w is not 0.
    """

    exact: float = 0.0
    written: float = 0.0
    inner: float = 0.0
    num_exact: int = 0
    num_written: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def norm(self) -> float:
        """`|w| / |e|`; 1 where nothing changed."""
        if self.exact == 0:
            return 1.0
        return math.sqrt(self.written) / math.sqrt(self.exact)

    @property
    def cosine(self) -> float:
        """`<e, w> / (|e| |w|)` in [-1, 1]; 0 where nothing is left, 1 where nothing changed."""
        if self.exact == 0:
            return 1.0
        if self.written == 0:
            return 0.0
        cosine = self.inner / (math.sqrt(self.exact) * math.sqrt(self.written))
        return max(-1.0, min(1.0, cosine))

    @property
    def kept(self) -> float:
        """How near w is to e in [0, 1]: the smallest of `|w| / |e|`, `|e| / |w|` and the cosine. So
        neither a norm that rounding has made larger nor a right direction alone counts as kept.
        """
        if self.exact > 0 and self.written == 0:
            return 0.0
        return max(0.0, min(self.norm, 1 / self.norm, self.cosine))


def loses(dtype: torch.dtype) -> bool:
    """Whether float32 values may lose bits in a dtype."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def squared_spacings(values: Tensor) -> float:
    """The sum of the squared distances between neighbours in the values' dtype, at each value."""
    kind = torch.finfo(values.dtype)
    exponents = torch.frexp(values.double().abs().clamp_min(kind.smallest_normal)).exponent - 1
    return float((kind.eps * torch.exp2(exponents.double())).square().sum())


def expected_cosine(delta: float, spacings: float) -> float:
    """The cosine of a change with itself before rounding, if each rounding error is uniform within
    half a spacing: `sqrt(1 - (sum s^2 / 12) / |w|^2)`; 0 where they may make all of w.

    Args:
        delta: `|w|^2`; spacings: the sum of s^2.
    """
    return math.sqrt(max(0.0, 1 - spacings / 12 / delta)) if delta else 1.0


def rounding_of(
    exact: Tensor, written: Tensor, origin: Tensor, kernels: MergingKernels | None = None
) -> Rounding:
    """The sums of a range; they depend neither on threads nor on `kernels`.

    Args:
        exact: the computed values, (n,) float32.
        written: the same in the written dtype.
        origin: the base's values, in any floating dtype.
        kernels: compiled passes; None: eager, with the same bits.
    """
    exact = exact.detach().cpu()
    written, origin = (
        x if x.dtype in _KNOWN else x.to(torch.float32) for x in (written.cpu(), origin.cpu())
    )
    others = (written, origin)
    fits = kernels is not None and all(kernels.fit(x, dtype=x.dtype) for x in (exact, *others))
    if fits and kernels is not None:
        sums, counts = kernels.rounding_sums(exact, written, origin)
    else:
        sums, counts = _eager_sums(exact, written, origin)
    return Rounding(*sums.tolist(), *counts.tolist())


def _eager_sums(
    exact: Tensor, written: Tensor, origin: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sums (3,) and the counts (2,); each lane adds every `LANES`-th element, in order."""
    lanes, counts = np.zeros((3, LANES)), np.zeros(2, dtype=np.int64)
    for first in range(0, exact.numel(), CHUNK):
        part = slice(first, first + CHUNK)
        base = origin[part].float()
        e, w = exact[part] - base, written[part].float() - base
        counts += [int(e.count_nonzero()), int(w.count_nonzero())]
        padding = -len(e) % LANES
        x, y = (np.pad(d.numpy().astype(np.float64), (0, padding)) for d in (e, w))
        for lane, products in zip(lanes, (x * x, y * y, x * y), strict=True):
            rows = np.vstack([lane, products.reshape(-1, LANES)])
            lane[:] = np.add.reduce(rows, axis=0)  # row after row
    sums = np.zeros(3)
    for lane in lanes.T:
        sums += lane
    return sums, counts
