"""Driving a study: points are chosen, candidates given to idle workers, results kept."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import InputError
from pipelines.merge import MergeConfig
from pipelines.search.goals import Goals, series_of_metrics
from pipelines.search.measurement import Measurement
from pipelines.search.plan import StudyPlan
from pipelines.search.pool import Failed
from pipelines.search.racing import Race
from pipelines.search.results import front
from pipelines.search.study import Study
from pipelines.search.trainings import Training, keep_models


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
        folder: of the study, where trainings write their models.

    Attributes:
        goals: None until the models beside the candidates are measured.
        running: what each worker measures: a trial's number or a name.
    """

    def __init__(
        self,
        plan: StudyPlan,
        study: Study,
        pool: Pool,
        on_change: Callable[["Search"], None],
        folder: Path,
    ) -> None:
        self.plan, self.study, self._pool, self._on_change = plan, study, pool, on_change
        self._folder = folder
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

    def _candidate(self, number: int | str) -> MergeConfig | Training:
        assert isinstance(number, int)
        point = self.study.trials[number].point
        if self.plan.trains:
            return self.plan.training(number, point, self._folder, self.study)
        return self.plan.candidate(point)

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
        self, jobs: Iterator[int | str], candidate: Callable[[int | str], MergeConfig | Training]
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
            self._keep_models()
            self._on_change(self)

    def _keep_models(self) -> None:
        """Remove the trained models that are off the front."""
        if self.plan.trains and self.goals is not None:
            wanted = [*self.study.unfinished, *front(self.study, self.goals)]
            keep_models(self._folder, wanted, len(self.study.trials))

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
    done = {name: study.others[name] for name in plan.others if is_done(study, name)}
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
    name = next((name for name in plan.others if is_done(study, name)), None)
    if name is None:
        reasons = [study.others[name].reason for name in plan.others]
        raise InputError(f"racing: no reference or baseline could be measured: {reasons[0]}")
    scores = study.scores(name)
    series = series_of_metrics(study.others[name].values, scores, plan.tasks, plan.groups)
    task_of = {s: max((t for t in plan.tasks if s.startswith(f"{t}.")), key=len) for s in scores}
    return series, {s: (task_of[s], len(of)) for s, of in scores.items()}


def _is_open(study: Study, name: str) -> bool:
    return name not in study.others or study.others[name].state == "running"


def is_done(study: Study, name: str) -> bool:
    return name in study.others and study.others[name].state == "complete"
