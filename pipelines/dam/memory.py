"""The memory that learning coefficients needs, by formula, before anything is loaded.

With b bytes per number (4, or 2 in bf16), T experts, t tokens in a pass, layers of width h and
inner width i, a vocabulary of v, C coefficients, and W workers:

    experts       b T times the parameters, and b times those that are the base's; divided by W for
                  fsdp2; 0 if they are brought layer by layer
    gathered      b (T + 1) times the parameters of two largest blocks and of everything outside the
                  blocks (fsdp2), or b T times those of twice the larger of the two (single, where
                  experts are brought)
    coefficients  16 C: values, gradients, Adam's moments
    activations   b t (15 h + 4 i) per layer; with gradient checkpointing b t h per layer and one
                  full layer
    logits        t v (2 b + 12): the expert's and the merged ones, their log-probabilities and a
                  gradient, in float32
    formed        8 + b times the largest merged matrix where it is formed, or the part of it that
                  is formed at once on a GPU (on a CPU it is less)
    host          in host memory: what `experts` is elsewhere, with `experts: host`
"""

from dataclasses import dataclass, fields
from math import prod

from operators.dam import FORMED_AT_ONCE, forms_weight
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.checkpoints.reader import Checkpoint
from pipelines.dam.config import DamConfig
from pipelines.dam.model import settings_of
from pipelines.merge.coefficients import Role
from pipelines.train.memory import shape_of


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a worker on its device, and beside it in host memory."""

    experts: int
    gathered: int
    coefficients: int
    activations: int
    logits: int
    formed: int
    host: int

    @property
    def total(self) -> int:
        """The device's peak, which is reached in a backward pass."""
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


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
        min(size, FORMED_AT_ONCE["cuda"]) * (8 + b)
        for name, size in sizes.items()
        if merged[name].kind in ("linear", "head")
        and forms_weight(tokens, known.shapes[name][0], config.materialise)
    ]
    weights = b * (experts * shape.num_parameters + shape.num_parameters - sum(sizes.values()))
    is_brought, gathered = config.experts != "device", 0
    if config.strategy == "fsdp2":
        weights //= config.num_workers
        gathered = b * (experts + 1) * (2 * shape.largest_block + shape.outside_blocks)
    elif is_brought:
        gathered = b * experts * 2 * max(shape.largest_block, shape.outside_blocks)
    return Memory(
        experts=0 if is_brought else weights,
        gathered=gathered,
        coefficients=16 * sum(prod(role.shape(experts)) for role in merged.values()),
        activations=activations,
        logits=tokens * shape.vocabulary * (2 * b + 12),
        formed=max(formed, default=0),
        host=weights if config.experts == "host" else 0,
    )
