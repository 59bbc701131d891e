"""A trained adapter as PEFT's files."""

import json
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, target_modules
from pipelines.checkpoints.safetensors_header import build_header
from pipelines.train.config import AlignConfig
from pipelines.train.strategies import Strategy, first_rank
from pipelines.train.strategies.loading import empty_model
from pipelines.train.strategies.lora import (
    A,
    B,
    adapted_layers,
    add_adapters,
    conv1d,
    wrapped_parameters,
)


def write_adapter(strategy: Strategy, config: AlignConfig, folder: Path) -> None:
    """Write the adapter's factors in float32, by the names of the model's modules as PEFT has them,
    and its description, into a new folder. Every rank must call; the first one writes.
    """
    factors = dict(strategy.adapters())
    if not first_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_own_name(name): values.contiguous() for name, values in sorted(factors.items())}
    with (folder / ADAPTER_WEIGHTS).open("wb") as file:
        file.write(build_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}))
        for values in tensors.values():
            file.write(values.view(torch.uint8).numpy().data)
    settings = json.dumps(adapter_config(config), indent=2)
    (folder / ADAPTER_CONFIG).write_text(f"{settings}\n", encoding="utf-8")


def adapter_config(config: AlignConfig) -> dict[str, Any]:
    """PEFT's description of a run's adapter."""
    assert config.lora is not None
    model, _ = empty_model(config.model)
    modules, names = dict(model.named_modules()), [name for name, _ in model.named_parameters()]
    add_adapters(model, config.lora)
    adapted, parameters = adapted_layers(model), list(wrapped_parameters(model))
    named = target_modules(parameters, names)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(config.model),
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": target_modules(adapted, list(modules)),
        "fan_in_fan_out": any(isinstance(modules[name], conv1d()) for name in adapted),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if parameters:
        settings["target_parameters"] = named if isinstance(named, list) else parameters
    return settings


def _own_name(name: str) -> str:
    """PEFT's name of a factor in a file."""
    end = A if name.endswith(A) else B
    return PREFIX + name.removesuffix(end) + end.replace(".default", "")
