"""Estimates of several models on the same documents, and what may be said of their differences.

Documents of one cluster (questions about one person, turns of one conversation) are not
independent, so every error here is by cluster (Liang and Zeger 1986; Miller 2024, "Adding error
bars to evals"). Models answer the same documents, so their errors go together: an `Estimates`
keeps what each cluster adds to each model's error, from which the error of a difference, of a
group of tasks, or of any other weighted sum follows without another assumption.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.evaluate.groups import Array, Groups, Leaf

_CHUNK = 10_000_000  # numbers of one array of draws


@dataclass(frozen=True, slots=True)
class Contrast:
    """A weighted sum of models' values, such as a difference, and its standard error."""

    value: float
    stderr: float  # NaN: unknown

    @property
    def is_clear(self) -> bool:
        """More than two standard errors away from 0: by chance less than one time in twenty."""
        return abs(self.value) > 2 * self.stderr

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """The normal confidence interval."""
        return self.value - z * self.stderr, self.value + z * self.stderr

    def __str__(self) -> str:
        return f"{self.value:.4g} ±{self.stderr:.2g}"


@dataclass(frozen=True, slots=True)
class Estimates:
    """One number for each model, with their joint error.

    Attributes:
        rows: R names of models.
        values: (R,) their values.
        factor: (R, K) what each of K independent sources, such as clusters, adds to the errors:
            the covariance of the values is `factor @ factor.T`. NaN: unknown.
        n: documents.
        clusters: their clusters.
    """

    rows: tuple[str, ...]
    values: Array
    factor: Array
    n: int
    clusters: int

    @property
    def stderrs(self) -> Array:
        """(R,) standard errors."""
        return np.linalg.norm(self.factor, axis=1)

    def contrast(self, weights: Mapping[str, float]) -> Contrast:
        """The sum of weight * value over the named models.

        Raises:
            InputError: a model that is not among the rows.
        """
        w = np.zeros(len(self.rows))
        for name, weight in weights.items():
            if name not in self.rows:
                raise InputError(f"model {name!r}: not measured; found: {', '.join(self.rows)}")
            w[self.rows.index(name)] += weight
        used = np.flatnonzero(w)  # a model without an error spoils its own contrasts alone
        return Contrast(
            float(w[used] @ self.values[used]), float(np.linalg.norm(w[used] @ self.factor[used]))
        )

    def value(self, row: str) -> Contrast:
        """One model's value."""
        return self.contrast({row: 1.0})

    def difference(self, first: str, second: str) -> Contrast:
        """The first model's value less the second's, paired by document."""
        return self.contrast({first: 1.0, second: -1.0} if first != second else {first: 0.0})


@dataclass(frozen=True, slots=True)
class Sheet:
    """Several models' values of one metric on the same documents of one task.

    Attributes:
        task: the task's name; its draws depend on it.
        rows: R names of models.
        values: (R, D) finite values.
        clusters: D clusters.
    """

    task: str
    rows: tuple[str, ...]
    values: Array
    clusters: tuple[str, ...]

    @property
    def index(self) -> NDArray[np.intp]:
        """(D,) the number of each document's cluster, from 0 to G - 1."""
        return np.unique(np.asarray(self.clusters), return_inverse=True)[1]


def make_sheet(
    task: str, values: Mapping[str, Mapping[str, float]], clusters: Mapping[str, str]
) -> Sheet:
    """Put the models' values in one order of documents, that of the first model.

    Args:
        values: model -> document -> value.
        clusters: document -> cluster; a document that is not there is its own.

    Raises:
        InputError: no model or document, models on different documents, a value that is not finite.
    """
    if not values or not next(iter(values.values())):
        raise InputError(f"task {task!r}: holds no values")
    first, documents = next((name, list(each)) for name, each in values.items())
    for name, each in values.items():
        odd = sorted(set(documents) ^ set(each))
        if odd:
            owner = first if odd[0] in values[first] else name
            raise InputError(
                f"task {task!r}: {first} and {name} were measured on different documents: "
                f"{len(odd)} are not in both, such as {odd[0]!r} of {owner}"
            )
        bad = next((d for d in documents if not math.isfinite(each[d])), None)
        if bad is not None:
            raise InputError(f"task {task!r}: {name}: document {bad!r}: found {each[bad]}")
    array = np.asarray([[each[d] for d in documents] for each in values.values()], np.float64)
    return Sheet(task, tuple(values), array, tuple(clusters.get(d, d) for d in documents))


def cluster_sums(values: Array, index: NDArray[np.intp]) -> Array:
    """Sums over the documents of each cluster: (..., D) -> (..., G)."""
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    return np.add.reduceat(values[..., order], starts, axis=-1)


def means(sheet: Sheet) -> Estimates:
    """Each model's mean over the documents, with cluster-robust errors.

    A row's standard error is that of `operators.statistics.clustered_mean`, and a difference's is
    that of the same formula on the documents' differences. One cluster has no error (NaN).
    """
    values = sheet.values.mean(axis=1)
    sums = cluster_sums(sheet.values - values[:, None], sheet.index)
    groups = sums.shape[1]
    scale = math.sqrt(groups / (groups - 1)) if groups > 1 else math.nan
    n = sheet.values.shape[1]
    return Estimates(sheet.rows, values, sums * (scale / n), n, groups)


def mean_draws(sheet: Sheet, count: int = 1000, seed: int = 0) -> Array:
    """The models' means in bootstrap samples of whole clusters: (count, R).

    A sample has as many clusters as the sheet, drawn with replacement, the same for all models.
    Equal seed and task give equal samples.
    """
    index = sheet.index
    sums = cluster_sums(sheet.values, index)  # (R, G)
    sizes = np.bincount(index).astype(np.float64)
    parts = [c @ sums.T / (c @ sizes)[:, None] for c in _samples(sheet.task, index, count, seed)]
    return np.concatenate(parts)


def aggregates(
    task: str,
    aggregate: Callable[[Sequence[Any]], float],
    items: Mapping[str, Sequence[Any]],
    clusters: Sequence[str],
    count: int = 1000,
    seed: int = 0,
) -> tuple[Estimates, Array]:
    """As `means`, for a metric that is no mean, such as a correlation or a corpus' BLEU.

    Its error comes from bootstrap samples of whole clusters, those of `mean_draws`.

    Args:
        aggregate: from the documents' items to the metric.
        items: model -> one item a document, such as (gold, predicted).
        clusters: the documents' clusters.
        count: samples, 2 or more.

    Returns:
        the estimates, and (count, R) the metric in each sample.

    Raises:
        InputError: another number of items than of clusters, or a metric that is not finite.
    """
    for name, each in items.items():
        if len(each) != len(clusters) or not clusters:
            raise InputError(
                f"task {task!r}: {name}: found {len(each)} items and {len(clusters)} clusters"
            )
    index = np.unique(np.asarray(clusters), return_inverse=True)[1]
    everything = np.ones(int(index.max()) + 1, np.int64)
    found = []
    for counts in (everything[None], *_samples(task, index, count, seed)):
        for of_cluster in counts:
            chosen = np.repeat(np.arange(len(index)), of_cluster[index])
            found.append([aggregate([each[i] for i in chosen]) for each in items.values()])
    values, draws = np.asarray(found[0], np.float64), np.asarray(found[1:], np.float64)
    if not (np.isfinite(values).all() and np.isfinite(draws).all()):
        raise InputError(f"task {task!r}: the metric is not finite in a bootstrap sample")
    return _with_error_of(draws, tuple(items), values, index), draws


def means_by_bootstrap(sheet: Sheet, count: int = 1000, seed: int = 0) -> tuple[Estimates, Array]:
    """As `means`, with the error of bootstrap samples: for a group that holds one task's mean and
    its metric of another kind, whose samples are the same.

    Returns:
        the estimates, and (count, R) the means in each sample.
    """
    draws = mean_draws(sheet, count, seed)
    return _with_error_of(draws, sheet.rows, sheet.values.mean(axis=1), sheet.index), draws


def _with_error_of(
    draws: Array, rows: tuple[str, ...], values: Array, index: NDArray[np.intp]
) -> Estimates:
    """`values` with the joint error of their bootstrap samples (B, R); of one cluster NaN."""
    groups = int(index.max()) + 1
    factor = (draws - draws.mean(axis=0)).T / math.sqrt(len(draws) - 1)
    if groups < 2:
        factor = np.full_like(factor, math.nan)
    return Estimates(rows, values, factor, len(index), groups)


def _samples(
    task: str, index: NDArray[np.intp], count: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """How often each cluster is in each bootstrap sample: blocks (b, G), `count` rows in all."""
    groups = int(index.max()) + 1
    random = np.random.default_rng([seed, *task.encode()])
    block = max(1, _CHUNK // groups)
    for start in range(0, count, block):
        yield random.multinomial(
            groups, np.full(groups, 1 / groups), size=min(block, count - start)
        )


def group_estimates(groups: Groups, leaves: Mapping[Leaf, Estimates]) -> dict[str, Estimates]:
    """Each group's value for the models that have all its members, with their joint error.

    Tasks are independent of each other; what models and metrics share within a task stays.

    Args:
        leaves: the estimates of each (task, metric); those that are not there are missing.

    Returns:
        a group's estimates; a group without any model is left out.

    Raises:
        InputError: a group with two metrics of one task, of which one has its error from
            bootstrap samples and the other has not.
    """
    found = {}
    for name in groups.groups:
        needed = groups.reached(name)
        if not all(leaf in leaves for leaf in needed):
            continue
        rows = [r for r in leaves[needed[0]].rows if all(r in leaves[x].rows for x in needed)]
        if rows:
            found[name] = _one_group(groups, name, {x: leaves[x] for x in needed}, tuple(rows))
    return found


def _one_group(
    groups: Groups, name: str, leaves: Mapping[Leaf, Estimates], rows: tuple[str, ...]
) -> Estimates:
    """One group over the models `rows`, which all its leaves have."""
    values = np.zeros((len(rows), len(groups.leaves)))
    sizes = np.zeros(len(groups.leaves))
    places = {leaf: [each.rows.index(row) for row in rows] for leaf, each in leaves.items()}
    for leaf, each in leaves.items():
        column = groups.leaves.index(leaf)
        values[:, column], sizes[column] = each.values[places[leaf]], each.n
    weights = groups.weights(values, sizes)[name]  # (R, L)
    factors: dict[str, Array] = {}  # of each task; its metrics have the same sources of errors
    for leaf, each in leaves.items():
        weight = weights[:, groups.leaves.index(leaf), None]
        # A member that does not count (of `minimum`) may lack an error.
        part = np.where(weight == 0, 0.0, weight * each.factor[places[leaf]])
        other = factors.setdefault(leaf[0], np.zeros_like(part))
        if other.shape != part.shape:
            raise InputError(
                f"groups.{name}: the errors of task {leaf[0]!r} come from clusters and from "
                "bootstrap samples; expected one of them for all its metrics"
            )
        factors[leaf[0]] = other + part
    tasks = {leaf[0]: each for leaf, each in leaves.items()}
    return Estimates(
        rows,
        np.sum(weights * values, axis=1),
        np.concatenate(list(factors.values()), axis=1),
        sum(each.n for each in tasks.values()),
        sum(each.clusters for each in tasks.values()),
    )
