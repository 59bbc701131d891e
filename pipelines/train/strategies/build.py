"""The strategy of a config."""

import torch

from pipelines.train.config import AlignConfig
from pipelines.train.optimizer import build_optimizer
from pipelines.train.strategies.base import Strategy
from pipelines.train.strategies.native import NativeStrategy


def build_strategy(config: AlignConfig, device: torch.device) -> Strategy:
    """Model and optimizer of a config, laid out over the workers."""
    return NativeStrategy(config, device, lambda s: build_optimizer(config, s.bare))
