"""What `poise submit` packs, refuses and prints, without a cluster.

Oracle: files, nodes and endings written by hand; a log as it was before it was cut into pieces.
"""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.versions import versions
from ray_jobs import submit
from ray_jobs.submission import follow, on_head
from ray_jobs.submission.follow import Log, ending
from ray_jobs.submission.head import DEFAULT_ADDRESS, head_address
from ray_jobs.submission.look import (
    Asked,
    Kind,
    Look,
    as_run_there,
    check_command,
    check_room,
    check_workers,
    missing,
    parse,
)
from ray_jobs.submission.package import measure
from ray_jobs.submission.workers import VARIABLE, await_workers
from ray_jobs.submit import amounts, whole_amounts
from tests.ray_jobs.command_line import poise

STAYS = (
    ".env .env.local id_rsa keys/server.pem keys/a.key .aws/credentials .netrc .git/config "
    ".venv/bin/python runs/a/model.safetensors a/__pycache__/b.pyc .pytest_cache/x x.egg-info/y "
    "ignored.txt half.partial .kube/config build/lib.py"
)
GOES = "train.py configs/dpo.yaml tokenizer.json a/runs.py a/build/lib.py keys/readme.md .gitignore"
NODE = {"CPU": 4.0, "memory": 8e9, "node:10.0.0.1": 1.0}


def a_look(**settings: Any) -> Look:
    """A cluster of one small node, which does not grow, with this side's Poise and Ray."""
    here = versions()
    standing: dict[str, Any] = {
        "version": here["poise"],
        "commands": ("align", "merge"),
        "sent": False,
        "ray": here["ray"],
        "nodes": (NODE,),
        "kinds": {},
        "scripts": "/opt/poise/bin",
        "path": "/usr/bin:/bin",
    }
    return Look(**(standing | settings))


def fill(folder: Path) -> Path:
    for name in f"{STAYS} {GOES}".split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("ignored.txt\n" if name == ".gitignore" else "x")
    return folder


def test_results_keys_and_caches_stay_here(tmp_path: Path) -> None:
    assert set(measure(fill(tmp_path), 1).sizes) == set(GOES.split())


def test_a_gitignore_is_left_aside_as_ray_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert set(measure(fill(tmp_path), 1).sizes) == {*GOES.split(), "ignored.txt"}


def test_ray_packs_what_was_measured(tmp_path: Path) -> None:
    """Ray's own packing of the job's environment has the same files."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    package = measure(fill(tmp_path / "work"), 1)
    target = tmp_path / "package.zip"
    excludes = package.environment()["excludes"]
    create_package(str(package.folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as packed:
        files = {entry.filename for entry in packed.infolist() if not entry.is_dir()}
    assert files == set(package.sizes)


def test_too_large_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(2_000_000)
    with pytest.raises(InputError, match=r"found 2\.0 MB to send; allowed: 1 MB") as error:
        measure(tmp_path, 1)
    assert "the largest: weights.bin (2.0 MB), " in str(error.value)
    assert measure(tmp_path, 3).num_bytes > 2_000_000


@given(st.text(max_size=40), st.lists(st.integers(0, 40)), st.lists(st.integers(1, 9), min_size=1))
def test_a_log_is_printed_once_whatever_the_cuts(
    text: str, cuts: list[int], sizes: list[int]
) -> None:
    """Each connection brings the log from its beginning in pieces of other sizes, up to a cut."""
    log, printed = Log(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        for turn, end in enumerate([*cuts, len(text)]):
            log.rewind()
            size = sizes[turn % len(sizes)]
            for start in range(0, min(end, len(text)), size):
                log.write(text[start : min(end, start + size)])
    assert printed.getvalue() == text


def details(status: str, **fields: Any) -> Any:
    given = {"message": None, "error_type": None, "driver_exit_code": None, "driver_node_id": None}
    return SimpleNamespace(status=status, **(given | fields))


@pytest.mark.parametrize(
    ("job", "status", "line"),
    [
        (details("SUCCEEDED", driver_exit_code=0), 0, ""),
        (details("STOPPED", driver_node_id="n"), follow.STOPPED, "stopped"),
        (
            details("FAILED", driver_exit_code=3, error_type="JOB_ENTRYPOINT_COMMAND_ERROR"),
            3,
            "failed: the command's own status",
        ),
        (
            details("FAILED", driver_exit_code=-9, error_type="JOB_ENTRYPOINT_COMMAND_ERROR"),
            137,
            "failed: the command was ended by signal 9",
        ),
        (
            details("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="gone\nmore"),
            follow.LOST,
            "lost: gone",
        ),
        (
            details("FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_FAILURE", driver_node_id="n"),
            follow.LOST,
            "lost: no reason given",
        ),
        (
            details("FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT", message="900 s"),
            follow.NEVER_STARTED,
            "never started: 900 s",
        ),
        (
            details("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE", message="no such package"),
            follow.NEVER_STARTED,
            "never started: no such package",
        ),
    ],
)
def test_every_ending_has_a_status(job: Any, status: int, line: str) -> None:
    assert ending(job) == (status, line)


@pytest.mark.parametrize(
    ("answers", "at_terminal", "status", "num_stops"),
    [
        (["s"], True, follow.STOPPED, 1),
        (["f", "Stop"], True, follow.STOPPED, 1),
        (["l"], True, follow.LEFT, 0),
        ([""], True, follow.LEFT, 0),
        ([], False, follow.LEFT, 0),
    ],
)
def test_an_interrupt_asks_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    answers: list[str],
    at_terminal: bool,
    status: int,
    num_stops: int,
) -> None:
    """A job that is interrupted once for each answer, and ends as stopped if it was asked to."""
    stops: list[str] = []
    interrupts = iter([KeyboardInterrupt] * max(1, len(answers)))

    def followed(head: Any, job: str, log: Log) -> int:
        if error := next(interrupts, None):
            raise error
        return follow.STOPPED

    terminal = io.StringIO("".join(f"{answer}\n" for answer in answers))
    terminal.isatty = lambda: at_terminal  # type: ignore[method-assign]
    errors = io.StringIO()
    errors.isatty = lambda: at_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(submit, "follow", followed)
    head: Any = SimpleNamespace(address="http://h:1", stop=stops.append)
    assert submit._followed(head, "poise-1") == status
    assert stops == ["poise-1"] * num_stops
    assert ("poise submit http://h:1 --attach poise-1" in errors.getvalue()) == (num_stops == 0)


GPU_KIND = {"gpu": Kind({"CPU": 8, "GPU": 1}, 2)}


@pytest.mark.parametrize(
    ("asked", "found", "told"),
    [
        (Asked(), a_look(), None),
        (Asked(cpus=4, memory_gb=8), a_look(), None),
        (Asked(gpus=1), a_look(kinds=GPU_KIND), "waiting for a node of kind gpu"),
        (Asked(gpus=1, memory_gb=40), a_look(kinds=GPU_KIND), "waiting for a node of kind gpu"),
        (Asked(gpus=1), a_look(kinds={"any": Kind({}, 1)}), "waiting for a node of kind any"),
    ],
)
def test_what_fits_or_may_come_is_submitted(asked: Asked, found: Look, told: str | None) -> None:
    assert check_room(asked, found, wait=False) == told


@pytest.mark.parametrize(
    ("asked", "found", "line"),
    [
        (Asked(cpus=5), a_look(), "missing on every node: CPU 1; nodes there: CPU 4; "),
        (Asked(gpus=2, cpus=1), a_look(kinds=GPU_KIND), "missing on every node: GPU 1; "),
        (Asked(gpus=1), a_look(kinds={"gpu": Kind({"GPU": 1}, 0)}), "missing on every node: GPU 1"),
        (Asked(others={"L4": 1}), a_look(), "found L4 1; missing on every node: L4 1; "),
        (Asked(memory_gb=9), a_look(), "missing on every node: memory 1 GB; "),
        (Asked(gpus=1), a_look(kinds=None), "cannot be read on this head; allowed: --wait"),
        (Asked(cpus=1), a_look(nodes=()), "nodes there: none; nodes that may come: none"),
    ],
)
def test_what_can_never_run_is_refused_unless_asked_to_wait(
    asked: Asked, found: Look, line: str
) -> None:
    with pytest.raises(InputError) as error:
        check_room(asked, found, wait=False)
    assert line in str(error.value)
    assert "waiting for" in str(check_room(asked, found, wait=True))


resources = st.dictionaries(st.sampled_from("ABC"), st.integers(0, 5).map(float))


@given(resources, resources)
def test_missing_is_what_must_be_added(wanted: dict[str, float], node: dict[str, float]) -> None:
    lack = missing(wanted, node)
    grown = {name: node.get(name, 0.0) + lack.get(name, 0.0) for name in {*node, *lack}}
    assert not missing(wanted, grown)
    assert all(node.get(name, 0.0) < wanted[name] for name in lack)


def test_versions_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    check_command(["poise", "merge", "a.yaml"], a_look())
    assert capsys.readouterr().err == ""
    check_command(["python", "a.py"], a_look(version="0.0.1", ray="2.9.0"))
    told = capsys.readouterr().err
    assert f"Ray is {versions()['ray']} here and 2.9.0 on the cluster" in told
    assert f"Poise is {versions()['poise']} here and 0.0.1 on the cluster" in told


def test_a_command_must_be_known_there() -> None:
    with pytest.raises(InputError, match=r"found poise sweep, which Poise 0\.0\.1 on the cluster"):
        check_command(["poise", "sweep", "a.yaml"], a_look(version="0.0.1"))
    with pytest.raises(InputError, match="has no Poise that can be imported"):
        check_command(["poise", "merge"], a_look(version=None, commands=None))
    check_command(["poise", "--help"], a_look())
    check_command(["sweep"], a_look(version=None, commands=None))


def test_poise_is_found_beside_rays_python_or_as_a_module() -> None:
    here = {"PATH": "/opt/poise/bin:/usr/bin:/bin"}
    assert as_run_there(["poise", "x y"], a_look()) == ("poise 'x y'", here)
    assert as_run_there(["poise"], a_look(path="/opt/poise/bin")) == ("poise", {})
    assert as_run_there(["poise", "x"], a_look(script=False))[0] == "python -m ray_jobs.cli x"


def test_the_heads_side_reads_the_launchers_limits(tmp_path: Path) -> None:
    config = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}},
            "cpu": {"resources": {"CPU": 8}, "max_workers": 9},
            "gpu": {"resources": {"GPU": 1}, "max_workers": 2},
        },
    }
    path = tmp_path / "bootstrap.yaml"
    path.write_text(yaml.safe_dump(config))
    assert on_head.kinds_of(str(path)) == {
        "head": {"resources": {"CPU": 0}, "most": 0},
        "cpu": {"resources": {"CPU": 8}, "most": 3},
        "gpu": {"resources": {"GPU": 1}, "most": 2},
    }
    assert on_head.kinds_of(str(tmp_path / "none.yaml")) is None


def test_the_launchers_config_is_found_by_its_monitor(tmp_path: Path) -> None:
    """A process with the command line of Ray's monitor, of this cluster or of another."""
    config = tmp_path / "bootstrap.yaml"
    kinds = {"cpu": {"resources": {"CPU": 8}, "max_workers": 2}}
    config.write_text(yaml.safe_dump({"max_workers": 5, "available_node_types": kinds}))
    idle = [sys.executable, "-c", "input()", "/ray/autoscaler/_private/monitor.py"]
    here, other = "10.9.8.7:1", "10.9.8.7:2"
    commands = [
        [*idle, f"--gcs-address={here}", f"--autoscaling-config={config}"],
        [*idle, f"--gcs-address={other}"],
    ]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in commands]
    try:
        found = {"cpu": {"resources": {"CPU": 8}, "most": 2}}
        assert on_head.autoscaler(here) == found
        assert on_head.autoscaler(other) == {}
        assert on_head.autoscaler("10.9.8.7:3") is None
    finally:
        for process in running:
            process.communicate(b"\n", timeout=60)


def test_what_the_head_says_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project_root: Path
) -> None:
    """Of the Poise beside the tests, once as installed and once as sent along."""
    monkeypatch.chdir(tmp_path)
    installed = on_head.installed()
    monkeypatch.chdir(project_root)
    sent = on_head.installed()
    assert (installed["sent"], sent["sent"]) == (False, True)
    found = {
        "poise": sent,
        "ray": "2.60.0",
        "scripts": "/b",
        "path": "/b",
        "script": True,
        "nodes": [NODE],
        "autoscaler": {"gpu": {"resources": {"GPU": 1}, "most": 2}},
    }
    read = parse(json.dumps(found))
    assert read.kinds == {"gpu": Kind({"GPU": 1}, 2)}
    assert read.commands is not None
    assert {"align", "extract-lora", "submit"} <= set(read.commands)
    assert read.version == versions()["poise"]


def test_the_address_is_the_job_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert head_address(None) == DEFAULT_ADDRESS
    assert head_address("head:8265/") == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://a.example:1")
    assert head_address(None) == "https://a.example:1"
    assert head_address("http://b:2") == "http://b:2"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError, match=r"RAY_ADDRESS: found '10\.0\.0\.1:6379'; allowed: "):
        head_address(None)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["submit", "http://127.0.0.1:9", "--", "true"], "http://127.0.0.1:9: no Ray head answers"),
        (["jobs", "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9: no Ray head answers"),
        (["submit"], "submit: give either -- COMMAND... or --attach ID"),
        (["submit", "--attach", "a", "--", "true"], "submit: give either -- COMMAND... or"),
        (["submit", "--resource", "L4", "--", "true"], "--resource: found 'L4'; allowed: NAME=N"),
        (
            ["submit", "--workers", "GPU=.5", "--", "true"],
            "--workers: found GPU=0.5; allowed: whole",
        ),
        (["jobs", "halt", "poise-1"], "jobs: found 'halt poise-1'; allowed: nothing"),
        (["jobs", "stop"], "jobs: found 'stop'; allowed: nothing, to list them, or stop ID"),
    ],
)
def test_bad_submissions_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert poise(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"poise: {line}")
    assert errors.count("\n") == 1


def test_amounts_by_name() -> None:
    assert amounts("--resource", ["L4=1", "a:b=0.5"]) == {"L4": 1.0, "a:b": 0.5}
    for text in ("=1", "L4=0", "L4=nan", "L4=-1", "L4=inf", "L4=x"):
        with pytest.raises(InputError, match="--resource: found "):
            amounts("--resource", [text])
    assert whole_amounts("--workers", ["GPU=8"]) == {"GPU": 8}
    with pytest.raises(InputError, match=r"--workers: found GPU=0\.5; allowed: whole numbers"):
        whole_amounts("--workers", ["GPU=0.5"])


@pytest.mark.parametrize(
    ("wanted", "found", "line"),
    [
        ({"CPU": 4}, a_look(), ""),
        ({"CPU": 8}, a_look(nodes=(NODE, NODE)), ""),
        ({"GPU": 2}, a_look(kinds=GPU_KIND), ""),
        ({"GPU": 9}, a_look(kinds={"any": Kind({}, 1)}), ""),
        ({"GPU": 3, "CPU": 9}, a_look(kinds=GPU_KIND), "allowed: up to GPU 2, CPU 20, which"),
        ({"GPU": 1}, a_look(), "found GPU 1; allowed: up to GPU 0, which"),
        ({"GPU": 1}, a_look(kinds=None), "cannot be read on this head; allowed: --wait"),
    ],
)
def test_workers_must_be_within_reach(wanted: dict[str, int], found: Look, line: str) -> None:
    check_workers(wanted, found, wait=True)
    if not line:
        check_workers(wanted, found, wait=False)
        return
    with pytest.raises(InputError) as error:
        check_workers(wanted, found, wait=False)
    assert line in str(error.value)


@pytest.mark.ray
def test_a_command_awaits_its_workers(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers that come later are awaited, and nothing is held afterwards."""
    import threading

    from ray.util import placement_group, placement_group_table, remove_placement_group

    def alive() -> set[str]:
        table = placement_group_table().values()
        return {group["placement_group_id"] for group in table if group["state"] != "REMOVED"}

    before = alive()
    held = placement_group([{"CPU": 3}])
    assert held.wait(60)
    monkeypatch.setenv(VARIABLE, '{"CPU": 2}')
    timer = threading.Timer(2.5, remove_placement_group, [held])
    timer.start()
    await_workers()
    timer.join()
    told = capsys.readouterr().err
    assert told.startswith("poise: waiting, 1 s now, for CPU 2; there is CPU 4")
    assert alive() <= before


@pytest.mark.parametrize("text", ["GPU=4", '{"GPU": 0.5}', "[1]", '{"GPU": true}'])
def test_awaited_workers_are_whole_numbers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InputError, match="POISE_WORKERS: found "):
        await_workers()
