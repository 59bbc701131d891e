"""The strategy of a config."""

from functools import partial

import torch

from pipelines.train.config import ZERO_STAGES, AlignConfig, OptimizerConfig
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


def build_reference(config: AlignConfig, device: torch.device) -> Strategy:
    """The reference of a config, the model itself unless it names one: to be scored, not stepped.

    Whole where the policy is (single, ddp), else sharded by rows over the workers.
    """
    settings = {"learning_rate": config.optimizer.learning_rate}
    changes = {
        "model": config.reference_model or config.model,
        "optimizer": OptimizerConfig(**settings),
        "lora": None,
        "gradient_checkpointing": False,
    }
    changes["strategy"] = "single" if config.strategy in ("single", "ddp") else "fsdp2"
    reference = build_strategy(config.model_copy(update=changes), device)
    reference.model.eval()
    reference.model.requires_grad_(False)
    if changes["strategy"] == "fsdp2":  # its root would else stay gathered
        reference.model.set_reshard_after_forward(True)
    return reference
