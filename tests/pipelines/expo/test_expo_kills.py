"""kill -9 in the middle of a choice. Oracle: an undisturbed run, and counts of what is asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import check
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.expo import ExpoConfig, expo, plan_expo
from tests.pipelines.expo.worlds import PROMPTS, fields_of

pytest.importorskip("lm_eval")


def blocks_of(out: Path) -> dict[str, int]:
    """How many blocks of answers and of rewards are there."""
    tasks = ("reward-answers", "reward")
    return {task: len([*out.glob(f"samples/{task}/*/0*.parquet")]) for task in tasks}


def killed(config: Path, out: Path, num_blocks: int) -> None:
    """Run the command and kill it when so many blocks are there."""
    command = [sys.executable, "-m", "ray_jobs.cli", "expo", str(config), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while sum(blocks_of(out).values()) < num_blocks and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "expo.json").exists() and not (out / "best").exists()


@pytest.mark.slow
def test_nothing_that_is_finished_is_done_again(
    expo_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = fields_of(expo_world)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    for num_blocks in (1, 5):  # among the answers, among the rewards
        killed(tmp_path / "study.yaml", tmp_path / "out", num_blocks)
    there = blocks_of(tmp_path / "out")
    assert there["reward-answers"] == 4 and there["reward"] >= 1
    asked = {"generate": 0, "rewards": 0}
    for name in asked:
        plain = getattr(TransformersEngine, name)

        def counted(
            self: Any, what: Any, *rest: Any, _name: str = name, _plain: Any = plain
        ) -> Any:
            asked[_name] += len(what)
            return _plain(self, what, *rest)

        monkeypatch.setattr(TransformersEngine, name, counted)
    plan = plan_expo(check(fields, ExpoConfig, "study.yaml"))
    result = expo(plan, tmp_path / "out")
    prompts = PROMPTS["development"]
    assert asked == {"generate": 0, "rewards": prompts * (4 - there["reward"])}
    again = expo(plan, tmp_path / "undisturbed")
    assert asked["generate"] == 4 * prompts
    for trial in (*result["trials"], *again["trials"]):
        del trial["seconds"]
    assert json.dumps(again["trials"]) == json.dumps(result["trials"])
