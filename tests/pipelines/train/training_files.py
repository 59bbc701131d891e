"""Small preference files and configs for the tests of training."""

import json
import random
from pathlib import Path
from typing import Any

from pipelines.train import AlignConfig

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


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
