"""Optimizer and learning-rate schedule from their configs."""

import re
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from operators.optim import ExponentialMovingAverage, OnlineMergingAdamW
from pipelines.checkpoints import CheckpointDelta
from pipelines.train.architecture import meta_model
from pipelines.train.config import AlignConfig
from pipelines.train.optimizer_config import ONLINE, OptimizerConfig
from pipelines.train.schedules import Place

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def build_optimizer(config: AlignConfig, model: nn.Module) -> Optimizer:
    """AdamW, or online merging around it with tau read by range from two checkpoints; followed by
    a moving average if the config has one.
    """
    optimizer = _build(config, model)
    average = config.optimizer.ema
    if average is not None:
        ExponentialMovingAverage(optimizer, average.coefficient, average.mode)
    return optimizer


def _build(config: AlignConfig, model: nn.Module) -> Optimizer:
    """The optimizer itself."""
    settings = config.optimizer
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    ours: dict[str, Any] = {
        "rounding": settings.rounding,
        "gradient_density": settings.gradient_density,
        "gradient_rescale": settings.gradient_rescale,
        "implementation": "eager" if settings.takes_eager_path else settings.implementation,
        "seed": config.seed,
    }
    if settings.name not in ONLINE:
        groups = _groups(settings, model)
        if not settings.masks_or_rounds:
            for group in groups:
                group["params"] = [parameter for _, parameter in group["params"]]
            return torch.optim.AdamW(groups, foreach=True, **shared)
        plain = [group | {"merge": False} for group in groups]
        return OnlineMergingAdamW(plain, None, alpha=0, **shared, **ours)
    density, alpha = settings.density, settings.alpha
    assert density is not None and alpha is not None  # the config requires them
    return OnlineMergingAdamW(
        _groups(settings, model),
        delta_of(config),
        **shared,
        **ours,
        consensus=settings.consensus or ONLINE[settings.name],
        sparsifier=settings.sparsifier,
        sparsifier_parameters=settings.sparsifier_parameters,
        density=density,
        alpha=alpha,
        merge_every=settings.merge_every,
        alpha_schedule=settings.alpha_schedule,
        missing_delta=settings.missing_delta,
        delta_placement=settings.delta_placement,
        rescale=settings.rescale,
    )


def _groups(settings: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters with their names; in two groups if only matrices decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if settings.weight_decay_on == "all":
        return [{"params": named}]
    names = decaying(model)
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if n in names]},
        {"params": [(n, p) for n, p in named if n not in names], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
