"""Fixtures for tests of judged tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import EvaluateConfig
from tests.pipelines.engines.references import count_prompts, save_chatty

Judged = Callable[..., EvaluateConfig]


@pytest.fixture(scope="session")
def judged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers at random."""
    return save_chatty(tmp_path_factory.mktemp("judged") / "m", 5, max_position_embeddings=2048)


@pytest.fixture
def judged(tmp_path: Path, judged_model: Path) -> Judged:
    """A config of one judged task; `rows` become its data, `judge` its judge's fields."""

    def make(
        protocol: str,
        rows: list[dict[str, Any]],
        endpoint: str = "http://127.0.0.1:1/v1",
        judge: dict[str, Any] | None = None,
        models: dict[str, Path] | None = None,
        **fields: Any,
    ) -> EvaluateConfig:
        data = tmp_path / f"{protocol}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"model": "stub", "endpoint": endpoint, "backoff_s": 0.01, **(judge or {})}
        entry = {"judged": protocol, "data": data, "judge": own, "max_new_tokens": 6, **fields}
        return EvaluateConfig(models=models or {"m": judged_model}, tasks=[entry])

    return make


@pytest.fixture
def asked_models(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of prompts that engines are asked."""
    return count_prompts(monkeypatch)
