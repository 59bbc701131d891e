"""Small preference files and configs for the tests of training."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.train import AlignConfig, loop, plan_alignment
from pipelines.train.checkpoints import step_folder
from pipelines.train.loop import train_worker
from pipelines.train.metrics import MEASURED
from pipelines.train.run import worker_settings

LETTERS = "abcdefghij"


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations where the answer that begins with "yes" is preferred."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        asked = " ".join(draw.choices(LETTERS, k=draw.randint(2, 6)))
        answers = [
            f"{word} " + " ".join(draw.choices(LETTERS, k=draw.randint(1, 4)))
            for word in ("yes", "no")
        ]
        rows.append(
            {
                "prompt": [{"role": "user", "content": asked}],
                "chosen": [{"role": "assistant", "content": answers[0]}],
                "rejected": [{"role": "assistant", "content": answers[1]}],
            }
        )
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSONL; returns `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def align_config(model: Path, data: Path, **fields: Any) -> AlignConfig:
    """A short run on one worker, with some fields set differently."""
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "optimizer": {"learning_rate": 1e-3},
        "num_steps": 6,
        "global_batch_size": 8,
        "strategy": "single",
        "num_workers": 1,
        "checkpoint_every": 2,
    }
    return AlignConfig(**(settings | fields))


def run_here(config: AlignConfig, folder: Path) -> Path:
    """Train in this process, as one worker; returns the folder of the unfinished run."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder.parent / "cache"
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    train_worker({"runs": [settings]})
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seeded_metrics(folder: Path) -> list[dict[str, float]]:
    """The same without what is measured by a clock."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics(folder)]


def evaluated(folder: Path) -> dict[int, dict[str, float]]:
    """The numbers of held-out rows by step, without their prefix."""
    found = {
        line["step"]: {k.removeprefix("eval_"): v for k, v in line.items() if k[:5] == "eval_"}
        for line in metrics(folder)
    }
    return {step: numbers for step, numbers in found.items() if numbers}


def stop_at_the_fourth_step(
    config: AlignConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, *, earlier: int = 0
) -> None:
    """Begin a run here and stop it as Ctrl-C would, before its fourth step, or so many earlier."""
    real = loop.global_batch

    def stops(num_rows: int, size: int, number: int, seed: int) -> list[int]:
        if number == 3 - earlier:
            raise KeyboardInterrupt
        return real(num_rows, size, number, seed)

    monkeypatch.setattr(loop, "global_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run_here(config, folder)
    monkeypatch.setattr(loop, "global_batch", real)


def broken_off(run: Path, place: Path, *, checkpoint: int, lines: int) -> Path:
    """A finished run as it was some steps after one of its checkpoints; returns `place`."""
    shutil.copytree(step_folder(run, checkpoint), step_folder(place, checkpoint))
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "metrics.jsonl").write_text("".join(text[:lines]))
    return place
