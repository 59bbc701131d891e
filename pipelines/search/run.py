"""Run a study: measure candidates, keep what is known, choose, write the winner.

A killed run goes on where it was: what is finished is in the journal, what was started is measured
again at the same point, and samplers depend on the results alone.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.commit import lock, make_folder, partial_path, write_atomically
from pipelines.errors import InputError
from pipelines.hub.offline import is_offline
from pipelines.merge import MergeConfig, merge_planned, plan_merge
from pipelines.merge.run import is_finished, refuse_inputs
from pipelines.search.goals import Goals, series_of_metrics
from pipelines.search.journal import JOURNAL_FILE
from pipelines.search.measurement import Measurement
from pipelines.search.plan import StudyPlan
from pipelines.search.pool import Failed, LocalPool, MeasurerPool
from pipelines.search.racing import Race
from pipelines.search.results import OF_TEST, RESULT_FILE, choose, result_of, write_tables
from pipelines.search.study import Study

BEST, MERGE_FILE = "best", "merge.yaml"
_AUTO = 1 << 16  # workers; the cluster's room is the bound


class Pool(Protocol):
    """Workers that measure candidates, as `MeasurerPool`."""

    @property
    def size(self) -> int: ...

    def start(
        self, worker: int, candidate: Any, documents: Any = None, race: Any = None
    ) -> None: ...

    def finished(self) -> tuple[int, Measurement | Failed]: ...

    def close(self) -> None: ...


class Search:
    """A study while it runs.

    Args:
        pool: measures on the split that is chosen on.
        on_change: is called after each event, with this object.

    Attributes:
        goals: None until the models beside the candidates are measured.
        running: what each worker measures: a trial's number or a name.
    """

    def __init__(
        self, plan: StudyPlan, study: Study, pool: Pool, on_change: Callable[["Search"], None]
    ) -> None:
        self.plan, self.study, self._pool, self._on_change = plan, study, pool, on_change
        self.goals: Goals | None = None
        self.running: dict[int, int | str] = {}
        self.began, self.finished_here = time.monotonic(), 0
        self._race: Race | None = None

    def run(self) -> Goals:
        """Measure the models beside the candidates, then the candidates."""
        names = [n for n in self.plan.others if _is_open(self.study, n)]
        self._drive(iter(names), lambda name: self.plan.others[str(name)])
        self.goals = goals_of(self.plan, self.study)
        if self.plan.config.racing:
            self._race = self._new_race(self.goals)
        self._drive(self._numbers(self.goals), self._candidate)
        return self.goals

    def measure(self, models: Mapping[str, MergeConfig]) -> None:
        """Measure further models beside the candidates, unless they have been."""
        names = [name for name in models if _is_open(self.study, name)]
        self._drive(iter(names), lambda name: models[str(name)])

    @property
    def seconds_left(self) -> float | None:
        """About how long the trials will take; None before the first one."""
        if not self.finished_here:
            return None
        done = [self.study.trials[number].state != "running" for number in self.study.trials]
        each = (time.monotonic() - self.began) / self.finished_here
        return each * (self.study.wanted - sum(done))

    def _candidate(self, number: int | str) -> MergeConfig:
        assert isinstance(number, int)
        return self.plan.candidate(self.study.trials[number].point)

    def _numbers(self, goals: Goals) -> Iterator[int]:
        """Trials to measure: first those that a killed run had begun. The next point is asked for
        only when there is a worker for it.
        """
        yield from self.study.unfinished
        sampler = self.plan.sampler()
        while len(self.study.trials) < self.study.wanted:
            point = sampler.suggest(len(self.study.trials), self.study.told(goals))
            if point is None:
                return
            yield self.study.start(point)

    def _drive(
        self, jobs: Iterator[int | str], candidate: Callable[[int | str], MergeConfig]
    ) -> None:
        """Give idle workers jobs, tries that failed first, until all are done."""
        idle, again = list(range(self._pool.size)), deque[int | str]()
        while True:
            while idle:
                job = again.popleft() if again else next(jobs, None)
                if job is None:
                    break
                try:
                    merged = candidate(job)
                except InputError as error:
                    self.study.fail(job, Failed("refused", str(error)), 0)
                    continue
                self.running[idle[0]] = job
                self._pool.start(idle.pop(0), merged, None, self._race_of(job))
                self._on_change(self)
            if not self.running:
                return
            worker, outcome = self._pool.finished()
            idle.append(worker)
            job = self.running.pop(worker)
            if isinstance(outcome, Measurement):
                self._finish(job, outcome)
            elif self.study.fail(job, outcome, self.plan.config.retries):
                again.append(job)
            self._on_change(self)

    def _finish(self, job: int | str, measured: Measurement) -> None:
        self.study.finish(job, measured)
        self.finished_here += isinstance(job, int)
        if self._race is not None and isinstance(job, int) and not measured.stopped:
            self._race = self._race.finished(str(job), measured.samples)

    def _race_of(self, job: int | str) -> Race | None:
        return self._race if isinstance(job, int) else None

    def _new_race(self, goals: Goals) -> Race:
        """The race as the finished trials have left it."""
        series, sizes = series_of_study(self.plan, self.study)
        objectives, bounds = goals.racing(series)
        race = Race(sizes, objectives, bounds, self.plan.config.seed)
        for number in self.study.order:
            if self.study.trials[number].state == "complete":
                race = race.finished(str(number), self.study.scores(number))
        return race


def goals_of(plan: StudyPlan, study: Study) -> Goals:
    """The objectives, and the constraints with their bounds.

    Raises:
        InputError: a metric that the evaluation does not give.
    """
    done = {name: study.others[name] for name in plan.others if _is_done(study, name)}
    for goal in (*plan.config.objectives, *plan.config.constraints):
        for metric in goal.terms:
            for trial in done.values():
                if metric not in trial.values:
                    raise InputError(
                        f"objectives: found {metric!r}; allowed: {', '.join(trial.values)}"
                    )
    numbers = {name: (trial.values, trial.stderr) for name, trial in done.items()}
    return Goals(plan.config.objectives, plan.config.constraints, numbers)


def series_of_study(
    plan: StudyPlan, study: Study
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[str, int]]]:
    """Metrics as sums of means of scores, and each series' task and number of documents.

    Raises:
        InputError: no model beside the candidates was measured.
    """
    name = next((name for name in plan.others if _is_done(study, name)), None)
    if name is None:
        reasons = [study.others[name].reason for name in plan.others]
        raise InputError(f"racing: no reference or baseline could be measured: {reasons[0]}")
    scores = study.scores(name)
    series = series_of_metrics(study.others[name].values, scores, plan.tasks, plan.groups)
    task_of = {s: max((t for t in plan.tasks if s.startswith(f"{t}.")), key=len) for s in scores}
    return series, {s: (task_of[s], len(of)) for s, of in scores.items()}


def _is_open(study: Study, name: str) -> bool:
    return name not in study.others or study.others[name].state == "running"


def _is_done(study: Study, name: str) -> bool:
    return name in study.others and study.others[name].state == "complete"


def search(
    plan: StudyPlan,
    out: str | Path,
    *,
    more: int = 0,
    force: bool = False,
    executor: Literal["local", "ray"] = "local",
    on_change: Callable[[Search], None] = lambda search: None,
) -> dict[str, Any]:
    """Run a study in `out`, or go on with it; a finished one is only read.

    Args:
        more: so many trials beside those of a finished study.
        force: begin anew where `out` holds something else; that goes when the new study is
            complete.
        executor: measure in this process, or by Ray actors (Ray must be running).

    Returns:
        the content of `sweep.json`.

    Raises:
        InputError: `out` holds something else or an input; there is nothing to add to; no trial
            could be measured.
    """
    out = Path(out).absolute()
    refuse_inputs(out, plan.inputs, "sweep")
    if more and not (out / JOURNAL_FILE).is_file():
        raise InputError(f"--continue: {out} holds no study")
    folder = _folder(out, force=force)
    with lock(folder):
        study = _opened(folder, plan.key, force=force)
        finished = _finished(folder, study)
        if more:
            _want_more(plan, study, more, is_finished=finished is not None)
        elif finished is not None:
            return finished
        elif not study.wanted:
            study.want(plan.num_trials)
        result = _run(plan, study, folder, executor, on_change)
        write_atomically(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        if folder != out:
            shutil.rmtree(out)
            folder.rename(out)
    return result


def _folder(out: Path, *, force: bool) -> Path:
    """Where a study is: `out`, or beside it as long as something else is to be replaced there."""
    if out.is_dir() and any(out.iterdir()):
        if force:
            out = partial_path(out)
        elif not (out / JOURNAL_FILE).is_file():
            raise InputError(
                f"{out}: exists already; choose another output, or --force to replace it"
            )
    make_folder(out)
    return out


def _opened(folder: Path, key: str, *, force: bool) -> Study:
    """The study in a folder; with `force`, another one makes room."""
    try:
        return Study(folder, key)
    except InputError:
        if not force:
            raise
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return Study(folder, key)


def _finished(folder: Path, study: Study) -> dict[str, Any] | None:
    """The result of a study that has all its trials."""
    path = folder / RESULT_FILE
    result = json.loads(path.read_text()) if path.is_file() else None
    return result if result is not None and result["wanted"] == study.wanted else None


def _want_more(plan: StudyPlan, study: Study, more: int, *, is_finished: bool) -> None:
    if not is_finished:
        done = sum(trial.state != "running" for trial in study.trials.values())
        raise InputError(
            f"--continue: the study is not finished: {done} of {study.wanted or plan.num_trials} "
            "trials; run it without --continue first"
        )
    if plan.config.sampler.name == "grid":
        raise InputError("--continue: has no effect with grid: all its points are measured")
    study.want(len(study.trials) + more)


def _run(
    plan: StudyPlan,
    study: Study,
    folder: Path,
    executor: Literal["local", "ray"],
    on_change: Callable[[Search], None],
) -> dict[str, Any]:
    """Search, choose, write the winner, and measure it on test."""
    with closing(_pool(plan, plan.evaluation, executor)) as pool:
        goals = Search(plan, study, pool, on_change).run()
    if not study.complete:
        reasons = [trial.reason for trial in study.trials.values() if trial.reason]
        raise InputError(f"no trial could be measured: {reasons[0] if reasons else 'none began'}")
    best = choose(plan.config, study, goals)
    if best is not None:
        chosen = plan.candidate(study.trials[best].point)
        merged = plan_merge(chosen)
        is_there = (folder / BEST).exists() and not is_finished(merged, folder / BEST)
        merge_planned(merged, folder / BEST, force=is_there)
        if plan.test is not None:
            models = {f"{OF_TEST}{name}": each for name, each in plan.others.items()}
            models[f"{OF_TEST}{best}"] = chosen
            with closing(_pool(plan, plan.test, executor)) as pool:
                Search(plan, study, pool, on_change).measure(models)
        _write_merge(folder, chosen, plan.config.choose_on == "test")
    measured = any(_is_done(study, name) for name in plan.others)
    series = series_of_study(plan, study)[0] if measured else {}
    result = result_of(plan, study, goals, best, series)
    write_tables(folder, result)
    return result


def _write_merge(folder: Path, chosen: MergeConfig, on_test: bool) -> None:
    """The winner's config, which `poise merge` takes."""
    import yaml

    mark = "# chosen on the test split\n" if on_test else ""
    values = chosen.model_dump(mode="json", exclude_unset=True)
    write_atomically(folder / MERGE_FILE, mark + yaml.safe_dump(values, sort_keys=False))


def _pool(plan: StudyPlan, evaluation: Any, executor: Literal["local", "ray"]) -> Pool:
    arguments = {"offline": is_offline(), "num_threads": _num_threads()}
    if executor == "local":
        return LocalPool(evaluation, **arguments)
    most = plan.config.max_concurrent_trials
    return MeasurerPool(
        [evaluation],
        {**arguments, "directory": str(Path.cwd())},
        evaluation.engine,
        _AUTO if most == "auto" else most,
    )


def _num_threads() -> int:
    """The user's OMP_NUM_THREADS, or one: more engines at once are the better use of cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdigit() and int(first) else 1
