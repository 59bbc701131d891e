"""The tests' reward models, made once."""

from pathlib import Path

import pytest

from tests.pipelines.rewards.reward_models import save_reward_models


@pytest.fixture(scope="session")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with one label, one with three, a BERT; never changed."""
    return save_reward_models(tmp_path_factory.mktemp("rewards"))
