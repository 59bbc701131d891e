"""Held-out rows during a run: their numbers, the best evaluation, and the stop without a better
one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from operators.losses import kto_reference_point
from pipelines.train.data import PAD, TokenTable, collate, collate_mismatched
from pipelines.train.data.table import SetRows
from pipelines.train.evaluation_config import PREFIX, EvaluationConfig
from pipelines.train.files import METRICS_FILE
from pipelines.train.metrics import add_up, earlier_records
from pipelines.train.micro_losses import MicroLosses, Whole
from pipelines.train.objectives import Shares, shares_of, weighted_sum, weights_of
from pipelines.train.reference import Rows
from pipelines.train.reference_store import small_batches
from pipelines.train.router import real_tokens


@dataclass(frozen=True, slots=True)
class _Turn:
    """A rank's batch."""

    rows: list[int]
    wholes: list[int]  # what it is part of: 0 is all rows, 1 + i the set i of several
    counts: int  # 0 if another rank has the same one


@dataclass(frozen=True, slots=True)
class _Turns:
    """The held-out rows, cut into the same small batches for every run.

    Where they are of several sets, no batch has rows of two.
    """

    sets: list[SetRows]  # none if there is only one
    batches: list[tuple[int, list[int]]]  # the number of its set, and rows

    @classmethod
    def of(cls, table: TokenTable, device: torch.device) -> "_Turns":
        if len(table.sets) < 2:
            return cls([], [(0, rows) for rows in small_batches(table, device)])
        sets = [each for each in table.sets if each.rows]
        batches = [
            (place, rows)
            for place, each in enumerate(sets)
            for rows in small_batches(table, device, range(each.first, each.first + each.rows))
        ]
        return cls(sets, batches)

    def __iter__(self) -> Iterator[_Turn]:
        """This rank's batches. All ranks take equally many, because passes of a sharded model are
        collective: the last batch is repeated, and does not count.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for first in range(0, len(self.batches), world):
            number = first + rank
            place, rows = self.batches[min(number, len(self.batches) - 1)]
            wholes = [0, 1 + place] if self.sets else [0]
            yield _Turn(rows, wholes, int(number < len(self.batches)))


def held_out_batches(table: TokenTable, device: torch.device) -> list[list[int]]:
    """The batches in which held-out rows go through the model."""
    return [rows for _, rows in _Turns.of(table, device).batches]


def measure(losses: MicroLosses, held_out: Rows, device: torch.device) -> dict[str, float]:
    """The objective's loss and metrics on all held-out rows, as if they were one global batch, and
    of several sets also on each, as `eval_loss/NAME`.

    What a batch gives is a share of the whole, so that neither the number of workers nor the
    micro-batch changes a number. All ranks call together.
    """
    table = held_out.table
    turns = _Turns.of(table, device)
    ranges = [range(table.num_rows)] + [range(s.first, s.first + s.rows) for s in turns.sets]
    shares = [shares_of(table, list(rows)) for rows in ranges]
    names: list[str] = []
    sums = torch.zeros(())
    with losses.scorer.strategy.evaluating():
        has_point, has_router = losses.kind.has_point, losses.router is not None
        points = _points(losses, held_out, shares, turns, device) if has_point else None
        routed = _routed(losses, held_out, turns, device) if has_router else None
        nothing = [None] * len(shares)
        wholes = list(map(Whole, shares, points or nothing, nothing if routed is None else routed))
        for turn in turns:
            found = losses.of(held_out, turn.rows, *(wholes[place] for place in turn.wholes))
            for place, result in zip(turn.wholes, found, strict=True):
                numbers = {"loss": result.loss, **result.metrics}
                values = torch.stack(list(numbers.values())).detach().double()
                if not names:
                    names, sums = list(numbers), values.new_zeros(len(wholes), len(numbers))
                sums[place] += values * turn.counts
    total = add_up(sums).tolist()
    labels = ["", *(f"/{each.name}" for each in turns.sets)]
    told = {
        f"{PREFIX}{name}{label}": value
        for label, row in zip(labels, total, strict=True)
        for name, value in zip(names, row, strict=True)
    }
    if points is not None:
        told |= {f"{PREFIX}kl{label}": float(p) for label, p in zip(labels, points, strict=True)}
    return told


def _routed(losses: MicroLosses, held_out: Rows, turns: _Turns, device: torch.device) -> Tensor:
    """How many tokens of all held-out rows, and of each set's, go to each expert."""
    assert losses.router is not None
    total: Tensor | None = None
    for turn in turns:
        batch = collate(held_out.table, turn.rows, PAD, device)
        tokens = real_tokens(held_out.table, turn.rows, batch)
        own = losses.router.counts(losses.scorer.routing(batch), tokens)
        if total is None:
            total = own.new_zeros(1 + len(turns.sets), *own.shape)
        total[turn.wholes] += own * turn.counts
    assert total is not None  # there are held-out rows
    return add_up(total)


def _points(
    losses: MicroLosses, held_out: Rows, shares: list[Shares], turns: _Turns, device: torch.device
) -> list[Tensor]:
    """KTO's z0 of all held-out rows, and of each set's."""
    assert held_out.reference is not None  # KTO has a reference
    total = torch.zeros(len(shares), dtype=torch.float64, device=device)
    for turn in turns:
        batch = collate_mismatched(held_out.table, turn.rows, PAD, device)
        before = held_out.reference.mismatched(turn.rows, batch)
        ratios = (losses.scorer.score(batch).responses.log_probability - before).double()
        weights = weights_of(held_out.table, turn.rows, device)
        total[turn.wholes] += weighted_sum(ratios, weights) * turn.counts
    sums = add_up(total)
    return [
        kto_reference_point(each, share.rows).float()
        for each, share in zip(sums, shares, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a run must reach to go on, as a study asks of it.

    Attributes:
        by_step: the worst value of the metric with which it goes on, by step.
        of_best: whether the best value so far counts, or that of the step.
    """

    by_step: Mapping[int, float]
    of_best: bool


class Evaluations:
    """The evaluations of a run so far.

    Args:
        bounds: where the run ends if it is behind.
        folder: of the run; its lines up to `first_step` are read, so that a resumed run decides as
            an undisturbed one. All ranks call together.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        folder: Path,
        first_step: int,
        bounds: Bounds | None = None,
    ) -> None:
        self._config, self._bounds = config, bounds
        self.is_behind = False
        self.best: tuple[int, float] | None = None  # step and value
        self.last_step = first_step
        self._num_since = 0  # evaluations after the best one
        for record in earlier_records(folder / METRICS_FILE, first_step):
            if self._name in record and record["step"]:  # not before the first step
                self.add(int(record["step"]), record)

    @property
    def _name(self) -> str:
        return PREFIX + self._config.metric

    def add(self, step: int, record: dict[str, float]) -> None:
        """Take in the evaluation after a step. Of equal ones the first is the best."""
        value, self.last_step = record[self._name], step
        if not math.isnan(value) and (self.best is None or self._is_better(value, self.best[1])):
            self.best, self._num_since = (step, value), 0
        else:
            self._num_since += 1
        bound = None if self._bounds is None else self._bounds.by_step.get(step)
        if self._bounds is not None and bound is not None:
            if self._bounds.of_best:
                value = math.nan if self.best is None else self.best[1]
            self.is_behind |= math.isnan(value) or self._is_better(bound, value)

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._config.less_is_better else value > than

    @property
    def is_over(self) -> bool:
        """Whether the run stops here, because patience is at its end or it is behind others."""
        patience = self._config.patience
        return self.is_behind or (patience is not None and self._num_since >= patience)

    @property
    def kept_step(self) -> int | None:
        """The step whose model is written, if it is to be the best one and there is one."""
        return self.best[0] if self._config.keep == "best" and self.best is not None else None

    def told(self, num_steps: int) -> dict[str, Any]:
        """For records: the best evaluation, the step whose model is written, and where the run
        stopped if that was early.
        """
        told: dict[str, Any] = {"metric": self._name, "written_step": self.last_step}
        if self.best is not None:
            told |= {"best_step": self.best[0], "best": self.best[1]}
        if self.kept_step is not None:
            told["written_step"] = self.kept_step
        if self.last_step < num_steps:
            told["stopped_at"] = self.last_step
            if self.is_behind:
                told["behind"] = True
        return told
