"""Strategies: how a model is distributed over the workers."""

import importlib
from functools import partial

import torch

from pipelines.train.config import AlignConfig
from pipelines.train.optimizer import build_optimizer
from pipelines.train.optimizer_config import OptimizerConfig
from pipelines.train.strategies.base import StagingStrategy, Strategy, first_rank, wait_for_all

__all__ = [
    "StagingStrategy",
    "Strategy",
    "build_reference",
    "build_strategy",
    "first_rank",
    "wait_for_all",
]


def build_strategy(config: AlignConfig, device: torch.device) -> Strategy:
    """Model and optimizer of a config, distributed over the workers."""
    module, name = config.traits.implementation.split(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), name)
    return strategy(config, device, partial(build_optimizer, config))


def build_reference(config: AlignConfig, device: torch.device) -> Strategy:
    """The reference model of a config (the model itself unless the config names one), without
    training. It is whole if the policy is (single, ddp), else sharded by rows over the workers.
    """
    changes = {
        "model": config.reference_model or config.model,
        "optimizer": OptimizerConfig(learning_rate=config.optimizer.learning_rate),
        "lora": None,
        "gradient_checkpointing": False,
        "strategy": config.traits.beside,
    }
    reference = build_strategy(config.model_copy(update=changes), device)
    reference.model.eval()
    reference.model.requires_grad_(False)
    if config.traits.beside == "fsdp2":  # otherwise its root would stay gathered
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(reference.model, FSDPModule)
        reference.model.set_reshard_after_forward(True)
    return reference
