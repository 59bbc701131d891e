"""The strategy of a config."""

from functools import partial

import torch

from pipelines.train.config import ZERO_STAGES, AlignConfig
from pipelines.train.optimizer import build_optimizer
from pipelines.train.strategies.base import Strategy
from pipelines.train.strategies.native import NativeStrategy


def build_strategy(config: AlignConfig, device: torch.device) -> Strategy:
    """Model and optimizer of a config, laid out over the workers."""
    optimizer = partial(build_optimizer, config)
    if config.strategy in ZERO_STAGES:
        from pipelines.train.strategies.zero import ZeroStrategy

        return ZeroStrategy(config, device, optimizer)
    return NativeStrategy(config, device, optimizer)
