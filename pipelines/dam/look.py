"""A look at learned coefficients: of each tensor and expert their mean, spread and signs; a heat
map of the means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipelines.merge.coefficients import Coefficients
from pipelines.report.plots import empty_figure, saved

_ROW_INCHES, _MOST_INCHES = 0.16, 40.0


@dataclass(frozen=True, slots=True)
class Look:
    """The coefficients of one tensor and one expert.

    Attributes:
        count: of numbers: columns, or 1 for a bias.
        mean, deviation: over the columns; the deviation is that of the population.
        least, most: the smallest and the largest one.
        negative: the share below 0.
    """

    tensor: str
    expert: str
    count: int
    mean: float
    deviation: float
    least: float
    most: float
    negative: float


def look_at(coefficients: Coefficients) -> list[Look]:
    """All tensors, in the order of their names, each with all experts."""
    names, found = expert_names(coefficients), []
    for tensor, values in sorted(coefficients.tensors.items()):
        for expert, own in zip(names, values.double().view(len(values), -1), strict=True):
            found.append(
                Look(
                    tensor=tensor,
                    expert=expert,
                    count=own.numel(),
                    mean=own.mean().item(),
                    deviation=own.std(correction=0).item(),
                    least=own.min().item(),
                    most=own.max().item(),
                    negative=(own < 0).double().mean().item(),
                )
            )
    return found


def expert_names(coefficients: Coefficients) -> list[str]:
    """The experts in their order; the base is last if it is one."""
    settings = coefficients.settings
    return [*settings.models, *([settings.base_model] if settings.include_base else [])]


def plot_means(looks: Sequence[Look], experts: Sequence[str]) -> bytes:
    """A heat map as PNG: tensors x experts, coloured by the mean; white is 1 / T."""
    tensors = list(dict.fromkeys(each.tensor for each in looks))
    means = torch.tensor([each.mean for each in looks]).view(len(tensors), len(experts))
    middle = 1 / len(experts)
    most = max((means - middle).abs().max().item(), 1e-6)
    height = min(_MOST_INCHES, 1.2 + _ROW_INCHES * len(tensors))
    figure = empty_figure(4.5 + 0.8 * len(experts), height)
    axes = figure.add_subplot()
    image = axes.imshow(
        means.numpy(), aspect="auto", cmap="RdBu_r", vmin=middle - most, vmax=middle + most
    )
    axes.set_xticks(range(len(experts)), experts, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(tensors)), tensors, fontsize=5)
    axes.set_title("mean coefficient", fontsize=8)
    figure.colorbar(image, ax=axes)
    return saved(figure)["png"]
