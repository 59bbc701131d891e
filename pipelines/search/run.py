"""Run a study: measure candidates, keep what is known, choose, write the winner.

A killed run goes on where it was: what is finished is in the journal, what was started is measured
again at the same point, and samplers depend on the results alone.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pipelines.commit import lock, make_folder, partial_path, write_atomically
from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig
from pipelines.hub.offline import is_offline
from pipelines.merge import MergeConfig, merge_planned, plan_merge
from pipelines.merge.run import is_finished, refuse_inputs
from pipelines.search.driving import Pool, Search, is_done, series_of_study
from pipelines.search.journal import JOURNAL_FILE
from pipelines.search.mirror import Mirror
from pipelines.search.plan import StudyPlan
from pipelines.search.pool import LocalPool, MeasurerPool
from pipelines.search.results import OF_TEST, RESULT_FILE, choose, result_of, write_tables
from pipelines.search.study import Study
from pipelines.search.trainings import (
    LARGEST_GROUP,
    TrainingPool,
    as_it_is,
    check_workers,
    publish,
)

SCORERS = "scorers"  # the folder of what scorers keep, such as verdicts
BEST, MERGE_FILE, ALIGN_FILE = "best", "merge.yaml", "align.yaml"
_AUTO = 1 << 16  # workers; the cluster's room is the bound


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
        executor: measure in this process, or by Ray actors. Ray must be running for these, and for
            trainings.

    Returns:
        the content of `sweep.json`.

    Raises:
        InputError: `out` holds something else or an input; there is nothing to add to; a training
            can never have its workers; no trial could be measured.
    """
    out = Path(out).absolute()
    refuse_inputs(out, plan.inputs, "sweep")
    if more and not (out / JOURNAL_FILE).is_file():
        raise InputError(f"--continue: {out} holds no study")
    if plan.trains and (more or not (out / RESULT_FILE).is_file()):
        check_workers(plan.subject.trainings)
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
        result = _run(plan, study, folder, out.name, executor, on_change)
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
    name: str,
    executor: Literal["local", "ray"],
    on_change: Callable[[Search], None],
) -> dict[str, Any]:
    """Search, choose, write the winner, and measure it on test."""
    url = plan.config.optuna_storage
    mirror = None if url is None else Mirror(plan, url, name)

    def changed(search: Search) -> None:
        if mirror is not None and search.goals is not None:
            mirror.update(study, search.goals)
        on_change(search)

    with closing(_pool(plan, plan.evaluation, executor, folder)) as pool:
        goals = Search(plan, study, pool, changed, folder).run()
        if mirror is not None:  # what an earlier run had finished
            mirror.update(study, goals)
    if not study.complete:
        reasons = [trial.reason for trial in study.trials.values() if trial.reason]
        raise InputError(f"no trial could be measured: {reasons[0] if reasons else 'none began'}")
    best = choose(plan.config, study, goals)
    if best is not None:
        chosen = _write_best(plan, study, best, folder)
        if plan.test is not None:
            models = {f"{OF_TEST}{name}": each for name, each in plan.others.items()}
            models[f"{OF_TEST}{best}"] = chosen
            with closing(_pool(plan, plan.test, executor, folder)) as pool:
                Search(plan, study, pool, on_change, folder).measure(models)
    measured = any(is_done(study, name) for name in plan.others)
    series = series_of_study(plan, study)[0] if measured else {}
    result = result_of(plan, study, goals, best, series)
    write_tables(folder, result)
    return result


def _write_best(plan: StudyPlan, study: Study, number: int, folder: Path) -> MergeConfig:
    """Write the winner and its config; returns it as a merge.

    Args:
        folder: of the study.
    """
    place, on_test = folder / BEST, plan.config.choose_on == "test"
    point = study.trials[number].point
    if plan.trains:
        training = plan.training(number, point, folder, study)
        publish(training.out, place)
        _write_config(folder / ALIGN_FILE, training.config, on_test)
        return as_it_is(training.out)
    chosen = plan.candidate(point)
    merged = plan_merge(chosen)
    is_there = place.exists() and not is_finished(merged, place)
    merge_planned(merged, place, force=is_there)
    _write_config(folder / MERGE_FILE, chosen, on_test)
    return chosen


def _write_config(path: Path, config: Config, on_test: bool) -> None:
    """The winner's config, which `poise merge` or `poise align` takes."""
    import yaml

    mark = "# chosen on the test split\n" if on_test else ""
    values = config.model_dump(mode="json", exclude_unset=True)
    write_atomically(path, mark + yaml.safe_dump(values, sort_keys=False))


def _pool(
    plan: StudyPlan, evaluation: EvaluateConfig, executor: Literal["local", "ray"], folder: Path
) -> Pool:
    """What measures candidates, after it has trained them if that is what they are."""
    measurers = _measurers(plan, evaluation, executor, folder)
    if not plan.trains:
        return measurers
    assert isinstance(plan.config.max_concurrent_trials, int)
    foreseen = plan.config.sampler.name in ("grid", "random") and plan.config.stopping is None
    size = max(plan.config.max_concurrent_trials, LARGEST_GROUP if foreseen else 1)
    return TrainingPool(measurers, size)


def _measurers(
    plan: StudyPlan, evaluation: EvaluateConfig, executor: Literal["local", "ray"], folder: Path
) -> LocalPool | MeasurerPool:
    arguments: dict[str, Any] = {
        "offline": is_offline(),
        "scores": str(folder / SCORERS),
        "num_threads": _num_threads(),
        "keeps_models": not plan.trains,
    }
    if executor == "local" or (plan.trains and not _has_gpus()):
        return LocalPool(evaluation, **arguments)
    most = 1 if plan.trains else plan.config.max_concurrent_trials
    return MeasurerPool(
        [evaluation],
        {**arguments, "directory": str(Path.cwd())},
        evaluation.engine,
        _AUTO if most == "auto" else most,
    )


def _has_gpus() -> bool:
    import ray

    return bool(ray.cluster_resources().get("GPU", 0))


def _num_threads() -> int:
    """The user's OMP_NUM_THREADS, or one: more engines at once are the better use of cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdigit() and int(first) else 1
