"""Try merges with Ray Tune and evaluate each; every finished trial is kept."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import DigestMemory, ModelDigest
from pipelines.commit import staged_directory, write_atomically
from pipelines.config import apply_overrides, load_yaml
from pipelines.engines import EngineConfig
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate_planned, percentages, plan_evaluation
from pipelines.evaluate.groups import Group, Measure, resolve_groups
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.opened import open_all
from pipelines.evaluate.tasks import DIMENSIONS, load_rows, load_tasks
from pipelines.fingerprint import fingerprint, fingerprint_file, fingerprint_work
from pipelines.merge import load_merge_config, merge, plan_merge
from pipelines.merge.pins import Pins, pins_of, renamed, with_pins
from pipelines.provenance import read_record
from pipelines.sweep.config import Range, SweepConfig

RESULT_FILE = "sweep.json"
CANDIDATE = "candidate"
_CHOSEN = "metric:"  # stands for what decides; no group is named so


def sweep(config: SweepConfig, out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Try the search's values; write `out/sweep.json`, and `out/merge.yaml` with the best values.

    Finished trials of an interrupted run are not repeated. A finished `out` with the same config is
    only read.

    Returns:
        the content of `sweep.json`: all trials with their parameters and metrics, and the best one.

    Raises:
        InputError: a config, model or task that cannot be used; or `out` holds another result and
            `force` is false.
    """
    return sweep_planned(plan_sweep(config), out, force=force)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """A fully checked sweep; `fingerprint` is of config and inputs, and `pins` has the commits of
    the hub's models.
    """

    config: SweepConfig
    fingerprint: str
    pins: Pins


def sweep_planned(plan: SweepPlan, out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """As `sweep`, for a plan."""
    out, config, key = Path(out), plan.config, plan.fingerprint
    if (out / RESULT_FILE).is_file() and not force:
        finished = json.loads((out / RESULT_FILE).read_text())
        if finished["fingerprint"] == key:
            return finished
    with staged_directory(out, force=force) as folder:
        trials = _tune(plan, folder.absolute())
        sign = 1 if config.mode == "max" else -1
        best = max(trials, key=lambda trial: sign * trial["value"])  # the first one in a tie
        result = {
            "schema": 1,
            "fingerprint": key,
            "split": config.split,
            **({"chosen_on_test": True} if config.choose_on == "test" else {}),
            "metric": config.metric,
            "mode": config.mode,
            "best": best,
            "trials": trials,
        }
        chosen = apply_overrides(load_yaml(config.merge), _overrides(best["parameters"]))
        chosen = renamed(chosen, plan.pins) if plan.pins else chosen
        mark = "# chosen on the test split\n" if config.choose_on == "test" else ""
        write_atomically(folder / "merge.yaml", mark + yaml.safe_dump(chosen, sort_keys=False))
        write_atomically(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        for scratch in ("tune", "trials"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
    return result


def _overrides(parameters: dict[str, Any]) -> list[str]:
    """A trial's values as `key=value` overrides of the merge's config."""
    return [f"{key}={json.dumps(value)}" for key, value in parameters.items()]


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Find every mistake before the first trial: the merge's config is checked with each value of
    each field, together with the first values of the other fields.

    Raises:
        InputError: the first mistake.
    """
    if isinstance(config.tasks, Path):
        files, rows = _old_tasks(config, config.tasks)
    else:
        files, rows = [], _listed_tasks(config)
    tried = {key: _ends(values) for key, values in config.search.items()}
    first = {key: values[0] for key, values in tried.items()}
    merge_config = load_merge_config(config.merge, _overrides(first))
    pins = pins_of(merge_config)
    for key, values in tried.items():
        for value in values[1:]:
            other = load_merge_config(config.merge, _overrides(first | {key: value}))
            pins = pins_of(other, pins)
    merge_config = with_pins(merge_config, pins)
    inputs = plan_merge(merge_config).identities
    files = [fingerprint_file(config.merge), *files]
    left_out = {"max_concurrent_trials", "cpus_per_trial", "choose_on"}
    if config.groups is None:  # which finished sweeps of earlier versions do not have
        left_out.add("groups")
    settings = config.model_dump(mode="json", exclude=left_out)
    made = merge_config.model_dump(mode="json")
    # A sweep's numbers come from merges and evaluations.
    key = fingerprint_work([settings, files, made, inputs, rows], "sweep", "merge", "evaluate")
    return SweepPlan(config, key, pins)


def _old_tasks(config: SweepConfig, path: Path) -> tuple[list[str], dict[str, str]]:
    """The fingerprints of a `tasks.yaml` and of the rows of its tasks; checks metric and names."""
    tasks = load_tasks(path)
    allowed = ["average", *DIMENSIONS, *(task.name for task in tasks)]
    if config.metric not in allowed:
        raise InputError(f"metric: found {config.metric!r}; allowed: {', '.join(allowed)}")
    for name in config.only or ():
        if name not in allowed[1 + len(DIMENSIONS) :]:
            raise InputError(f"only: found {name!r}; allowed: names of tasks in {path}")
    rows = {}
    for task in tasks:
        load_rows(task, config.split)
        rows[task.name] = fingerprint_file(task.files[config.split])
    return [fingerprint_file(path)], rows


def _listed_tasks(config: SweepConfig) -> dict[str, str]:
    """The fingerprints of the tasks of a list; checks that the metric is one number."""
    tasks, groups = open_all(_evaluation(config, Path(CANDIDATE)))
    metrics = {each.name: each.metric_names for each in tasks if isinstance(each, LibraryTask)}
    chosen = Group(members=[config.metric])
    try:
        resolve_groups({**groups, _CHOSEN: chosen}, metrics)
    except InputError:
        resolve_groups(groups, metrics)
        numbers = [f"{task}.{metric}" for task, names in metrics.items() for metric in names]
        allowed = ", ".join([*groups, *numbers])
        raise InputError(f"metric: found {config.metric!r}; allowed: {allowed}") from None
    return {each.name: each.fingerprint for each in tasks}


def _ends(values: list[Any] | Range) -> list[Any]:
    """The values of a field's search to check: all values of a list, both ends of a range."""
    if isinstance(values, list):
        return values
    bounds = values.uniform or values.log_uniform
    assert bounds is not None
    return list(bounds)


def _tune(plan: SweepPlan, folder: Path) -> list[dict[str, Any]]:
    """Run the trials under Ray Tune; results in the order of the search space."""
    import ray
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    config, key = plan.config, plan.fingerprint
    space = {name: _space(values) for name, values in config.search.items()}
    trainable = tune.with_resources(
        tune.with_parameters(
            _trial,
            config=config.model_dump_json(),
            folder=str(folder),
            key=key,
            pins=plan.pins,
            directory=str(Path.cwd()),
        ),
        trial_need(config, ray.cluster_resources()),
    )
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=config.num_samples or 1,
            search_alg=BasicVariantGenerator(random_state=config.seed),
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), name="sweep", verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} trials failed; the first: {results.errors[0]}")
    trials = []
    for number in range(len(results)):
        reported = results[number].metrics
        assert reported is not None  # a trial without a report is in results.errors
        trials.append(reported["trial"])
    return trials


def trial_need(config: SweepConfig, cluster: dict[str, float]) -> dict[str, float]:
    """The resources of one trial: the config's CPUs, and what its engine needs beside them.

    Args:
        cluster: resources by name.
    """
    return EngineConfig().need(cluster).bundle | {"CPU": config.cpus_per_trial}


def _space(values: list[Any] | Range) -> Any:
    """One field's search for Ray Tune."""
    from ray import tune

    if isinstance(values, list):
        return tune.grid_search(values)
    if values.uniform is not None:
        return tune.uniform(*values.uniform)
    assert values.log_uniform is not None
    return tune.loguniform(*values.log_uniform)


def _trial(
    parameters: dict[str, Any], *, config: str, folder: str, key: str, pins: Pins, directory: str
) -> None:
    """Merge with `parameters`, evaluate, keep the numbers and delete the checkpoint.

    Ray Tune starts it in another folder; the configs' relative paths are relative to `directory`.
    """
    import torch
    from ray import tune

    torch.set_num_threads(1)
    if Path(directory).is_dir():
        os.chdir(directory)
    settings = SweepConfig.model_validate_json(config)
    name = fingerprint([key, parameters])
    record = Path(folder) / "trials" / f"{name}.json"
    if not record.is_file():
        scratch = Path(folder) / "trials" / name
        shutil.rmtree(scratch, ignore_errors=True)
        merged = with_pins(load_merge_config(settings.merge, _overrides(parameters)), pins)
        model = Path(merge(merged, scratch / CANDIDATE, executor="local"))
        metrics, value = _measure(settings, model)
        trial = {"parameters": parameters, "value": value, "metrics": metrics}
        write_atomically(record, json.dumps(trial))
        shutil.rmtree(scratch)
    tune.report({"trial": json.loads(record.read_text())})


def _evaluation(config: SweepConfig, model: Path) -> EvaluateConfig:
    """What measures a model on the sweep's tasks and split."""
    own = {"split", "limit"}
    own |= {"only", "max_new_tokens"} if isinstance(config.tasks, Path) else {"groups"}
    return EvaluateConfig(
        models={CANDIDATE: model},
        tasks=config.tasks,
        engine=EngineConfig(batch_size=config.batch_size),
        **{field: getattr(config, field) for field in own},
    )


def _measure(config: SweepConfig, model: Path) -> tuple[dict[str, Any], float]:
    """The numbers of a new model on the sweep's tasks and split, and the one that decides."""
    evaluation = _evaluation(config, model)
    record, memory = read_record(model), DigestMemory()
    assert record is not None
    digest = ModelDigest(record["weights"], record["companions"])  # from the merge; not read again
    memory.remember(Checkpoint.open(model), digest)
    plan = plan_evaluation(evaluation, model.with_name("evaluation"), memory)
    [summary] = evaluate_planned([plan], executor="local")
    if summary["failed"]:
        failed = summary["failed"][0]
        raise InputError(f"task {failed['task']!r}: {failed['reason']}")
    if isinstance(config.tasks, Path):
        metrics = percentages(summary, CANDIDATE)
        return metrics, (metrics.get(config.metric) or metrics["tasks"][config.metric])["value"]
    entry = summary["models"][CANDIDATE]
    found: dict[str, Any] = {name: entry[name] for name in ("groups", "tasks")}
    return found, _number(config.metric, found)


def _number(metric: str, found: dict[str, Any]) -> float:
    """A group's value, or that of a task's metric."""
    if metric in found["groups"]:
        return float(found["groups"][metric]["value"])
    measured = {
        task: {name: Measure(number["value"]) for name, number in numbers.items()}
        for task, numbers in found["tasks"].items()
    }
    names = {task: list(numbers) for task, numbers in measured.items()}
    groups = resolve_groups({_CHOSEN: Group(members=[metric])}, names)
    value = groups.averages(measured)[_CHOSEN].value
    assert value is not None  # a failed task has ended the trial
    return value
