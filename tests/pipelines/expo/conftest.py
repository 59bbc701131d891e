"""The tests' world of a choice, made once."""

from pathlib import Path

import pytest

from tests.pipelines.expo.worlds import save_world


@pytest.fixture(scope="session")
def expo_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `save_world`; never changed."""
    return save_world(tmp_path_factory.mktemp("expo"))
