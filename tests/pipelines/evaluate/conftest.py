"""Fixtures for tests of evaluation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.engines import Engine, EngineConfig, open_engine
from tests.pipelines.engines.references import count_prompts, save_chatty
from tests.pipelines.evaluate.made_up_tasks import save_tasks


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of data sets for these tests, in place of the user's."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="session")
def made_up_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the made-up tasks; never changed."""
    return save_tasks(tmp_path_factory.mktemp("made-up") / "tasks")


@pytest.fixture(scope="session")
def chatty_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context of 128 tokens."""
    return save_chatty(tmp_path_factory.mktemp("chatty") / "m", 5, max_position_embeddings=128)


@pytest.fixture(scope="session")
def engine(chatty_model: Path) -> Iterator[Engine]:
    """An engine with the tiny model."""
    engine = open_engine(chatty_model, EngineConfig(batch_size=16))
    yield engine
    engine.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of prompts that engines are asked."""
    return count_prompts(monkeypatch)
