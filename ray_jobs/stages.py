"""The kinds of stages of `poise pipeline`: each is one line in `KINDS`."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field

from pipelines.config import Config
from pipelines.engines import EngineConfig
from pipelines.evaluate import EvaluateConfig, evaluate_planned, plan_evaluation
from pipelines.evaluate.places import open_place
from pipelines.evaluate.store import RESULT_FILE, Store
from pipelines.expo import ExpoConfig, expo, finished, plan_expo
from pipelines.expo.run import EXPO_FILE
from pipelines.fingerprint import fingerprint_directory
from pipelines.merge import MergeConfig, merge_planned, plan_merge, record_of
from pipelines.merge.config import read_merge
from pipelines.merge.run import ExecutorName, is_finished
from pipelines.pipeline.plan import Job, Kind
from pipelines.pipeline.run import DRIVER, Resources
from pipelines.report import Settings
from pipelines.search import StudyConfig, plan_study, search
from pipelines.search.results import RESULT_FILE as SWEEP_FILE
from pipelines.storage import is_address
from pipelines.tiny_world import SIZES, build_world
from pipelines.train import AlignConfig, align_in_turn, check_inputs, is_aligned
from pipelines.train.workers import resources_of
from ray_jobs.command_stage import CommandConfig, run_command
from ray_jobs.demo_results import ResultsConfig, write_results
from ray_jobs.merge import runs_on_ray
from ray_jobs.report import run_report


def _align(jobs: Sequence[Job]) -> None:
    align_in_turn([(job.config, job.out) for job in jobs], force=jobs[0].force)


def _same_workers(config: AlignConfig) -> tuple[int, int]:
    return config.num_workers, config.max_failures


def _merge(jobs: Sequence[Job]) -> None:
    [job] = jobs
    plan = plan_merge(job.config)
    for notice in plan.notices():
        print(f"  {job.name}: {notice}", file=sys.stderr)
    executor: ExecutorName = "ray" if runs_on_ray(job.config) else "local"
    merge_planned(plan, job.out, force=job.force, executor=executor)


def _is_merged(config: MergeConfig, out: str) -> bool:
    if record_of(out) is None:
        return False
    plan = plan_merge(config)
    if is_address(out):
        return (record_of(out) or {}).get("fingerprint") == plan.key
    return is_finished(plan, Path(out))


def _need_of_merge(config: MergeConfig, cluster: Resources) -> Resources:
    if runs_on_ray(config):
        gpus = min(config.num_workers, cluster.get("GPU", 0.0)) if config.device == "cuda" else 0.0
        return {"CPU": 0.9 * config.num_workers} | ({"GPU": gpus} if gpus else {})
    return {DRIVER: 1.0, "CPU": float(config.num_workers)}


def _models_of_merge(config: MergeConfig) -> Iterator[tuple[str, Path]]:
    for each in (config, *config.merges.values()):
        for model in filter(None, [each.base_model, *each.merged_models]):
            if model not in config.merges:
                yield "models", Path(model)


def _outs_of_merges(values: Mapping[str, Any]) -> Iterator[str]:
    merges = values.get("merges")
    for each in merges.values() if isinstance(merges, dict) else ():
        if isinstance(each, dict) and isinstance(each.get("out"), str):
            yield each["out"]


def _evaluate(jobs: Sequence[Job]) -> None:
    plans = [plan_evaluation(job.config, job.out) for job in jobs]
    for job, summary in zip(jobs, evaluate_planned(plans), strict=True):
        for failed in summary["failed"]:
            where = f"{failed['model']} on {failed['task']}"
            raise RuntimeError(f"{job.name}: {where} could not be measured: {failed['reason']}")


def _is_evaluated(config: EvaluateConfig, out: str) -> bool:
    place = open_place(out)
    if RESULT_FILE not in place.names():
        return False
    summary, plan = json.loads(place.read(RESULT_FILE)), plan_evaluation(config, out)
    if summary["fingerprint"] != plan.fingerprint or summary["failed"]:
        return False
    store = Store(place)
    return not any(map(store.missing, (*plan.cells.values(), *plan.answers.values())))


def _same_engine(config: EvaluateConfig) -> str:
    return json.dumps([config.engine.model_dump(mode="json"), config.num_workers])


def _need_of_evaluation(config: EvaluateConfig, cluster: Resources) -> Resources:
    bundle = config.engine.need(cluster).bundle
    return {kind: amount * config.num_workers for kind, amount in bundle.items()}


def _sweep(jobs: Sequence[Job]) -> None:
    [job] = jobs
    executor: ExecutorName = "ray" if _sweeps_on_ray(job.config) else "local"
    search(plan_study(job.config), job.out, force=job.force, executor=executor)


def _sweeps_on_ray(config: StudyConfig) -> bool:
    """As `poise sweep`: trainings, several candidates at once, and on a cluster."""
    is_alone = config.align is None and config.max_concurrent_trials == 1
    return not is_alone or bool(os.environ.get("RAY_ADDRESS"))


def _is_swept(config: StudyConfig, out: str) -> bool:
    path = Path(out) / SWEEP_FILE
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text())["fingerprint"] == plan_study(config).key)


def _need_of_sweep(config: StudyConfig, cluster: Resources) -> Resources:
    if not _sweeps_on_ray(config):
        return _here(config, cluster)
    if config.align is not None or config.max_concurrent_trials == "auto":
        return dict(cluster)
    engine = EngineConfig(**config.evaluation.get("engine", {}))
    bundle = engine.need(cluster).bundle
    return {kind: amount * config.max_concurrent_trials for kind, amount in bundle.items()}


def _expo(jobs: Sequence[Job]) -> None:
    [job] = jobs
    expo(plan_expo(job.config), job.out, force=job.force)


def _is_chosen(config: ExpoConfig, out: str) -> bool:
    return (Path(out) / EXPO_FILE).is_file() and finished(plan_expo(config), Path(out)) is not None


class ReportConfig(Config):
    """What `poise report` takes beside its output."""

    runs: list[Path] = Field(min_length=1, description="of `poise demo`, or of `poise evaluate`")
    samples: int = Field(50, ge=0)
    axes: tuple[str, str] | None = Field(None, description="columns that are shown at first")
    lower: list[str] = Field([], description="columns or metrics of which less is better")
    seed: int = 0


def _report(jobs: Sequence[Job]) -> None:
    [job] = jobs
    config = job.config
    settings = Settings(
        samples=config.samples, seed=config.seed, lower=tuple(config.lower), axes=config.axes
    )
    run_report(config.runs, Path(job.out), force=True, settings=settings)


class WorldConfig(Config):
    """A tiny world, as `poise demo` begins with."""

    seed: int = 0
    size: str = Field("default", description="smoke, default or rich", pattern="|".join(SIZES))


def _world(jobs: Sequence[Job]) -> None:
    [job] = jobs
    build_world(job.out, job.config.seed, job.config.size, force=job.force)


def _is_world(config: WorldConfig, out: str) -> bool:
    """Whether `out` has the bytes of a new world of the seed, which takes seconds."""
    if not Path(out).is_dir():
        return False
    with TemporaryDirectory() as folder:
        new = build_world(Path(folder) / "world", config.seed, config.size)
        return fingerprint_directory(new) == fingerprint_directory(out)


def _command(jobs: Sequence[Job]) -> None:
    [job] = jobs
    run_command(job.config, Path(job.out), job.inputs, force=job.force)


def _results(jobs: Sequence[Job]) -> None:
    [job] = jobs
    write_results(job.config.run, Path(job.out), job.config.seed)


def _here(config: Any, cluster: Resources) -> Resources:
    """The need of work in this process."""
    return {DRIVER: 1.0}


def _on_ray(config: Any) -> bool:
    return True


# An entry says what its command has beside the defaults of `Kind`.
KINDS: dict[str, Kind] = {
    "align": Kind(
        config=AlignConfig,
        run=_align,
        stands=is_aligned,
        need=resources_of,
        group=_same_workers,
        check=check_inputs,
        on_ray=_on_ray,
    ),
    "merge": Kind(
        config=MergeConfig,
        run=_merge,
        stands=_is_merged,
        need=_need_of_merge,
        check=plan_merge,
        read=read_merge,
        reads=_models_of_merge,
        writes=_outs_of_merges,
        to_addresses=True,
        on_ray=runs_on_ray,
    ),
    "evaluate": Kind(
        config=EvaluateConfig,
        run=_evaluate,
        stands=_is_evaluated,
        need=_need_of_evaluation,
        group=_same_engine,
        to_addresses=True,
        on_ray=_on_ray,
    ),
    "sweep": Kind(
        config=StudyConfig,
        run=_sweep,
        stands=_is_swept,
        need=_need_of_sweep,
        nested=("merge", "align"),
        on_ray=_sweeps_on_ray,
    ),
    "expo": Kind(config=ExpoConfig, run=_expo, stands=_is_chosen, need=_here, nested=("merge",)),
    "report": Kind(config=ReportConfig, run=_report, need=_here, always_replaces=True),
    "command": Kind(
        config=CommandConfig,
        run=_command,
        need=lambda config, cluster: {"CPU": config.cpus},
        makes_output=lambda config: config.makes_output,
    ),
    "world": Kind(config=WorldConfig, run=_world, stands=_is_world, need=_here),
    "results": Kind(config=ResultsConfig, run=_results, need=_here, always_replaces=True),
}
