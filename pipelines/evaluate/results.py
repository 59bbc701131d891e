"""Finished evaluations, read again: their numbers, differences by document, and other forms."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet as parquet

from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.groups import Group, Groups, Leaf, resolve_groups
from pipelines.evaluate.harness import write_harness_json
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.opened import open_tasks
from pipelines.evaluate.places import Folder, open_place
from pipelines.evaluate.statistics import (
    Contrast,
    Estimates,
    Sheet,
    group_estimates,
    make_sheet,
    mean_draws,
    means,
)
from pipelines.evaluate.store import RESULT_FILE, Cell, DamagedBlockError, Store
from pipelines.evaluate.studies import undominated, undominated_support
from pipelines.evaluate.summary import NUMBERS_FILE

GROUP = "group"  # stands for the metric of a group's number
DROP_RATE = "drop_rate"  # after a metric's name: what an attack takes of it, in percent


@dataclass(frozen=True, slots=True)
class Row:
    """A number of a model: of a task's metric, or of a group."""

    model: str
    task: str
    metric: str
    value: float | None
    stderr: float | None
    n: int | None


class Evaluation:
    """A finished evaluation, in a folder or at an address.

    Raises:
        InputError: no evaluation there, or one of another version.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = open_place(place)
        path = f"{self.place.address}/{RESULT_FILE}"
        try:
            self.summary: dict[str, Any] = json.loads(self.place.read(RESULT_FILE))
        except OSError as error:
            reason = error.strerror or "No such file or directory"
            raise InputError(f"{path}: {reason}; no finished evaluation there") from None
        except ValueError:
            raise InputError(f"{path}: not valid JSON") from None
        if not isinstance(self.summary, dict) or self.summary.get("schema") != 2:
            raise InputError(f"{path}: found another version; allowed: schema 2")

    @property
    def name(self) -> str:
        """The last part of its place."""
        place = self.place
        if isinstance(place, Folder):
            return place.path.resolve().name
        return place.address.rpartition("/")[2]

    @property
    def models(self) -> list[str]:
        """The names of its models."""
        return list(self.summary["models"])

    def rows(self) -> list[Row]:
        """All numbers, model by model: groups, then tasks."""
        found = []
        for model, entry in self.summary["models"].items():
            for group, number in entry["groups"].items():
                found.append(Row(model, group, GROUP, number["value"], number["stderr"], None))
            for task, metrics in entry["tasks"].items():
                found += [Row(model, task, metric, **number) for metric, number in metrics.items()]
        return found

    def drops(self) -> list[Row]:
        """The drop rates of attacked tasks in percent, model by model."""
        return [
            Row(model, task, f"{metric} {DROP_RATE}", drop["drop_rate"], drop["stderr"], drop["n"])
            for model, entry in self.summary["models"].items()
            for task, found in entry.get("attacks", {}).items()
            for metric, drop in found["drops"].items()
        ]

    def check_names(self, models: Iterable[str] = (), groups: Iterable[str] = ()) -> None:
        """Raise InputError for an unknown model or group."""
        for what, wanted, known in (
            ("model", models, self.models),
            ("group", groups, list(self._groups.groups)),
        ):
            for name in wanted:
                if name not in known:
                    found = ", ".join(known) or "none"
                    raise InputError(
                        f"{self.place.address}: unknown {what} {name!r}; found: {found}"
                    )

    def sheets(
        self, models: Sequence[str], tasks: Iterable[str] | None = None
    ) -> dict[Leaf, Sheet]:
        """The values of models on each (task, metric) that is a mean over documents.

        Args:
            tasks: only these.

        Raises:
            InputError: an unknown model, or samples that are damaged or gone.
        """
        self.check_names(models)
        sheets = {}
        for task in self._metrics if tasks is None else dict.fromkeys(tasks):
            if any((model, task) not in self._keys for model in models):
                continue
            samples = {model: self.samples(model, task) for model in models}
            clusters = {each.id: each.cluster for each in samples[models[0]]}
            for metric in self.summary["models"][models[0]]["tasks"][task]:
                values = {
                    model: {each.id: each.values[metric] for each in own if metric in each.values}
                    for model, own in samples.items()
                }
                if all(self._is_mean(of, task, metric, own) for of, own in values.items()):
                    sheets[task, metric] = make_sheet(task, values, clusters)
        return sheets

    def columns(
        self, models: Sequence[str], groups: Sequence[str] | None = None
    ) -> dict[str, Estimates]:
        """The joint estimates of models on groups.

        Args:
            groups: the groups to give; without it all whose metrics are means.

        Raises:
            InputError: as `sheets`; an unknown group, or one that has a metric that is no mean or
                that a model lacks.
        """
        return self._columns(self._sheets_of(models, groups), groups)

    def undominated(
        self, models: Sequence[str], groups: Sequence[str], seed: int = 0
    ) -> tuple[dict[str, Estimates], dict[str, tuple[bool, float]]]:
        """The groups as `columns` has them, and for each model whether no other beats it over them,
        and in which share of bootstrap samples so.

        Raises:
            InputError: as `columns`.
        """
        sheets = self._sheets_of(models, groups)
        columns = self._columns(sheets, groups)
        points = np.stack([columns[name].values for name in groups], axis=-1)
        draws = {leaf: mean_draws(each, seed=seed) for leaf, each in sheets.items()}
        sizes = {leaf: each.values.shape[1] for leaf, each in sheets.items()}
        shares = undominated_support(self._groups, groups, draws, sizes)
        best = undominated(points)
        return columns, {
            model: (bool(is_best), float(share))
            for model, is_best, share in zip(models, best, shares, strict=True)
        }

    def differences(self, first: str, second: str) -> dict[tuple[str, str], Contrast]:
        """The first model's numbers less the second's, paired by document, by task and metric or
        by group; without metrics that are no means.
        """
        sheets = self.sheets([first, second])
        leaves = {leaf: means(each) for leaf, each in sheets.items()}
        columns = group_estimates(self._groups, leaves)
        found = {(name, GROUP): each.difference(first, second) for name, each in columns.items()}
        return found | {leaf: each.difference(first, second) for leaf, each in leaves.items()}

    def _sheets_of(self, models: Sequence[str], groups: Sequence[str] | None) -> dict[Leaf, Sheet]:
        """The sheets that groups, or all of them, need."""
        self.check_names(models, groups or ())
        names = self._groups.groups if groups is None else groups
        return self.sheets(models, [task for n in names for task, _ in self._groups.reached(n)])

    def _columns(
        self, sheets: Mapping[Leaf, Sheet], groups: Sequence[str] | None
    ) -> dict[str, Estimates]:
        """As `columns`, of the sheets that these groups need."""
        leaves = {leaf: means(each) for leaf, each in sheets.items()}
        found = group_estimates(self._groups, leaves)
        for name in groups or ():
            self._check_whole(name, leaves)
        return {name: found[name] for name in groups or found}

    def _check_whole(self, group: str, leaves: Mapping[Leaf, Any]) -> None:
        """Raise InputError for a group with a metric that is not among leaves."""
        for leaf in self._groups.reached(group):
            if leaf not in leaves:
                raise InputError(
                    f"{self.place.address}: group {group!r}: {'.'.join(leaf)} is no mean over "
                    "documents, or not all these models have it"
                )

    @cached_property
    def _metrics(self) -> dict[str, list[str]]:
        """The metrics of each task, of whichever models have them."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows():
            if row.metric != GROUP:
                found.setdefault(row.task, {})[row.metric] = None
        return {task: list(metrics) for task, metrics in found.items()}

    @cached_property
    def _groups(self) -> Groups:
        """Its groups that some model has a value of."""
        has_value = {
            name
            for entry in self.summary["models"].values()
            for name, number in entry["groups"].items()
            if number["value"] is not None
        }
        groups = {
            name: Group(**values)
            for name, values in self.summary["groups"].items()
            if name in has_value
        }
        return resolve_groups(groups, self._metrics)

    def samples(self, model: str, task: str) -> list[Any]:
        """The samples of a cell, in the order of documents.

        Raises:
            InputError: they are damaged or gone.
        """
        return self._read(task, self._keys[model, task])

    def answered(self, model: str, task: str) -> list[Any] | None:
        """The samples that hold the answers where a cell holds scores of them, as a judge's or a
        reward model's (its `cell.json` names them), in the same order; None for other cells.

        Raises:
            InputError: they are damaged or gone.
        """
        described = Store(self.place).described(task, self._keys[model, task])
        return self._read(*described["answers"]) if "answers" in described else None

    def _read(self, task: str, key: str) -> list[Any]:
        store = Store(self.place)
        cell = Cell(task, key, store.described(task, key)["documents"], {})
        try:
            return [
                sample for block in range(cell.num_blocks) for sample in store.read(cell, block)[0]
            ]
        except DamagedBlockError as damage:
            raise InputError(f"{damage}; run the evaluation again to measure it") from None

    def write_harness_json(self, folder: str | Path) -> list[Path]:
        """Write lm-evaluation-harness's files, those of each model below `folder`; returns the
        files of results.

        Raises:
            InputError: tasks of a tasks.yaml, or tasks that have changed.
        """
        config = EvaluateConfig(**self.summary["config"])
        tasks = [each for each in open_tasks(config) if isinstance(each, LibraryTask)]
        if not tasks:
            raise InputError(
                f"{self.place.address}: tasks of a tasks.yaml have no form of the library's"
            )
        found = []
        for model, entry in self.summary["models"].items():
            own = [task for task in tasks if task.name in entry["tasks"]]
            for task in own:
                self._check_unchanged(model, task)
            results = {task.name: task.result(self.samples(model, task.name)) for task in own}
            found.append(write_harness_json(results, folder, model, entry["digest"]))
        return found

    def _check_unchanged(self, model: str, task: LibraryTask) -> None:
        """Raise InputError if a task is not the one whose samples are stored."""
        measured = Store(self.place).described(task.name, self._keys[model, task.name])
        if measured["task_fingerprint"] != task.fingerprint:
            raise InputError(
                f"{self.place.address}: task {task.name} has changed since it was measured; run "
                "the evaluation again"
            )

    @cached_property
    def _keys(self) -> dict[tuple[str, str], str]:
        """The key of each cell, by model and task."""
        content = pyarrow.BufferReader(self.place.read(NUMBERS_FILE))
        table = parquet.read_table(content, columns=["model", "task", "key"])
        return {(row["model"], row["task"]): row["key"] for row in table.to_pylist()}

    def _is_mean(self, model: str, task: str, metric: str, values: dict[str, Any]) -> bool:
        """Whether a model's metric is the mean of its documents' values."""
        number = self.summary["models"][model]["tasks"][task].get(metric)
        if (
            number is None
            or not values
            or not all(isinstance(each, int | float) for each in values.values())
        ):
            return False
        mean = sum(values.values()) / len(values)
        return math.isclose(mean, number["value"], rel_tol=1e-9, abs_tol=1e-12)


def as_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV with full precision; what is unknown is empty."""
    frame = pandas.DataFrame([asdict(row) for row in rows], columns=[f.name for f in fields(Row)])
    return frame.astype({"n": "Int64"}).to_csv(index=False)


def as_latex(models: Sequence[str], heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as LaTeX's `tabular`, with the package booktabs.

    Args:
        cells: by model, then by column; ± becomes a sign of LaTeX.
    """
    rows = [[model, *own] for model, own in zip(models, cells, strict=True)]
    frame = pandas.DataFrame(rows, columns=["model", *heads])
    text = frame.to_latex(index=False, escape=True, column_format="l" + "r" * len(heads))
    return text.replace("±", r"$\pm$")
