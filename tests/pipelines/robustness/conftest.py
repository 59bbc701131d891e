"""Fixtures for tests of attacks."""

from tests.pipelines.evaluate.conftest import own_cache

__all__ = ["own_cache"]
