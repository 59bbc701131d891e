"""Optimizer and learning-rate schedule from their configs."""

import re
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from operators.optim import OnlineMergingAdamW
from pipelines.checkpoints import CheckpointDelta
from pipelines.train.architecture import meta_model
from pipelines.train.config import ONLINE, AlignConfig
from pipelines.train.schedules import Place

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def build_optimizer(config: AlignConfig, model: nn.Module) -> Optimizer:
    """AdamW, or online merging around it with tau read by range from two checkpoints."""
    settings = config.optimizer
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name not in ONLINE:
        trained = [p for p in model.parameters() if p.requires_grad]
        if settings.weight_decay_on == "matrices":
            names = decaying(model)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in named if n in names]},
                {"params": [p for n, p in named if n not in names], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, foreach=True, **shared)
        return torch.optim.AdamW(trained, foreach=True, **shared)
    density, alpha = settings.density, settings.alpha
    assert density is not None and alpha is not None  # the config requires them
    return OnlineMergingAdamW(
        model.named_parameters(),
        delta_of(config),
        **shared,
        consensus=settings.consensus or ONLINE[settings.name],
        sparsifier=settings.sparsifier,
        sparsifier_parameters=settings.sparsifier_parameters,
        density=density,
        alpha=alpha,
        merge_every=settings.merge_every,
        alpha_schedule=settings.alpha_schedule,
        missing_delta=settings.missing_delta,
        delta_placement=settings.delta_placement,
        implementation=settings.implementation,
        seed=config.seed,
    )


def decaying(model: nn.Module) -> set[str]:
    """The parameters that transformers' Trainer lets decay: all but those of layer norms and those
    whose names speak of biases or norms.
    """
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    names = {name for name, _ in model.named_parameters()} - norms
    return {name for name in names if not NO_DECAY.search(name.lower())}


def delta_of(config: AlignConfig) -> CheckpointDelta:
    """tau by the names of the model's parameters, however its two checkpoints are stored."""
    tau = config.optimizer.tau
    assert tau is not None  # the config requires it
    return CheckpointDelta(tau.base, tau.tuned, meta_model(config.model, config.head))


def learning_rate(config: AlignConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step (from 1). It depends only on the step, so resuming needs no
    state.
    """
    at = Place(step - 1, config.warm_up(num_steps), num_steps)
    return config.optimizer.learning_rate * config.schedule_settings.factor(at)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of all parameters for the next steps."""
    for group in optimizer.param_groups:
        group["lr"] = value
