"""`poise deploy` and `poise chat` against `poise serve` as users run them, under load.

Oracle: every answer is drawn again offline by the weights that signed it; digests of the files; the
system's own list of processes.
"""

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.pipelines.serve.signed_load import World, ask, load
from tests.ray_jobs.command_line import poise
from tests.ray_jobs.server_process import assert_nothing_remains, free_port, pids_with, server
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.slow]
KEY = "sk-of-those-who-deploy"
LONG = "c d e f g " * 26  # above the 128 tokens that a block of vLLM's cache has on a CPU
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = World(tmp_path_factory.mktemp("allowed"))
    for seed, name in enumerate(["a", "b", "c"]):
        found.add(name, save_tiny_llama(found.folder / name, seed + 40, **SIZES))
    found.add("deep", save_tiny_llama(found.folder / "deep", 9, **SIZES, num_hidden_layers=3))
    return found


@contextmanager
def running(world: World, folder: Path, root: Path, engine: str) -> Iterator[tuple[str, str]]:
    """The address of a server with model a under the name m on two engines, and its mark."""
    (folder / "keys").write_text(f"operator {KEY}\n")
    config = {
        "models": {"m": {"path": str(world.paths["a"]), "replicas": 2}},
        "engine": {"name": engine},
        "state": str(folder / "state"),
        "deploy": {
            "folders": [str(world.folder)],
            "keys_file": str(folder / "keys"),
            "spare_engines": 2,
        },
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    port, mark = free_port(), uuid.uuid4().hex
    with server([folder / "serve.yaml"], port, root, mark) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, process.stderr.read()
        yield f"http://127.0.0.1:{port}", mark
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert_nothing_remains(mark)


class Terminal:
    """Lines that are typed; before each of them something else happens."""

    def __init__(self, lines: list[tuple[Any, str]]) -> None:
        self._lines = lines

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        if not self._lines:
            return ""
        before, line = self._lines.pop(0)
        before()
        return line


def test_updates_in_the_life_of_vllm(
    world: World, tmp_path: Path, project_root: Path, monkeypatch, capsys
) -> None:
    """Prompts are longer than a block of the cache, which must not outlive its weights."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("POISE_DEPLOY_KEY", KEY)
    with (
        running(world, tmp_path, project_root, "vllm") as (url, _),
        httpx2.Client(base_url=url, timeout=60) as http,
    ):
        with load(http, prefix=LONG) as answers:
            for name in ("b", "c", "a"):
                assert poise(monkeypatch, "deploy", "m", world.paths[name], "--url", url) == 0
                assert ask(http, f"{LONG}a").weights == world.digests[name]
        world.check(answers)
        assert {each.weights for each in answers} == {world.digests[name] for name in "abc"}
    print(f"{len(answers)} answers during three updates", capsys.readouterr().out)


def test_the_life_of_a_name(
    world: World, tmp_path: Path, project_root: Path, monkeypatch, capsys
) -> None:
    """Updates, a canary, a chat, another shape; the gateway is killed, the server restarted."""
    monkeypatch.setenv("POISE_DEPLOY_KEY", KEY)
    a, b, c, deep = (world.digests[name] for name in ("a", "b", "c", "deep"))

    def deploy(*arguments: object) -> int:
        return poise(monkeypatch, "deploy", *arguments, "--url", url)

    with (
        running(world, tmp_path, project_root, "transformers") as (url, mark),
        httpx2.Client(base_url=url, timeout=60) as http,
    ):
        with load(http) as answers:
            assert deploy("m", world.paths["b"]) == 0
            bad = world.folder / "bad"
            save_tiny_llama(bad, 5, **SIZES)
            weights = bad / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
            capsys.readouterr()
            assert deploy("m", bad) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and shown.err.count("\n") == 1 and "truncated" in shown.err
            assert deploy("m", world.paths["c"], "--canary", 25) == 0
            tried = [ask(http, f"a {number}").weights for number in range(20)]
            assert set(tried) == {b, c}
            assert deploy("--rollback", "m") == 0
            lines = [(lambda: 0, "a b\n"), (lambda: deploy("m", world.paths["c"]), "c d\n")]
            monkeypatch.setattr("sys.stdin", Terminal(lines))
            capsys.readouterr()
            assert poise(monkeypatch, "chat", "m", "--url", url, "--conversation") == 0
            said = capsys.readouterr().err
            assert f"m: weights {b[:12]}\n" in said
            assert f"m: weights changed from {b[:12]} to {c[:12]}\n" in said
            assert deploy("m", world.paths["deep"]) == 0
            assert ask(http, "a b").weights == deep
        world.check(answers)
        assert {a, b, c} <= {each.weights for each in answers}
        [gateway] = [pid for pid, name in pids_with(mark).items() if "poise:gateway" in name]
        os.kill(gateway, signal.SIGKILL)
        assert asked_again(http) == deep
        assert deploy("--rollback", "m") == 0
        assert ask(http, "a b").weights == c
    with (
        running(world, tmp_path, project_root, "transformers") as (url, _),
        httpx2.Client(base_url=url, timeout=60) as http,
    ):
        assert ask(http, "a b").weights == c
    print(f"{len(answers)} answers during the changes")


def asked_again(http: httpx2.Client) -> str:
    """The weights of the first answer that comes after a death."""
    end = time.monotonic() + 60
    while True:
        try:
            return ask(http, "a b").weights
        except (AssertionError, httpx2.HTTPError):
            assert time.monotonic() < end
            time.sleep(0.2)
