"""The memory that learning coefficients needs, by formula, before anything is loaded.

With b bytes per number (4, or 2 in bf16), T experts, t tokens in a pass, layers of width h and
inner width i, a vocabulary of v, and C coefficients:

    experts       b T times the parameters, and b times those that are the base's
    coefficients  16 C: values, gradients, Adam's moments
    activations   b t (15 h + 4 i) per layer; with gradient checkpointing b t h per layer and one
                  full layer
    logits        t v (2 b + 12): the expert's and the merged ones, their log-probabilities and a
                  gradient, in float32
    formed        8 times the largest merged matrix and b times it, where it is formed
"""

from dataclasses import dataclass, fields
from math import prod

from operators.dam import forms_weight
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.checkpoints.reader import Checkpoint
from pipelines.dam.config import DamConfig
from pipelines.dam.model import settings_of
from pipelines.merge.coefficients import Role
from pipelines.train.memory import shape_of


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device."""

    experts: int
    coefficients: int
    activations: int
    logits: int
    formed: int

    @property
    def total(self) -> int:
        """The peak, which is reached in a backward pass."""
        return sum(getattr(self, each.name) for each in fields(self))


def estimate_memory(config: DamConfig, roles: dict[str, tuple[str, Role]], length: int) -> Memory:
    """The formula above.

    Args:
        config: with folders.
        roles: of the model's parameters.
        length: tokens of the longest row.
    """
    known = architecture_of(Checkpoint.open(config.base_model).config)
    assert isinstance(known, Architecture)  # it has roles
    shape, settings = shape_of(config.base_model), settings_of(config)
    b, experts = 2 if config.precision == "bf16" else 4, settings.num_experts
    merged = {n: role for n, (_, role) in roles.items() if role.kind in settings.merged_kinds}
    sizes = {name: prod(known.shapes[name]) for name in merged}
    tokens = length * config.rows_per_set
    layer = b * tokens * (15 * shape.hidden_size + 4 * shape.inner_size)
    activations = layer * shape.num_layers
    if config.gradient_checkpointing:
        activations = b * tokens * shape.hidden_size * shape.num_layers + layer
    formed = [
        size * (8 + b)
        for name, size in sizes.items()
        if merged[name].kind in ("linear", "head")
        and forms_weight(tokens, known.shapes[name][0], config.materialise)
    ]
    return Memory(
        experts=b * (experts * shape.num_parameters + shape.num_parameters - sum(sizes.values())),
        coefficients=16 * sum(prod(role.shape(experts)) for role in merged.values()),
        activations=activations,
        logits=tokens * shape.vocabulary * (2 * b + 12),
        formed=max(formed, default=0),
    )
