"""What a rounding keeps of a change: the delta that was computed against the one that is written.

For weights `W` (float32) that are written as `R(W)` in a smaller dtype, beside the base `W_0` they
were made from,

    e = W - W_0        w = R(W) - W_0

With a base of the same dtype, a change below half the spacing of the numbers there is lost, and one
above it becomes a whole spacing. So `|w| / |e|` alone can be near 1, or above, where little of the
change is left; the cosine of e and w tells the two apart.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from operators.kernels import CHUNK
from operators.kernels.merging import MergingKernels

LANES = 16  # of the partial sums
# Dtypes that the compiled pass writes, and dtypes of origins that it reads.
_WRITTEN, _READ = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)


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
        return Rounding(
            self.exact + other.exact,
            self.written + other.written,
            self.inner + other.inner,
            self.num_exact + other.num_exact,
            self.num_written + other.num_written,
        )

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


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Values in a dtype.

    Attributes:
        values: as `Tensor.to` gives them, (n,).
        is_finite: whether none of them is NaN or Inf.
        kept: what they keep of the change from an origin; all 0 without one.
    """

    values: Tensor
    is_finite: bool
    kept: Rounding


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


def is_finite(values: Tensor, kernels: MergingKernels | None = None) -> bool:
    """Whether no element is NaN or Inf; minimum and maximum of NaN are NaN."""
    if values.numel() == 0:
        return True
    if kernels is not None and kernels.knows(values):
        return kernels.all_finite(values)
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def round_to(
    dtype: torch.dtype,
    exact: Tensor,
    origin: Tensor | None = None,
    kernels: MergingKernels | None = None,
) -> Rounded:
    """Round a range to a dtype. The sums depend neither on threads nor on `kernels`.

    Args:
        exact: the computed values, (n,) float32.
        origin: what the change is measured from, in any floating dtype.
        kernels: compiled passes; None: eager, with the same bits.
    """
    exact = exact.detach().cpu()
    if origin is not None:
        origin = origin.cpu() if origin.dtype in _READ else origin.to("cpu", torch.float32)
    if kernels is None or not _fits(kernels, dtype, exact, origin):
        written = exact.to(dtype)
        kept = Rounding() if origin is None else _eager_sums(exact, written, origin)
        return Rounded(written, is_finite(written, kernels), kept)
    written, finite, sums, counts = kernels.rounded(exact, dtype, origin)
    # The compiled pass does not write NaN and Inf as torch does.
    values = written if finite else exact.to(dtype)
    return Rounded(values, finite, Rounding(*sums.tolist(), *counts.tolist()))


def _fits(
    kernels: MergingKernels, dtype: torch.dtype, exact: Tensor, origin: Tensor | None
) -> bool:
    """Whether the compiled pass can round this."""
    reads = origin is None or kernels.fit(origin, dtype=origin.dtype)
    return dtype in _WRITTEN and kernels.fit(exact) and reads


def _eager_sums(exact: Tensor, written: Tensor, origin: Tensor) -> Rounding:
    """The sums; each lane adds every `LANES`-th element, in order."""
    lanes, counts = np.zeros((3, LANES)), [0, 0]
    for first in range(0, exact.numel(), CHUNK):
        part = slice(first, first + CHUNK)
        base = origin[part].float()
        e, w = exact[part] - base, written[part].float() - base
        counts = [counts[0] + int(e.count_nonzero()), counts[1] + int(w.count_nonzero())]
        padding = (0, -len(e) % LANES)
        x, y = (torch.nn.functional.pad(d, padding).double().numpy() for d in (e, w))
        for lane, products in zip(lanes, (x * x, y * y, x * y), strict=True):
            rows = products.reshape(-1, LANES)
            rows[0] += lane
            np.add.reduce(rows, axis=0, out=lane)  # row after row
    sums = np.add.accumulate(lanes, axis=1)[:, -1]  # lane after lane
    return Rounding(*sums.tolist(), *counts)
