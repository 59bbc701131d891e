"""Small models for tests of merges: a base and deltas of a given kind."""

import numpy as np
import torch
from torch import Tensor


def family(
    shape: tuple[int, ...], count: int = 3, seed: int = 0, *, coarse: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A base and `count` models, float32; `coarse` deltas have few magnitudes, so many ties."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    if coarse:
        base = (base * 8).round() / 8
    models = []
    for _ in range(count):
        delta = torch.randn(shape, generator=generator)
        models.append(base + ((delta * 2).round() / 8 if coarse else delta * 0.1))
    return base, models


def deltas_of(base: Tensor, models: list[Tensor]) -> list[np.ndarray]:
    """The deltas as merges see them: float32 differences, here in float64 and flat."""
    return [(model - base).double().numpy().reshape(-1) for model in models]
