"""Fixtures for all tests: one Ray for the whole run and tiny checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.session import quiet_environment, ray_session

quiet_environment()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four CPUs by name, started once for all tests that need one."""
    with ray_session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent
