"""Commands submitted as Ray jobs to a local head: how they end, over cuts and stops.

Oracle: a score known by hand, statuses and lines that the submitted commands choose, and the state
that Ray itself reports of each job.
"""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.generator import Generator
from tests.ray_jobs.cutting_proxy import cutting_proxy
from tests.ray_jobs.head import RunningHead, running_head
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [[{"role": "user", "content": text}] for text in ("a b", "yes no", "hello")]
CUTS = 10
FIRST_CONTACT = 3  # requests, before which no answer means no head
LOSES_ITSELF = """
import os, psutil
parents = psutil.Process().parents()
next(p for p in parents if p.cmdline()[0].startswith("ray::JobSupervisor")).kill()
"""


@pytest.fixture(scope="module")
def head(project_root: Path) -> Iterator[RunningHead]:
    """A head for this file."""
    with running_head(project_root) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory without Poise in it: the cluster's own is used."""
    path = tmp_path_factory.mktemp("working")
    (path / "here.txt").write_text("here\n")
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of one tiny model on a task whose answers are right but for the last."""
    root = tmp_path_factory.mktemp("world")
    model = save_tiny_llama(root / "model")
    answers = Generator(model).complete(PROMPTS, max_new_tokens=4, batch_size=3)
    answers[-1] = "never said"
    rows = [
        {"id": str(i), "prompt": prompt, "answer": answer, "cluster": str(i)}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    (root / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "echo",
        "dimension": "helpfulness",
        "grader": {"name": "exact"},
        "files": {"test": "echo.jsonl"},
    }
    (root / "tasks.yaml").write_text(yaml.safe_dump([task]))
    path = root / "evaluate.yaml"
    settings = {"models": {"tiny": str(model)}, "max_new_tokens": 4, "num_workers": 1}
    path.write_text(yaml.safe_dump({**settings, "tasks": str(root / "tasks.yaml")}))
    return path


def jobs_of(head: RunningHead, folder: Path) -> dict[str, dict[str, object]]:
    """What `poise jobs` lists, by name."""
    listed = head.poise("jobs", "--address", head.address, "--json", cwd=folder)
    assert listed.returncode == 0, listed.stderr
    return {row["job"]: row for row in json.loads(listed.stdout)}


def name_in(text: str) -> str:
    """The job that a command says it has submitted."""
    return re.search(r"^poise: (poise-\w+): submitted", text, re.MULTILINE)[1]  # type: ignore[index]


def test_a_relative_output_would_be_lost(head: RunningHead, config: Path, folder: Path) -> None:
    job = head.submit("poise", "evaluate", config, "--out", "lost", cwd=folder)
    assert job.returncode == 2  # the command's own
    assert "poise: output 'lost': relative, inside a Ray job" in job.stdout
    assert job.stderr.endswith("failed: the command's own status; exit status 2\n")


def test_ten_cuts_lose_nothing(head: RunningHead, project_root: Path) -> None:
    """Every line once, in order, and the command's own status, from the first second on. The
    first lines are the files of the working directory: code and configs.
    """
    prints = "ls -A; for i in $(seq 60); do echo line $i; sleep 0.2; done; exit 7"
    with cutting_proxy(head.address) as proxy:
        cuts = proxy.cut_often(CUTS, every_s=1.0, after=FIRST_CONTACT)
        job = head.poise("submit", proxy.address, "--", "sh", "-c", prints, cwd=project_root)
        cuts.join(timeout=1)
        assert proxy.num_cuts == CUTS, "the job ended before all cuts were made"
    assert job.returncode == 7, job.stdout + job.stderr
    assert re.findall(r"^line (\d+)$", job.stdout, re.MULTILINE) == [str(i + 1) for i in range(60)]
    assert "lost; trying again" in job.stderr
    assert "connected again" in job.stderr
    printed = job.stdout.split()
    assert {"operators", "pipelines", "ray_jobs", "configs"} <= set(printed)
    left = {".git", ".venv", ".bench", "runs", ".pytest_cache", ".ruff_cache", "__pycache__"}
    assert left & {path.name for path in project_root.iterdir()}  # else this shows nothing
    assert not left & set(printed)


def test_stopped_is_told_from_failed_by_question_and_by_command(
    head: RunningHead, folder: Path
) -> None:
    """Two follow one job: Ctrl-C at a terminal asks, and `poise jobs stop` ends it for both."""
    command = (head.address, "--detach", "--", "sh", "-c", "echo begun; sleep 600")
    detached = head.poise("submit", *command, cwd=folder)
    job = name_in(detached.stderr)
    assert detached.returncode == 0
    assert f"poise submit {head.address} --attach {job}" in detached.stderr

    attach = [sys.executable, "-m", "ray_jobs.cli", "submit", head.address, "--attach", job]
    ours, theirs = pty.openpty()
    at_terminal = subprocess.Popen(
        attach, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=head.environment
    )
    elsewhere = subprocess.Popen(
        attach, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=head.environment
    )
    assert at_terminal.stdout is not None
    while at_terminal.stdout.readline() != b"begun\n":
        pass
    at_terminal.send_signal(signal.SIGINT)
    said = b""
    while b"[f]ollow on?" not in said:
        said += os.read(ours, 1000)
    os.write(ours, b"f\n")
    stopped = head.poise("jobs", "stop", job, "--address", head.address, cwd=folder)
    assert stopped.stdout == f"{job}: asked to stop\n"
    assert at_terminal.wait(timeout=60) == 120
    _, errors = elsewhere.communicate(timeout=60)
    assert elsewhere.returncode == 120
    assert errors.decode().endswith(f"{job}: stopped; exit status 120\n")
    listed = jobs_of(head, folder)[job]
    assert (listed["state"], listed["status"]) == ("STOPPED", 120)
    os.close(ours)
    os.close(theirs)


def test_a_job_whose_keeper_dies_is_lost(head: RunningHead, folder: Path) -> None:
    job = head.submit("python", "-c", LOSES_ITSELF, cwd=folder)
    assert job.returncode == 121, job.stdout + job.stderr
    assert ": lost: " in job.stderr


def test_waiting_is_shown_and_left_by_an_interrupt(head: RunningHead, folder: Path) -> None:
    """Without a terminal, Ctrl-C leaves the job and says how to come back."""
    submit = ["submit", head.address, "--cpus=64", "--wait", "--", "true"]
    running = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", *submit],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=head.environment,
    )
    assert running.stderr is not None
    lines = []
    while "waiting, 0 s now" not in (line := running.stderr.readline()):
        assert line, lines
        lines.append(line)
    job = name_in("".join(lines))
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"poise submit {head.address} --attach {job}" in rest
    assert f"poise jobs stop {job} --address {head.address}" in rest
    assert jobs_of(head, folder)[job]["state"] == "WAITING"
    stopped = head.poise("jobs", "stop", job, "--address", head.address, cwd=folder)
    assert stopped.stdout == f"{job}: asked to stop, which it does once it has a place\n"


def test_what_could_never_run_is_refused_in_seconds(head: RunningHead, folder: Path) -> None:
    """Nothing is submitted, and no job of the look stays behind."""
    before = set(jobs_of(head, folder))
    began = time.monotonic()
    job = head.submit("true", cwd=folder, options=("--cpus", 64, "--gpus", 2))
    assert time.monotonic() - began < 60
    assert job.returncode == 2
    assert "found CPU 64, GPU 2; missing on every node: CPU 60, GPU 2" in job.stderr
    assert "nodes there: CPU 4, GPU 0; nodes that may come: none" in job.stderr
    unknown = head.submit("poise", "dance", cwd=folder)
    assert unknown.returncode == 2
    assert "found poise dance, which Poise 0.1.0 on the cluster does not know" in unknown.stderr
    missing = head.poise("submit", head.address, "--attach", "poise-none", cwd=folder)
    assert missing.stderr.startswith("poise: --attach: found poise-none, which ")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert set(jobs_of(head, folder)) == before


def test_a_wrong_token_is_one_line_and_is_not_printed(head: RunningHead, folder: Path) -> None:
    wrong = head.token[::-1]
    job = head.poise("submit", head.address, "--", "true", cwd=folder, RAY_AUTH_TOKEN=wrong)
    assert job.returncode == 2
    assert job.stderr.startswith(f"poise: {head.address}: the head refuses the token; allowed: ")
    assert job.stderr.count("\n") == 1
    none = head.poise("jobs", "--address", head.address, cwd=folder, RAY_AUTH_MODE="disabled")
    assert none.returncode == 2
    assert "asks for a token, and none was given" in none.stderr
    for secret in (wrong, head.token):
        assert secret not in job.stdout + job.stderr + none.stdout + none.stderr


def test_the_commands_of_the_docs_run(
    head: RunningHead, project_root: Path, config: Path, tmp_path: Path
) -> None:
    """Each command line of "Submitting" in docs/cluster.md, with this head and a folder of ours."""
    page = (project_root / "docs" / "cluster.md").read_text()
    section = page.partition("## Submitting a command\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) >= 5
    job = ""
    for line in lines:
        line = line.replace("http://127.0.0.1:8265", head.address).replace("poise-ID", job)
        line = line.replace("/shared/evaluate.yaml", str(config))
        words = shlex.split(line.replace("/shared/runs", str(tmp_path)), comments=True)
        if words[0] != "poise":
            assert words[0] == "export"
            continue
        ended = head.poise(*words[1:], cwd=project_root, RAY_API_SERVER_ADDRESS=head.address)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"
        if "--detach" in words:
            job = name_in(ended.stderr)
    summary = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert summary["models"]["tiny"]["tasks"]["echo"]["exact"]["value"] == pytest.approx(2 / 3)
