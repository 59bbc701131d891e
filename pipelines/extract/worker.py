"""One tensor of an extraction: its delta, and the factors of the delta for a linear layer."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from operators.low_rank import Fit, fit_of, low_rank_factors
from operators.rounding import is_finite
from pipelines.checkpoints import Source
from pipelines.checkpoints.digests import BlockDigests
from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.extract.plan import STEP_ELEMENTS, ExtractPlan, Item

FACTORS = ".factors"  # finished factors, one file for each matrix
Observer = Callable[[Source, str, int, Tensor], None]


def factors_file(folder: Path, number: int) -> Path:
    """The file with the factors of an item, until all are done."""
    return folder / FACTORS / f"{number:05}.safetensors"


@dataclass(frozen=True, slots=True)
class ExtractWorker:
    """Does items of a plan in a folder, one after another."""

    plan: ExtractPlan
    folder: Path

    def run(self, number: int) -> dict[str, Any]:
        """Do one item; it may be done twice.

        Returns:
            its number, the rank of its factors (0 if there are none), the sums of its `Fit`, and
            digests of what was read: [checkpoint, tensor, first element, digest].

        Raises:
            InputError: NaN or Inf in an input, or factors that their dtype cannot hold.
        """
        item = self.plan.items[number]
        seen: dict[tuple[str, str], BlockDigests] = {}

        def observe(source: Source, name: str, start: int, values: Tensor) -> None:
            stored = source.stored(name)
            if stored is not None:
                checkpoint, tensor = stored
                key = str(checkpoint.path), tensor.name
                seen.setdefault(key, BlockDigests(tensor.num_elements)).update(start, values)

        rank, fit = (
            self._factored(number, item, observe)
            if item.role == "factors"
            else (0, self._streamed(item, observe))
        )
        digests = [
            [path, name, start, digest]
            for (path, name), found in seen.items()
            for start, digest in found.finished().items()
        ]
        return {"item": number, "rank": rank, "fit": asdict(fit), "digests": digests}

    def _streamed(self, item: Item, observe: Observer) -> Fit:
        """The delta of a tensor that is saved whole or left out."""
        squares = 0.0
        for _, part in self._delta(item, observe):
            squares += float(torch.sum(part * part))
        if item.role == "whole":
            return Fit(squares, squares, squares, 0.0)
        return Fit(squares, 0.0, 0.0, squares)

    def _factored(self, number: int, item: Item, observe: Observer) -> tuple[int, Fit]:
        """Write the factors of a linear layer's delta, rounded to their dtype."""
        flat = torch.empty(torch.Size(item.shape).numel(), dtype=torch.float64)
        for start, part in self._delta(item, observe):
            flat[start : start + part.numel()] = part
        delta = flat.view(item.shape)
        if item.transposed:
            delta = delta.T
        config = self.plan.config
        factors = low_rank_factors(delta, config.rank, config.energy)
        if factors is None:
            return 0, Fit()
        b, a = (part.to(self.plan.dtype).contiguous() for part in (factors.b, factors.a))
        if not (is_finite(b) and is_finite(a)):
            raise InputError(
                f"{item.name}: a factor does not fit into {self.plan.dtype}; allowed: --dtype "
                "float32 or bfloat16"
            )
        write_atomically(factors_file(self.folder, number), save({"a": a, "b": b}))
        return factors.rank, fit_of(delta, b, a)

    def _delta(self, item: Item, observe: Observer) -> Iterator[tuple[int, Tensor]]:
        """Flat ranges of `tuned - base`, float64, each with the index of its first element."""
        count = torch.Size(item.shape).numel()
        for start in range(0, count, STEP_ELEMENTS):
            stop = min(start + STEP_ELEMENTS, count)
            ranges = []
            for source, name in ((self.plan.tuned, item.tuned), (self.plan.base, item.base)):
                values = source.read(name, start, stop)
                observe(source, name, start, values)
                if values.dtype.is_floating_point and not is_finite(values):
                    spec = source.find(name)
                    assert spec is not None
                    raise InputError(
                        f"{spec.file}: {name}: holds NaN or Inf; allowed: finite numbers"
                    )
                ranges.append(values.double())
            yield start, ranges[0] - ranges[1]
