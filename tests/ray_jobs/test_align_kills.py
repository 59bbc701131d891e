"""Alignments of which everything is killed that can be: workers, the driver, Ray, a node.

What is killed is a process with a Ray of its own. A start that nobody disturbs is in this process,
on the session's Ray.

Oracle: the bytes of a run that nobody disturbed.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipelines.config import load_config
from pipelines.train import AlignConfig
from ray_jobs.session import worker_environment
from tests.pipelines.train.processes import run_workers, run_workers_in_turn
from tests.pipelines.train.training_files import preference_rows
from tests.ray_jobs.alignments import (
    Started,
    align_together,
    command,
    command_in_turn,
    write_run,
)
from tests.ray_jobs.command_line import poise

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
OBJECTIVES = {
    "single": "kto",
    "ddp": "sft",
    "fsdp2": "ipo",
    "zero1": "hinge",
    "zero2": "simpo",
    "zero3": "orpo",
}
DEATHS = {
    "single": "driver",  # alone, whose workers may outlive it
    "ddp": "worker",  # one, which Ray replaces
    "fsdp2": "driver",
    "zero1": "worker",
    "zero2": "everything",
    "zero3": "node",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A short run."""
    return write_run(tmp_path)


def undisturbed(config: Path) -> bytes:
    """The weights of a run of plain processes that nobody touched."""
    plain = run_workers(load_config(config, AlignConfig), config.parent / "plain" / "run")
    return (plain / "model" / WEIGHTS).read_bytes()


def assert_out_is(expected: bytes, config: Path) -> None:
    """`out` has these weights, and nothing is left beside it."""
    assert (config.parent / "out" / WEIGHTS).read_bytes() == expected
    assert not (config.parent / ".out.partial").exists()


def rows_for(objective: str) -> list[dict[str, object]]:
    """Rows of the kind that the objective takes."""
    pairs = preference_rows(40)
    if objective == "sft":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    if objective == "kto":
        return [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
    return pairs


@dataclass(frozen=True)
class KilledRuns:
    """The config of each strategy's run that was killed and then finished, and the process that had
    lost its node.
    """

    configs: dict[str, Path]
    last: Started


def kill(command: list[str], configs: dict[str, Path], project_root: Path) -> Started:
    """Let each run die its death in its middle, where the command is the one to start and to start
    again. Returns the last process that was killed.
    """
    run, draw = Started(command, project_root), random.Random(0)
    for number, (strategy, config) in enumerate(configs.items(), 1):
        run.wait_for_step(config, draw.randrange(11, 60))
        if DEATHS[strategy] == "worker":
            run.kill_worker()
            continue
        run.kill(DEATHS[strategy])
        assert not (config.parent / "out").exists()
        if number < len(configs):
            run = Started(command, project_root)
    return run


@pytest.fixture(scope="module")
def killed_runs(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, project_root: Path
) -> KilledRuns:
    """Killed in many starts, and finished by one that nobody disturbed."""
    configs: dict[str, Path] = {}
    for strategy, objective in OBJECTIVES.items():
        configs[strategy] = write_run(
            tmp_path_factory.mktemp(strategy),
            rows_for(objective),
            objective={"name": objective},
            strategy=strategy,
            num_workers=1 if strategy == "single" else 2,
            num_steps=200 if strategy == "zero3" else 100,  # a node's death takes a while
            checkpoint_every=10,
        )
    pairs = {name: path for name, path in configs.items() if name != "single"}
    kill(command(configs["single"]), {"single": configs["single"]}, project_root)
    run = kill(command_in_turn(list(pairs.values())), pairs, project_root)
    align_together([configs["single"]])
    align_together(list(pairs.values()))
    return KilledRuns(configs, run)


@pytest.fixture(scope="module")
def undisturbed_runs(killed_runs: KilledRuns) -> dict[str, bytes]:
    """The weights of each strategy's run of plain processes that nobody touched."""
    configs, runs = killed_runs.configs, dict[str, Path]()
    pairs: dict[Path, AlignConfig] = {}
    for strategy, path in configs.items():
        runs[strategy] = path.parent / "plain" / "run"
        config = load_config(path, AlignConfig)
        if strategy == "single":
            run_workers(config, runs[strategy])
        else:
            pairs[runs[strategy]] = config
    run_workers_in_turn(pairs)
    return {name: (run / "model" / WEIGHTS).read_bytes() for name, run in runs.items()}


@pytest.mark.timeout(3000)  # of the first one, which kills and finishes all
@pytest.mark.parametrize("strategy", OBJECTIVES)
def test_a_killed_run_ends_with_the_same_bytes(
    strategy: str, killed_runs: KilledRuns, undisturbed_runs: dict[str, bytes]
) -> None:
    """The last start ends as a run that nobody touched."""
    assert_out_is(undisturbed_runs[strategy], killed_runs.configs[strategy])


@pytest.mark.parametrize("strategy", OBJECTIVES)
def test_every_strategy_and_objective(strategy: str, killed_runs: KilledRuns) -> None:
    """The model moves and loads."""
    folder = killed_runs.configs[strategy].parent
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / name).state_dict()
        for name in ("model", "out")
    )
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


def test_the_death_of_the_node_is_told_in_one_line(killed_runs: KilledRuns) -> None:
    """Ray's own process of the machine was killed: the driver says so, and does not wait for ever.
    That the next start ends as a run that nobody touched is in the tests above.
    """
    last = killed_runs.last
    assert last.process.returncode == 1
    assert f"poise: Ray's own process raylet (pid {last.raylet}) has died" in last.said


def test_a_lost_node_of_a_cluster_is_replaced(config: Path, project_root: Path) -> None:
    """Two nodes with a worker each; one dies with all that it runs, another comes. The same command
    goes on by itself, and ends with the bytes of a run on one machine.
    """
    from ray.cluster_utils import Cluster

    values = yaml.safe_load(config.read_text()) | {"num_steps": 400, "checkpoint_every": 20}
    config.write_text(yaml.safe_dump(values))
    environment = worker_environment() | {"OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            node = cluster.add_node(num_cpus=1)
            run = Started(command(config), project_root, RAY_ADDRESS=cluster.address)
            run.wait_for_step(config, 30)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            run.end()
        finally:
            cluster.shutdown()
    assert run.process.returncode == 0, run.said
    assert_out_is(undisturbed(config), config)


@pytest.fixture
def align_here(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """The command in this process, for a start that nobody disturbs."""
    return lambda config: poise(monkeypatch, *command(config)[3:])


def test_a_run_survives_kills_at_any_moment(
    config: Path, project_root: Path, align_here: Callable[[Path], int]
) -> None:
    """While it starts, tokenises, scores the reference, trains, writes or exports: wherever so many
    seconds happen to fall, the last start ends with the bytes of the first, which nobody disturbed.
    """
    folder, draw = config.parent, random.Random(0)
    begin = time.monotonic()
    subprocess.run(command(config), cwd=project_root, check=True, timeout=600)
    usual = time.monotonic() - begin
    expected = (folder / "out" / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / ".poise-cache")
    for _ in range(4):
        run = subprocess.Popen(command(config), cwd=project_root, start_new_session=True)
        try:
            run.wait(timeout=draw.uniform(0.2, 1.0) * usual)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert align_here(config) == 0
    assert_out_is(expected, config)
