"""Tiny models, tasks and a measurer for tests of search; tests change copies, never these."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.evaluate import EvaluateConfig
from pipelines.search import Measurer
from tests.tiny_models import WORDS, save_tiny_llama

NUM_ROWS = {"first": 300, "second": 40, "third": 24}
DIMENSIONS = {"first": "helpfulness", "second": "honesty", "third": "harmlessness"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models at some distance from it."""
    folder = tmp_path_factory.mktemp("models")
    found = [save_tiny_llama(folder / "base", 0)]
    for seed in (1, 2):
        other = shutil.copytree(found[0], folder / f"model-{seed}")
        tensors, random = (
            load_file(other / "model.safetensors"),
            torch.Generator().manual_seed(seed),
        )
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.02)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        found.append(other)
    return found


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tasks.yaml of three tasks; most answers that contain one of many words are right."""
    folder = tmp_path_factory.mktemp("tasks")
    random, entries = np.random.default_rng(0), []
    for name, count in NUM_ROWS.items():
        rows = [
            {
                "id": f"{name}-{place}",
                "prompt": [
                    {"role": "user", "content": " ".join(random.choice(WORDS, 1 + place % 5))}
                ],
                "answer": [str(word) for word in random.choice(WORDS, 12, replace=False)],
                "cluster": f"{name}-{place // 2}",
            }
            for place in range(count)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(
            {
                "name": name,
                "dimension": DIMENSIONS[name],
                "grader": {"name": "contains"},
                "files": {"development": file.name, "test": file.name},
            }
        )
    (folder / "tasks.yaml").write_text(yaml.safe_dump(entries))
    return folder / "tasks.yaml"


def evaluation_of(tasks: Path, model: Path) -> EvaluateConfig:
    return EvaluateConfig(
        models={"candidate": model}, tasks=tasks, split="development", max_new_tokens=4
    )


def ties(models: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
        "parameters": {"density": 0.5} | parameters,
    }


@pytest.fixture(scope="session")
def measurer(tasks: Path, models: list[Path]) -> Iterator[Measurer]:
    """One that has measured another candidate before."""
    measurer = Measurer(evaluation_of(tasks, models[0]))
    measurer.measure(ties(models, weight=0.1), {"second": [0, 5]})
    yield measurer
    measurer.close()
