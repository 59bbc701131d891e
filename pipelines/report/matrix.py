"""The matrix that a page shows: models x columns, with errors, differences' errors and fronts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.evaluate.groups import Array
from pipelines.report.results import COLUMNS, KINDS, Measurement, ModelResults, Results

UNKNOWN = 65535  # a support that is not known, among counts of draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A group, or one metric of a task.

    Attributes:
        name: as shown; no two columns have one.
        members: of a group, in words; of a task, none.
        inner: whether it is a group that other groups are made of, or that is made of tasks alone.
        bounds: the lowest and highest value that it can have; None: not known.
        scale: shown numbers are the task's times this: 100 for shares.
        lower: whether lower is better.
        n: documents, None for groups.
    """

    name: str
    kind: Literal["group", "task"]
    members: str = ""
    inner: bool = True
    bounds: tuple[float, float] | None = None
    scale: float = 1.0
    lower: bool = False
    n: int | None = None

    @property
    def is_percent(self) -> bool:
        """Whether shown numbers go from 0 to 100."""
        bounds = self.bounds and (self.bounds[0] * self.scale, self.bounds[1] * self.scale)
        return bounds is not None and np.allclose(bounds, (0, 100))


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """The numbers of R models in C columns, as shown (times the columns' scales).

    Attributes:
        values, stderrs: (R, C); NaN: not measured, or no error known.
        pairs: (C, R, R) standard errors of differences, paired by document; NaN: not known.
        support: (C, C, R) in how many bootstrap draws a model is on the front of two columns;
            `UNKNOWN` where there are no draws.
        num_draws: bootstrap draws.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Array
    stderrs: Array
    pairs: Array
    support: NDArray[np.uint16]
    num_draws: int

    def index(self, name: str, what: str) -> int:
        """The place of a column.

        Raises:
            InputError: no column has this name.
        """
        names = [column.name for column in self.columns]
        if name not in names:
            raise InputError(f"{what}: found {name!r}; allowed: {', '.join(names)}")
        return names.index(name)

    def fences(self) -> Array:
        """(C, 2) the ends between which almost all values of each column lie: no farther from the
        middle half than three times its width, so that one broken model does not make all others
        look alike.
        """
        found = np.zeros((len(self.columns), 2))
        for column, values in enumerate(self.values.T):
            known = values[np.isfinite(values)]
            if not len(known):
                continue
            found[column] = known.min(), known.max()
            low, high = (float(np.quantile(known, share)) for share in (0.25, 0.75))
            if len(known) >= 5 and high > low:
                width = 3 * (high - low)
                found[column] = max(known.min(), low - width), min(known.max(), high + width)
        return found

    def difference_error(self, column: int, first: int, second: int) -> tuple[float, bool]:
        """The standard error of the first row's number less the second's, and whether it is paired
        by document; else it is that of independent measurements, mostly too large.
        """
        paired = float(self.pairs[column, first, second])
        if np.isfinite(paired):
            return paired, True
        return float(np.hypot(*self.stderrs[[first, second], column])), False


def matrix_of_results(results: Results) -> Matrix:
    """The matrix of a `results.json` alone: without paired errors and draws."""
    rows = tuple(name for kind in KINDS for name in results.of_kind(kind))
    tasks = list(results.sft.tasks)
    percent = (0.0, 100.0)
    columns = (
        *(Column(name=c, kind="group", inner=c != COLUMNS[-1], bounds=percent) for c in COLUMNS),
        *(
            Column(name=task, kind="task", bounds=percent, n=results.sft.tasks[task].n)
            for task in tasks
        ),
    )
    found = [measurements(results.models[name], tasks) for name in rows]
    num_rows, num_columns = len(rows), len(columns)
    return Matrix(
        rows=rows,
        columns=columns,
        values=np.array([[each.value for each in row] for row in found]),
        stderrs=np.array([[each.stderr for each in row] for row in found]),
        pairs=np.full((num_columns, num_rows, num_rows), np.nan),
        support=np.full((num_columns, num_columns, num_rows), UNKNOWN, np.uint16),
        num_draws=0,
    )


def measurements(model: ModelResults, tasks: Sequence[str]) -> list[Measurement]:
    """A row of the matrix."""
    return [*(model.measurement(column) for column in COLUMNS), *(model.tasks[t] for t in tasks)]


def pair_errors(factor: Array) -> Array:
    """Standard errors of all differences: (R, K) joint errors -> (R, R).

    The covariance is `F F'`, so that of a difference is `|F_i - F_j|^2`.
    """
    covariance = factor @ factor.T
    own = np.diag(covariance)
    squares: Array = own[:, None] + own[None, :] - 2 * covariance
    np.fill_diagonal(squares, 0.0)
    # What rounding leaves of two models that answered the same is no error.
    squares[squares < 1e-12 * (own[:, None] + own[None, :])] = 0.0
    return np.sqrt(squares)


def front_counts(x: Array, y: Array) -> NDArray[np.uint16]:
    """In how many draws each model is on the front of two columns, as `studies.undominated` has it.

    Args:
        x, y: (B, R), higher is better; NaN: not measured, never on the front.

    Returns:
        (R,) counts from 0 to B.
    """
    missing = np.isnan(x) | np.isnan(y)
    x, y = np.where(missing, -np.inf, x), np.where(missing, -np.inf, y)
    order = np.lexsort((-y, -x), axis=1)  # from the highest x down, among equals from y down
    xs, ys = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    places = np.arange(x.shape[1])
    begins = np.where(xs[:, 1:] != xs[:, :-1], places[1:], 0)
    begins = np.maximum.accumulate(np.pad(begins, ((0, 0), (1, 0))), axis=1)  # of equal x
    before = np.pad(np.maximum.accumulate(ys, axis=1)[:, :-1], ((0, 0), (1, 0)),
                    constant_values=-np.inf)  # fmt: skip
    highest = np.take_along_axis(ys, begins, 1)
    on_front = (ys == highest) & (ys > np.take_along_axis(before, begins, 1))
    counts = np.zeros(x.shape[1], np.int64)
    np.add.at(counts, order[on_front], 1)
    return counts.astype(np.uint16)
