"""`poise chat`: lines in, answers out; as a process where its streams and variables are tested.

Oracle: the greedy answers of one batch without the command.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from ray_jobs.chat import run_chat
from tests.generator import Generator
from tests.hub_stub import Stub
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama


def chat(path: Path, text: str, root: Path) -> subprocess.CompletedProcess[str]:
    """`poise chat PATH` with `text` on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", "chat", str(path)],
        input=text,
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
    )


def expected(path: Path, *questions: str) -> str:
    """The greedy answers, a line each, from one batch."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    length = 128 - max(len(Generator(path).encode(prompt)) for prompt in prompts)
    answers = Generator(path).complete(prompts, max_new_tokens=length, batch_size=len(prompts))
    return "".join(f"{answer}\n" for answer in answers)


def test_answers_and_nothing_else_on_stdout(tmp_path: Path, project_root: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    done = chat(model, "a b\n\nyes no\n", project_root)
    assert done.returncode == 0
    assert done.stdout == expected(model, "a b", "yes no")
    assert "> " not in done.stderr


def test_a_line_does_not_depend_on_the_lines_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\na\nhello"))
    assert poise(monkeypatch, "chat", model) == 0
    repeated = capsys.readouterr().out.splitlines()
    assert len(repeated) == 3
    assert repeated[0] == repeated[2]


def test_a_question_longer_than_the_model_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("a " * 200 + "\nyes\n"))
    assert run_chat([str(model)])
    shown = capsys.readouterr()
    assert shown.out == expected(model, "yes")
    assert "too long" in shown.err and "128" in shown.err


def test_two_checkpoints_and_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (save_tiny_llama(tmp_path / name, seed) for seed, name in enumerate("xy"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\nhello\n"))
    options = ["--compare", two, "--conversation", "--json", "--max-tokens", 5]
    assert poise(monkeypatch, "chat", one, *options) == 0
    turns = [json.loads(line)["answers"] for line in capsys.readouterr().out.splitlines()]
    for place, path in enumerate((one, two)):
        messages = []
        for question, answers in zip(("a b", "hello"), turns, strict=True):
            messages.append({"role": "user", "content": question})
            [text] = Generator(path).complete([messages], max_new_tokens=5, batch_size=1)
            assert answers[place]["text"].strip() == text
            assert answers[place]["weights"] == model_digest(Checkpoint.open(path)).weights
            messages.append({"role": "assistant", "content": answers[place]["text"]})


def test_a_folder_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert poise(monkeypatch, "chat", tmp_path / "absent") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "absent: no such directory" in shown.err


def test_a_tokenizer_without_a_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert poise(monkeypatch, "chat", model) == 2
    assert "chat template" in capsys.readouterr().err


def test_a_model_of_the_hub_in_a_process_of_its_own(
    hub: Stub, tmp_path: Path, project_root: Path
) -> None:
    """The variables alone name the hub; what is missing ends with one line."""
    model = save_tiny_llama(tmp_path / "model")
    hub.add("org/name", model)
    done = chat(Path("org/name"), "a b\n", project_root)
    assert (done.returncode, done.stdout) == (0, expected(model, "a b"))
    other = chat(Path("org/none"), "a b\n", project_root)
    assert (other.returncode, other.stdout) == (2, "")
    assert other.stderr.startswith("poise: model org/none: no such directory here, and the hub")
    assert other.stderr.count("\n") == 1
