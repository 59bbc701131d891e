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
from pipelines.extract.plan import SAVED, STEP_ELEMENTS, ExtractPlan, Item

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
        if item.role in SAVED:
            return Fit(squares, squares, squares, 0.0)
        return Fit(squares, 0.0, 0.0, squares)

    def _factored(self, number: int, item: Item, observe: Observer) -> tuple[int, Fit]:
        """Write the factors of a delta, rounded to their dtype: of a matrix, or of each expert's
        one in PEFT's layout, A (experts * r, in) and B (out, r * experts).
        """
        experts = item.shape[0] if len(item.shape) == 3 else 1
        pairs, fit = [], Fit()
        for expert in range(experts):
            delta = self._matrix(item, expert, observe)
            b, a = self._factors_of(item, delta)
            pairs.append((b, a))
            fit += fit_of(delta, b, a)
        rank = max(a.shape[0] for _, a in pairs)
        if rank == 0:
            return 0, fit
        whole_a = pairs[0][1].new_zeros(experts, rank, pairs[0][1].shape[1])
        whole_b = pairs[0][0].new_zeros(pairs[0][0].shape[0], rank, experts)
        for expert, (b, a) in enumerate(pairs):
            whole_a[expert, : len(a)] = a
            whole_b[:, : len(a), expert] = b
        factors = {"a": whole_a.flatten(0, 1), "b": whole_b.flatten(1)}
        write_atomically(factors_file(self.folder, number), save(factors))
        return rank, fit

    def _matrix(self, item: Item, expert: int, observe: Observer) -> Tensor:
        """The delta of a matrix, or of an expert's one: (out, in) float64."""
        shape = torch.Size(item.shape[-2:])
        first = expert * shape.numel()
        flat = torch.empty(shape.numel(), dtype=torch.float64)
        for start, part in self._delta(item, observe, first, first + shape.numel()):
            flat[start - first : start - first + part.numel()] = part
        delta = flat.view(shape)
        return delta.T if item.transposed else delta

    def _factors_of(self, item: Item, delta: Tensor) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) of a delta, with r = 0 for one of zeros."""
        config, dtype = self.plan.config, self.plan.dtype
        factors = low_rank_factors(delta, config.rank, config.energy)
        if factors is None:
            return delta.new_empty(len(delta), 0, dtype=dtype), delta.new_empty(
                0, delta.shape[1], dtype=dtype
            )
        b, a = (part.to(dtype).contiguous() for part in (factors.b, factors.a))
        if not (is_finite(b) and is_finite(a)):
            raise InputError(
                f"{item.name}: a factor does not fit into {dtype}; allowed: --dtype float32 or "
                "bfloat16"
            )
        return b, a

    def _delta(
        self, item: Item, observe: Observer, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Flat ranges of `tuned - base` in [first, last), float64, each with the index of its first
        element.
        """
        last = torch.Size(item.shape).numel() if last is None else last
        for start in range(first, last, STEP_ELEMENTS):
            stop = min(start + STEP_ELEMENTS, last)
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
