"""A tiny model and a preference file for all tests of training."""

from pathlib import Path

import pytest
from training_files import preference_rows, write_rows

from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty preferences as JSONL."""
    return write_rows(tmp_path_factory.mktemp("data") / "preferences.jsonl", preference_rows(40))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen other preferences."""
    return write_rows(tmp_path_factory.mktemp("data") / "held-out.jsonl", preference_rows(19, 7))
