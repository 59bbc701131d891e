"""`poise align` from the command line: what is printed, exit statuses, and kills of everything.

A command that is killed is a process with a Ray of its own. A start that nobody disturbs is the
same command in this process, on the session's Ray.

Oracle: lines written by hand, and the bytes of a run that nobody disturbed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipelines.config import load_config
from pipelines.train import AlignConfig, align_in_turn
from ray_jobs.cli import main
from ray_jobs.session import worker_environment
from tests.pipelines.train.processes import run_workers
from tests.pipelines.train.training_files import align_config, preference_rows, write_rows
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model.safetensors"


def write_run(folder: Path, **fields: object) -> Path:
    """A run of two workers on a tiny model, with some fields set differently, as a file."""
    model = save_tiny_llama(folder / "model")
    data = write_rows(folder / "rows.jsonl", preference_rows(40))
    settings = {"strategy": "fsdp2", "num_workers": 2, "num_steps": 40, "checkpoint_every": 4}
    config = align_config(model, data, **(settings | fields))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A short run."""
    return write_run(tmp_path)


def command(*arguments: object) -> list[str]:
    """The command line of an alignment."""
    return [sys.executable, "-m", "ray_jobs.cli", "align", *map(str, arguments)]


def undisturbed(config: Path) -> bytes:
    """The weights of a run of plain processes that nobody touched."""
    plain = run_workers(load_config(config, AlignConfig), config.parent / "plain" / "run")
    return (plain / "model" / WEIGHTS).read_bytes()


def assert_out_is(expected: bytes, config: Path) -> None:
    """`out` has these weights, and nothing is left beside it."""
    assert (config.parent / "out" / WEIGHTS).read_bytes() == expected
    assert not (config.parent / ".out.partial").exists()


@pytest.fixture
def align_here(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """The command in this process, for a start that nobody disturbs."""

    def align(config: Path) -> None:
        out = config.parent / "out"
        monkeypatch.setattr(sys, "argv", ["poise", "align", str(config), "--out", str(out)])
        main()

    return align


def spoil_model(folder: Path, **values: object) -> None:
    """Other values in the model's config."""
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_INPUT: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no data": (
        lambda folder: (folder / "rows.jsonl").unlink(),
        [],
        "data: {folder}/rows.jsonl: no such file",
    ),
    "empty data": (
        lambda folder: write_rows(folder / "rows.jsonl", []),
        [],
        "data: {folder}/rows.jsonl: holds no rows",
    ),
    "other columns": (
        lambda folder: write_rows(folder / "rows.jsonl", [{"question": "a", "answer": "b"}]),
        [],
        "data: {folder}/rows.jsonl row 1: has no column 'chosen'; found: question, answer; needed: "
        "prompt, chosen, rejected (or chosen, rejected that begin with the prompt)",
    ),
    "too long": (
        lambda folder: write_rows(folder / "rows.jsonl", preference_rows(1)),
        ["max_length=4"],
        "data: {folder}/rows.jsonl row 1: found 13 tokens; allowed: max_length 4 (a response is "
        "never cut; too_long: cut_prompt or drop says what to do with such rows)",
    ),
    "no chat template": (
        lambda folder: (folder / "model" / "chat_template.jinja").unlink(),
        ["max_bad_share=0.5"],
        "data: {folder}/rows.jsonl row 1: holds messages, but the tokenizer has no chat template "
        "(40 of 40 rows are bad; allowed: a share of 0.5, max_bad_share)",
    ),
    "no model": (
        lambda folder: shutil.rmtree(folder / "model"),
        [],
        "model {folder}/model: no such directory",
    ),
    "another architecture": (
        lambda folder: spoil_model(folder, model_type="gpt2"),
        [],
        "model {folder}/model: has no tensor 'transformer.wte.weight', which its architecture "
        "needs",
    ),
    "another reference": (
        lambda folder: (
            shutil.copytree(folder / "model", folder / "other" / "model"),
            spoil_model(folder / "other", vocab_size=99),
        ),
        ["reference_model={folder}/other/model"],
        "reference_model: {folder}/other/model: found a vocabulary of 99 tokens; the model's has "
        "47",
    ),
    "batch": (
        lambda folder: None,
        ["global_batch_size=7"],
        "{folder}/config.yaml: global_batch_size: found 7; allowed: a multiple of num_workers (2)",
    ),
    "objective": (
        lambda folder: None,
        ["objective.name=ppo"],
        "{folder}/config.yaml: objective.name: found 'ppo'; allowed: 'sft', 'dpo', 'robust', "
        "'hinge', 'ipo', 'apo_zero', 'apo_down', 'bco_pair', 'simpo', 'orpo', "
        "'reward' or 'kto'",
    ),
    "field": (
        lambda folder: None,
        ["learning_rate=1"],
        "{folder}/config.yaml: learning_rate: unknown field; allowed: "
        + ", ".join(sorted(AlignConfig.model_fields)),
    ),
    "another run": (
        lambda folder: (
            (folder / ".out.partial").mkdir(),
            (folder / ".out.partial" / "run.json").write_text('{"fingerprint": "x"}'),
        ),
        [],
        "{folder}/.out.partial: holds an unfinished run of another config or other inputs; remove "
        "it, choose another output, or --force to begin anew",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_status_2_and_one_line(
    case: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file, the field, what was found, what is allowed; and nothing is written."""
    spoil, overrides, expected = BAD_INPUT[case]
    spoil(config.parent)
    overrides = [override.format(folder=config.parent) for override in overrides]
    before = sorted(config.parent.rglob("*"))
    monkeypatch.setattr("ray_jobs.align.ray_session", contextlib.nullcontext)
    monkeypatch.setattr("pipelines.train.run.check_cluster", lambda config: None)
    out = str(config.parent / "out")
    monkeypatch.setattr(sys, "argv", ["poise", "align", str(config), *overrides, "--out", out])
    with pytest.raises(SystemExit) as stop:
        main()
    found = capsys.readouterr()
    assert found.err == f"poise: {expected.format(folder=config.parent)}\n"
    assert stop.value.code == 2 and not found.out
    cache = config.parent / ".poise-cache"  # of tokens, which any later run may use
    after = sorted(config.parent.rglob("*"))
    assert [path for path in after if path != cache and cache not in path.parents] == before


class Started:
    """An alignment that is under way, in a session of its own, to be killed in parts or whole."""

    def __init__(self, config: Path, project_root: Path, **environment: str) -> None:
        self._lines = config.parent / ".out.partial" / "metrics.jsonl"
        self.process = subprocess.Popen(
            command(config, "--out", config.parent / "out"),
            cwd=project_root,
            env=os.environ | environment,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Return as soon as so many steps are done, if possible within the next one."""
        deadline = time.monotonic() + 240
        while not self._lines.is_file() or self._lines.read_bytes().count(b"\n") < step:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)

    def pid_of(self, name: str) -> int:
        """A process that Ray has started, by a part of its command line; any of several."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if name in " ".join(child.cmdline()):
                        return child.pid
            time.sleep(0.05)
        raise AssertionError(f"no process {name}")

    def end(self) -> str:
        """What it says on leaving by itself, or after a kill."""
        _, error = self.process.communicate(timeout=240)
        return error

    def kill_everything(self) -> None:
        """Driver, Ray and workers at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.end()


STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def kill_twice(config: Path, project_root: Path, draw: random.Random) -> None:
    """A worker is killed, which Ray replaces; then the driver alone, whose workers may outlive it;
    and in the second start everything.
    """
    run = Started(config, project_root)
    worker = run.pid_of("RayTrainWorker")
    run.wait_for_step(draw.randrange(1, 20))
    os.kill(worker, signal.SIGKILL)
    run.wait_for_step(draw.randrange(35, 60))
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    run = Started(config, project_root)
    run.wait_for_step(draw.randrange(65, 95))
    run.kill_everything()
    assert not (config.parent / "out").exists()


@pytest.fixture(scope="module")
def killed_runs(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, project_root: Path
) -> dict[str, Path]:
    """The config of each strategy's run that was killed, and then finished by a start that nobody
    disturbed. Those of two workers take turns on them in the last start.
    """
    configs: dict[str, Path] = {}
    groups: dict[int, list[tuple[AlignConfig, Path]]] = {1: [], 2: []}
    for strategy in STRATEGIES:
        num_workers = 1 if strategy == "single" else 2
        fields = {"strategy": strategy, "num_workers": num_workers, "num_steps": 100}
        path = write_run(tmp_path_factory.mktemp(strategy), **fields, checkpoint_every=10)
        kill_twice(path, project_root, random.Random(strategy))
        groups[num_workers].append((load_config(path, AlignConfig), path.parent / "out"))
        configs[strategy] = path
    for group in groups.values():
        align_in_turn(group)
    return configs


@pytest.mark.slow
@pytest.mark.timeout(3000)  # of the first one, which kills and finishes all
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_ends_with_the_same_bytes(strategy: str, killed_runs: dict[str, Path]) -> None:
    """The last start ends as a run that nobody touched."""
    config = killed_runs[strategy]
    assert_out_is(undisturbed(config), config)


@pytest.mark.slow
def test_the_death_of_the_node_is_told_in_one_line(
    config: Path, project_root: Path, align_here: Callable[[Path], None]
) -> None:
    """Ray's own process of the machine is killed: the driver says so, does not wait for ever, and
    the next start ends as a run that nobody touched.
    """
    values = yaml.safe_load(config.read_text()) | {"num_steps": 800, "checkpoint_every": 40}
    config.write_text(yaml.safe_dump(values))
    run = Started(config, project_root)
    raylet = run.pid_of("raylet/raylet")
    run.wait_for_step(9)
    os.kill(raylet, signal.SIGKILL)
    said = run.end()
    assert run.process.returncode == 1
    assert f"poise: Ray's own process raylet (pid {raylet}) has died" in said
    align_here(config)
    assert_out_is(undisturbed(config), config)


@pytest.mark.slow
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
            run = Started(config, project_root, RAY_ADDRESS=cluster.address)
            run.wait_for_step(30)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            said = run.end()
        finally:
            cluster.shutdown()
    assert run.process.returncode == 0, said
    assert_out_is(undisturbed(config), config)


@pytest.mark.slow
def test_a_run_survives_kills_at_any_moment(
    config: Path, project_root: Path, align_here: Callable[[Path], None]
) -> None:
    """While it starts, tokenises, scores the reference, trains, writes or exports: wherever so many
    seconds happen to fall, the last start ends with the bytes of the first, which nobody disturbed.
    """
    folder, draw = config.parent, random.Random(0)
    place = command(config, "--out", folder / "out")
    begin = time.monotonic()
    subprocess.run(place, cwd=project_root, check=True, timeout=600)
    usual = time.monotonic() - begin
    expected = (folder / "out" / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / ".poise-cache")
    for _ in range(4):
        run = subprocess.Popen(place, cwd=project_root, start_new_session=True)
        try:
            run.wait(timeout=draw.uniform(0.2, 1.0) * usual)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    align_here(config)
    assert_out_is(expected, config)


OBJECTIVES = {
    "single": "kto",
    "ddp": "sft",
    "fsdp2": "ipo",
    "zero1": "hinge",
    "zero2": "simpo",
    "zero3": "orpo",
}


def rows_for(objective: str) -> list[dict[str, object]]:
    """Rows of the kind that the objective takes."""
    pairs = preference_rows(16)
    if objective == "sft":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    if objective == "kto":
        return [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
    return pairs


@pytest.fixture(scope="module")
def aligned(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and what each strategy makes of it by another objective. Configs for
    as many workers take turns on them, whose start takes longer than their work.
    """
    folder = tmp_path_factory.mktemp("aligned")
    model = save_tiny_llama(folder / "model")
    runs: dict[int, list[tuple[AlignConfig, Path]]] = {1: [], 2: []}
    for strategy, objective in OBJECTIVES.items():
        num_workers = 1 if strategy == "single" else 2
        values = align_config(
            model,
            write_rows(folder / f"{strategy}.jsonl", rows_for(objective)),
            objective={"name": objective},
            strategy=strategy,
            num_workers=num_workers,
            num_steps=2,
        ).model_dump(mode="json", exclude_unset=True)
        path = folder / f"{strategy}.yaml"
        path.write_text(yaml.safe_dump(values))
        runs[num_workers].append((load_config(path, AlignConfig), folder / strategy))
    for group in runs.values():
        align_in_turn(group)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OBJECTIVES)
def test_every_strategy_and_objective(strategy: str, aligned: Path) -> None:
    """The model moves and loads."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(aligned / name).state_dict()
        for name in ("model", strategy)
    )
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
