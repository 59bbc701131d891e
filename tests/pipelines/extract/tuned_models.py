"""Models that differ from their base by changes of low rank."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.extract import ExtractConfig

Change = Callable[[str, Tensor], Tensor]
GPT2_LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def noise(tensor: Tensor, rank: int = 4, seed: int = 0) -> Tensor:
    """A random matrix of low rank, about a tenth as large as the weights."""
    generator = torch.Generator().manual_seed(seed + tensor.numel())
    left = torch.randn(tensor.shape[0], rank, generator=generator)
    return (left @ torch.randn(rank, tensor.shape[1], generator=generator)).to(tensor.dtype) * 1e-3


def tune(base: Path, path: Path, change: Change) -> Path:
    """A copy of a checkpoint with each tensor changed."""
    shutil.copytree(base, path)
    tensors = {n: change(n, t) for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def linear_layers(name: str, tensor: Tensor) -> Tensor:
    """Rank 4 on every linear layer of a block."""
    inside = tensor.dim() == 2 and (".layers." in name or name.endswith(GPT2_LAYERS))
    return tensor + noise(tensor) if inside else tensor


def config_of(base: Path, tuned: Path | str, **fields: Any) -> ExtractConfig:
    return ExtractConfig.model_validate({"base": str(base), "tuned": str(tuned), **fields})
