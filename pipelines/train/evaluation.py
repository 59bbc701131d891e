"""Held-out rows during a run: their numbers, the best evaluation, and the stop without a better
one.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from operators.losses import kto_reference_point
from pipelines.train.data import PAD, collate, collate_mismatched
from pipelines.train.evaluation_config import PREFIX, EvaluationConfig
from pipelines.train.files import METRICS_FILE
from pipelines.train.metrics import add_up, earlier_records
from pipelines.train.objectives import (
    MicroLoss,
    Shares,
    shares_of,
    weighted_sum,
    weights_of,
)
from pipelines.train.reference import Rows
from pipelines.train.reference_store import small_batches
from pipelines.train.router import RouterLoss, real_tokens
from pipelines.train.scoring import Scorer


def measure(
    scorer: Scorer,
    held_out: Rows,
    device: torch.device,
    micro_loss: Callable[[Rows, list[int], Shares, Tensor | None, Tensor | None], MicroLoss],
    *,
    has_point: bool,
    router: RouterLoss | None,
) -> dict[str, float]:
    """The objective's loss and metrics on all held-out rows, as if they were one global batch.

    Rows are cut into the same small batches for every run, and what a batch gives is a share of
    the whole, so that neither the number of workers nor the micro-batch changes a number.
    All ranks call together.

    Args:
        micro_loss: the share of some rows, given the counts of all, KTO's reference point and the
            tokens of each expert.
        has_point: whether the objective has a reference point, which is that of all rows.
    """
    rows = list(range(held_out.table.num_rows))
    shares, sums = shares_of(held_out.table, rows), dict[str, Tensor]()
    with scorer.strategy.evaluating():
        point = _point(scorer, held_out, shares, device) if has_point else None
        routed = None if router is None else _routed(scorer, held_out, router, device)
        for batch, counts in _turns(held_out, device):
            result = micro_loss(held_out, batch, shares, point, routed)
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.double() * counts
    total = add_up(torch.stack(list(sums.values()))).tolist()
    found = {PREFIX + name: value for name, value in zip(sums, total, strict=True)}
    return found if point is None else found | {PREFIX + "kl": float(point)}


def _routed(scorer: Scorer, held_out: Rows, router: RouterLoss, device: torch.device) -> Tensor:
    """How many tokens of all held-out rows go to each expert."""
    parts = []
    for rows, counts in _turns(held_out, device):
        batch = collate(held_out.table, rows, PAD, device)
        tokens = real_tokens(held_out.table, rows, batch)
        parts.append(router.counts(scorer.routing(batch), tokens) * counts)
    return add_up(torch.stack(parts).sum(0))


def _point(scorer: Scorer, held_out: Rows, shares: Shares, device: torch.device) -> Tensor:
    """KTO's z0 of all held-out rows."""
    assert held_out.reference is not None  # KTO has a reference
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows, counts in _turns(held_out, device):
        batch = collate_mismatched(held_out.table, rows, PAD, device)
        before = held_out.reference.mismatched(rows, batch)
        ratios = (scorer.score(batch).responses.log_probability - before).double()
        total += weighted_sum(ratios, weights_of(held_out.table, rows, device)) * counts
    return kto_reference_point(add_up(total), shares.rows).float()


def _turns(held_out: Rows, device: torch.device) -> Iterator[tuple[list[int], int]]:
    """This rank's small batches, and whether each counts (1 or 0). All ranks take equally many,
    because passes of a sharded model are collective: the last batch is repeated, and does not
    count.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    batches = small_batches(held_out.table, device)
    for first in range(0, len(batches), world):
        number = first + rank
        yield batches[min(number, len(batches) - 1)], int(number < len(batches))


class Evaluations:
    """The evaluations of a run so far.

    Args:
        folder: of the run; its lines up to `first_step` are read, so that a resumed run decides as
            an undisturbed one. All ranks call together.
    """

    def __init__(self, config: EvaluationConfig, folder: Path, first_step: int) -> None:
        self._config = config
        self.best: tuple[int, float] | None = None  # step and value
        self.last_step = first_step
        self._num_since = 0  # evaluations after the best one
        for record in earlier_records(folder / METRICS_FILE, first_step):
            if self._name in record:
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

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._config.less_is_better else value > than

    @property
    def is_over(self) -> bool:
        """Whether the run stops here, because patience is at its end."""
        patience = self._config.patience
        return patience is not None and self._num_since >= patience

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
        return told
