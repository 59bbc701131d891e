"""Ways to lay a model out over the workers."""

from pipelines.train.strategies.base import Strategy, first_rank, wait_for_all
from pipelines.train.strategies.build import build_reference, build_strategy

__all__ = ["Strategy", "build_reference", "build_strategy", "first_rank", "wait_for_all"]
