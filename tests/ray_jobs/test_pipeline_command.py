"""`poise pipeline` with real commands: merges, an evaluation, commands of one's own.

Oracle: the outputs of the commands by themselves.
"""

import contextlib
import json
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from pipelines.commit import partial_path
from pipelines.provenance import read_record
from ray_jobs.cli import main
from ray_jobs.session import worker_environment
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama

COPY = "import shutil, sys; shutil.copy(sys.argv[1] + '/model.safetensors', sys.argv[2])"


def soup(*models: object, **fields: Any) -> dict[str, Any]:
    """A config of a merge that needs no Ray."""
    own = {"merge_method": "linear", "executor": "local"} | fields
    return own | {"models": [{"model": str(model)} for model in models]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and the working directory."""
    for seed in (0, 1):
        save_tiny_llama(tmp_path / f"m{seed}", seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def two_merges_and_a_copy(folder: Path) -> Path:
    """A pipeline that needs no Ray, as a file."""
    write(folder / "second.yaml", soup("runs/first", "m1"))
    stages = {
        "copy": {
            "kind": "command",
            "config": {"argv": ["python", "copy.py", "${stages.second}", "${out}"]},
            "out": "weights",
        },
        "second": {"kind": "merge", "config": "second.yaml", "overrides": {"seed": 3}},
        "first": {"kind": "merge", "config": soup("m0", "m1")},
    }
    (folder / "copy.py").write_text(COPY)
    stages["copy"]["config"]["inputs"] = ["copy.py"]
    return write(folder / "line.yaml", {"storage": "runs", "stages": stages})


def test_stages_give_what_their_commands_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_merges_and_a_copy(folder)
    assert poise(monkeypatch, "pipeline", config, "--plan") == 0
    assert "3 of 3 stages to do" in capsys.readouterr().out
    assert not (folder / "runs").exists()
    assert poise(monkeypatch, "pipeline", config) == 0
    table = capsys.readouterr().out
    assert table.count(" done ") == 3
    assert poise(monkeypatch, "merge", "second.yaml", "alone", "seed=3") == 0
    alone, made = read_record(folder / "alone"), read_record(folder / "runs" / "second")
    assert (alone["weights"], alone["fingerprint"]) == (made["weights"], made["fingerprint"])
    weights = (folder / "alone" / "model.safetensors").read_bytes()
    assert (folder / "runs" / "weights").read_bytes() == weights
    capsys.readouterr()
    assert poise(monkeypatch, "pipeline", config, "--plan") == 0
    assert "0 of 3 stages to do" in capsys.readouterr().out
    assert poise(monkeypatch, "pipeline", config) == 0
    assert capsys.readouterr().out.count(" stands ") == 3


def test_another_result_is_replaced_by_force_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_merges_and_a_copy(folder)
    assert poise(monkeypatch, "pipeline", config) == 0
    (folder / "copy.py").write_text(COPY + "  # changed")
    other = "stages.first.config.models.0.parameters={weight: 0.25}"
    capsys.readouterr()
    assert poise(monkeypatch, "pipeline", config, other) == 1
    said = capsys.readouterr()
    assert "runs/first: exists already; choose another output, or --force" in said.err
    assert "waiting: needs second" in said.out
    before = read_record(folder / "runs" / "second")
    assert poise(monkeypatch, "pipeline", config, other, "--force") == 0
    assert capsys.readouterr().out.count(" done ") == 3
    assert read_record(folder / "runs" / "second")["weights"] != before["weights"]


COMMANDS = [
    (["false"], "RuntimeError: false: ended with status 1"),
    (["no-such-program", "${out}"], "RuntimeError: no-such-program: cannot be started: No such"),
    (["true", "${out}"], "RuntimeError: true: ended with status 0, but has not written "),
]


@pytest.mark.parametrize(("argv", "reason"), COMMANDS)
def test_commands_that_fail(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    reason: str,
) -> None:
    stages = {"a": {"kind": "command", "config": {"argv": argv}}}
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    assert poise(monkeypatch, "pipeline", config) == 1
    assert f"failed: {reason}" in capsys.readouterr().err
    assert not (folder / "runs" / "a").exists()


def test_a_command_without_output_runs_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that deploys does."""
    argv = ["python", "-c", "open('deployed', 'a').write('x')", "${stages.soup}"]
    stages = {
        "soup": {"kind": "merge", "config": soup("m0", "m1")},
        "deploy": {"kind": "command", "config": {"argv": argv}},
    }
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    for _ in range(2):
        assert poise(monkeypatch, "pipeline", config) == 0
    assert (folder / "deployed").read_text() == "x"
    assert poise(monkeypatch, "pipeline", config, "stages.soup.config.seed=1", "--force") == 0
    assert (folder / "deployed").read_text() == "xx"


def test_what_a_killed_command_left_is_there_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; open(sys.argv[1], 'a').write('rest')"
    stages = {"a": {"kind": "command", "config": {"argv": ["python", "-c", code, "${out}"]}}}
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    (folder / "runs").mkdir()
    partial_path(folder / "runs" / "a").write_text("half and ")
    assert poise(monkeypatch, "pipeline", config) == 0
    assert (folder / "runs" / "a").read_text() == "half and rest"


def test_a_named_merge_with_an_output_comes_before_who_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = soup("m0", "m1", out=str(folder / "runs" / "part"))
    del part["executor"]  # is one for the whole file
    both = soup("m0", "part", merges={"part": part})
    stages = {
        "last": {"kind": "merge", "config": soup(folder / "runs" / "part", "m1")},
        "both": {"kind": "merge", "config": both},
    }
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    assert poise(monkeypatch, "pipeline", config) == 0
    assert capsys.readouterr().out.count(" done ") == 2


BAD = [
    ({"kind": "merg"}, "stages.a.kind: found 'merg'; allowed: align, merge, evaluate, sweep, exp"),
    ({"kind": "align", "config": {"model": "m0"}}, "stages.a: data: required, not given"),
    (
        {"kind": "merge", "config": soup("m0", "none/at/all")},
        "stages.a: models: none/at/all: no such file, and no stage makes it",
    ),
    (
        {"kind": "report", "config": {"runs": ["m0"]}, "out": "s3://b/c"},
        "stages.a.out: found the address s3://b/c; allowed: a folder (merge, evaluate alone wri",
    ),
]


@pytest.mark.parametrize(("stage", "line"), BAD)
def test_bad_input_is_a_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: dict[str, Any],
    line: str,
) -> None:
    config = write(folder / "line.yaml", {"storage": "runs", "stages": {"a": stage}})
    monkeypatch.setattr(sys, "argv", ["poise", "pipeline", str(config)])
    with pytest.raises(SystemExit) as status:
        main()
    errors = capsys.readouterr().err
    assert status.value.code == 2, errors
    assert f"poise: {config}: {line}" in errors
    assert errors.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_storage_that_takes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_merges_and_a_copy(folder)
    monkeypatch.setattr(sys, "argv", ["poise", "pipeline", str(config), "storage=/sys/kernel"])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert "poise: " in capsys.readouterr().err


def write_tasks(folder: Path) -> None:
    """A `tasks.yaml` of one task with two prompts."""
    rows = [{"id": str(i), "prompt": "a b", "cluster": str(i)} for i in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grader = {"name": "not_phrase", "phrases": ["yes"]}
    task = {"name": "words", "dimension": "honesty", "prompt": "text", "grader": grader}
    files = {"development": "rows.jsonl", "test": "rows.jsonl"}
    write(folder / "tasks.yaml", [task | {"files": files}])


def test_a_sweep_makes_the_config_of_a_merge(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; a second run finds both."""
    write_tasks(folder)
    write(folder / "soup.yaml", soup("m0", "m1"))
    study = {
        "merge": "soup.yaml",
        "space": {"models.0.parameters.weight": [0.25, 0.75]},
        "sampler": {"name": "grid"},
        "objectives": [{"metric": "words"}],
        "baselines": False,
        "evaluation": {"tasks": "tasks.yaml", "max_new_tokens": 2},
    }
    stages = {
        "best": {"kind": "merge", "config": "${stages.search}/merge.yaml"},
        "search": {"kind": "sweep", "config": study},
    }
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    assert poise(monkeypatch, "pipeline", config) == 0, capsys.readouterr().err
    runs = folder / "runs"
    best = read_record(runs / "best")
    assert best["weights"] == read_record(runs / "search" / "best")["weights"]
    capsys.readouterr()
    assert poise(monkeypatch, "pipeline", config) == 0
    assert capsys.readouterr().out.count(" stands ") == 2


def wait_for_metrics(*lines: str) -> None:
    """Wait until a node offers these lines to Prometheus, which it does every few seconds."""
    import ray

    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    deadline, missing = time.monotonic() + 60, list(lines)
    while missing and time.monotonic() < deadline:
        for port in ports:
            with contextlib.suppress(OSError):
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
                missing = [line for line in missing if not re.search(line, text)]
        time.sleep(1)
    assert not missing


SECRETS = {
    "HF_TOKEN": "hf_plantedTokenOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "planted/Secret/Of/A/Store",
    "RAY_AUTH_TOKEN": "planted-token-of-a-cluster",
    "OPENAI_API_KEY": "sk-plantedKeyOfAJudge",
}


def test_no_secret_of_the_environment_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not into the state, the configs as they ran, logs of failures, records, cards, the status or
    the terminal; nor into what all workers of a Ray are given, which its job's metadata shows.
    """
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = two_merges_and_a_copy(folder)
    broken = {"kind": "command", "config": {"argv": ["false", "${out}"]}}
    values = yaml.safe_load(config.read_text())
    values["stages"]["broken"] = broken
    write(config, values)
    assert poise(monkeypatch, "pipeline", config) == 1
    assert poise(monkeypatch, "status", "runs") == 0
    said = capsys.readouterr()
    written = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    assert any(path.name == "README.md" for path in written)
    assert any(path.name == "broken.log" for path in written)
    for secret in SECRETS.values():
        assert secret not in said.out + said.err
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert secret not in json.dumps(worker_environment())


@pytest.mark.ray
@pytest.mark.slow
def test_evaluations_of_one_engine_run_together(
    ray_cluster: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(folder)
    matrix = {"models": {"soup": "${stages.soup}"}, "tasks": "tasks.yaml", "max_new_tokens": 2}
    stages = {"soup": {"kind": "merge", "config": soup("m0", "m1")}}
    for split in ("development", "test"):
        stages[split] = {"kind": "evaluate", "config": matrix | {"split": split}}
    stages["page"] = {
        "kind": "report",
        "config": {"runs": ["${stages.development}"]},
        "out": "page.html",
    }
    config = write(folder / "line.yaml", {"storage": "runs", "stages": stages})
    assert poise(monkeypatch, "pipeline", config) == 0
    found = json.loads((folder / "runs" / "test" / "evaluation.json").read_text())
    assert found["models"]["soup"]["digest"] == read_record(folder / "runs" / "soup")["weights"]
    wait_for_metrics(
        'ray_poise_pipeline_stages{.*Pipeline="line".*State="done".*} 4.0',
        'ray_poise_stage_done_ratio{.*Stage="test".*} 1.0',
        'ray_poise_stage_seconds{.*Stage="soup".*} ',
    )
    page = folder / "runs" / "page.html"
    before = page.stat().st_mtime_ns
    assert poise(monkeypatch, "pipeline", config) == 0
    assert page.stat().st_mtime_ns == before


def test_a_storage_may_be_an_address(
    folder: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {"soup": {"kind": "merge", "config": soup("m0", "m1")}}
    config = write(folder / "line.yaml", {"storage": f"{bucket}/runs", "stages": stages})
    assert poise(monkeypatch, "pipeline", config) == 0
    assert poise(monkeypatch, "pipeline", config) == 0
    assert " stands " in capsys.readouterr().out
    assert poise(monkeypatch, "merge", write(folder / "soup.yaml", soup("m0", "m1")), "soup") == 0
    record = fsspec.filesystem("s3", skip_instance_cache=True).cat(f"{bucket}/runs/soup/poise.json")
    assert json.loads(record)["weights"] == read_record(folder / "soup")["weights"]
    capsys.readouterr()
    assert poise(monkeypatch, "status", f"{bucket}/runs", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipelines"][0]["stages"]["soup"]["state"] == "stands"
    assert [each["state"] for each in found["items"] if each["name"] == "soup"] == ["stands"]
