"""How far two tensors are apart, and how two changes of one tensor agree."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over the elements of two tensors x and y; the sums of ranges add up.

    Attributes:
        xx, yy, xy: inner products, float64.
        num_elements: all elements.
        num_conflicts: elements where both are nonzero and their signs differ.
        num_both: elements where both are nonzero.
    """

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    num_elements: int = 0
    num_conflicts: int = 0
    num_both: int = 0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
            self.num_elements + other.num_elements,
            self.num_conflicts + other.num_conflicts,
            self.num_both + other.num_both,
        )

    @property
    def cosine(self) -> float:
        """`<x, y> / (|x| |y|)` in [-1, 1]; 0 where one of them is zero."""
        if self.xx == 0 or self.yy == 0:
            return 0.0
        return max(-1.0, min(1.0, self.xy / (math.sqrt(self.xx) * math.sqrt(self.yy))))

    @property
    def distance(self) -> float:
        """`|x - y|`, from the inner products; exactly 0 for equal tensors."""
        return math.sqrt(max(0.0, self.xx + self.yy - 2 * self.xy))

    @property
    def conflict(self) -> float:
        """Of the elements where both are nonzero, the fraction with opposite signs."""
        return self.num_conflicts / self.num_both if self.num_both else 0.0


def compare(x: Tensor, y: Tensor) -> Comparison:
    """Compare two flat ranges of the same length, of any dtypes, in float64."""
    x, y = x.to(torch.float64), y.to(torch.float64)
    signs = torch.sign(x) * torch.sign(y)
    return Comparison(
        xx=float(torch.dot(x, x)),
        yy=float(torch.dot(y, y)),
        xy=float(torch.dot(x, y)),
        num_elements=x.numel(),
        num_conflicts=int((signs < 0).sum()),
        num_both=int((signs != 0).sum()),
    )
