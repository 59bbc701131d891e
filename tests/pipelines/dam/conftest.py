"""Three experts of one base, apart from it by random steps, and rows of text for each."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.dam import DamConfig
from pipelines.train.errors import raise_failure
from pipelines.train.workers import Job
from tests.tiny_models import save_tiny_llama

LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Experts:
    """A base, its experts, and a file of rows for each."""

    base: Path
    models: tuple[Path, ...]
    data: tuple[Path, ...]

    def fields(self, **changes: Any) -> dict[str, Any]:
        """A config's fields: a short run."""
        models = [
            {"model": str(model), "data": str(data)}
            for model, data in zip(self.models, self.data, strict=True)
        ]
        base = {"base_model": str(self.base), "models": models}
        return base | {"num_steps": 4, "checkpoint_every": 2, "learning_rate": 0.02} | changes

    def config(self, **changes: Any) -> DamConfig:
        """The config."""
        return DamConfig.model_validate(self.fields(**changes))


def make_experts(folder: Path, **sizes: Any) -> Experts:
    """Experts of a tiny Llama in a folder."""
    base = save_tiny_llama(folder / "base", **sizes)
    models, data = [], []
    for i in range(2):
        path = folder / f"expert-{i}"
        path.mkdir()
        for file in base.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        generator = torch.Generator().manual_seed(i)
        tensors = load_file(base / "model.safetensors")
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        models.append(path)
        draw = random.Random(i)
        rows = [
            {
                "prompt": " ".join(draw.choices(LETTERS, k=draw.randint(2, 6))),
                "completion": " ".join(draw.choices(LETTERS, k=draw.randint(1, 5))),
            }
            for _ in range(10 + i)
        ]
        data.append(folder / f"rows-{i}.jsonl")
        data[i].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Experts(base, tuple(models), tuple(data))


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """With heads of their own."""
    return make_experts(tmp_path_factory.mktemp("experts"))


def train_here(config: DamConfig, jobs: Sequence[Job], worker: Any) -> None:
    """Instead of `run_workers`: trains in this process, without Ray."""
    worker({"runs": [job.settings | {"num_threads": 1} for job in jobs]})
    for job in jobs:
        raise_failure(job.folder)
        job.finish()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dam` trains in this process."""
    monkeypatch.setattr("pipelines.dam.run.run_workers", train_here)
