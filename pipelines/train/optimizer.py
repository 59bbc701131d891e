"""Optimizer and learning-rate schedule from their configs."""

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from operators.optim import OnlineMergingAdamW
from pipelines.checkpoints import CheckpointDelta
from pipelines.train.config import ONLINE, AlignConfig, OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module, seed: int) -> Optimizer:
    """AdamW, or online merging around it, whose tau is read by slice from two checkpoints."""
    shared = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name not in ONLINE:
        return torch.optim.AdamW(model.parameters(), foreach=True, **shared)
    delta = CheckpointDelta(config.reference.base, config.reference.tuned)
    return OnlineMergingAdamW(
        model.named_parameters(),
        delta,
        **shared,
        consensus=ONLINE[config.name],
        density=config.density,
        alpha=config.alpha,
        merge_every=config.merge_every,
        seed=seed,
    )


def build_schedule(config: AlignConfig, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """Linear warm-up, then constant, or down to 0 linearly or along a cosine."""
    warm_up = round(config.warmup_share * num_steps)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        share = min(1.0, (step - warm_up) / max(1, num_steps - warm_up))
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1 - share if config.schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)
