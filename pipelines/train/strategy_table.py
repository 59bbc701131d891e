"""The table of strategies: their classes, the options they support, and a worker's memory.

A new strategy is an entry here and the class that it names; all other code reads these traits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.train.memory import ModelShape

ZERO_BUCKET = 50_000_000  # elements whose gradients ZeRO reduces at once
ZERO_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The traits of a strategy. Bytes are per worker, for a model with n parameters, of which
    `trained` have gradients, and b bytes per number in the passes.
    """

    implementation: str  # module and class, imported when a run needs them
    is_sharded: bool  # whether state and gradients are sharded over workers
    beside: str  # the strategy of a reference model that runs beside the policy
    family: str = "native"  # strategies of one family can resume from each other's checkpoints
    zero_stage: int = 0
    package: str | None = None  # a package that it needs
    one_worker: bool = False
    takes_adapters: bool = True
    takes_asynchronous_checkpoints: bool = True
    takes_cpu_offload: bool = True

    def weight_bytes(self, n: int, b: int, workers: int) -> int:
        """Weights of the passes beside the master weights; autocast keeps a copy during a pass."""
        return b * n if b == 2 else 0

    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        """Gradients while they are accumulated."""
        return 4 * trained

    def gathered_bytes(self, shape: "ModelShape", b: int) -> int:
        """Temporary buffers: gathered weights of blocks, and gradients in a reduction."""
        return 0


@dataclass(frozen=True, kw_only=True)
class _Replicated(Traits):
    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        return 8 * trained  # DDP's buckets are copies


@dataclass(frozen=True, kw_only=True)
class _ShardedByRows(Traits):
    def weight_bytes(self, n: int, b: int, workers: int) -> int:
        return 0

    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        return 4 * trained // workers

    def gathered_bytes(self, shape: "ModelShape", b: int) -> int:
        once = 2 * shape.largest_block + shape.outside_blocks
        return b * once + (b + 4) * max(shape.largest_block, shape.outside_blocks)


@dataclass(frozen=True, kw_only=True)
class _Zero(Traits):
    """DeepSpeed's stages: state (1), gradients too (2), weights too (3)."""

    implementation: str = "pipelines.train.strategies.zero:ZeroStrategy"
    is_sharded: bool = True
    beside: str = "fsdp2"
    package: str | None = "deepspeed"
    takes_adapters: bool = False
    takes_asynchronous_checkpoints: bool = False

    def weight_bytes(self, n: int, b: int, workers: int) -> int:
        return b * n // (workers if self.zero_stage == 3 else 1)

    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        return 4 * trained // workers + (b * trained if self.zero_stage == 1 else 0)

    def gathered_bytes(self, shape: "ModelShape", b: int) -> int:
        once = 2 * shape.largest_block + shape.outside_blocks
        kept = min(shape.num_parameters, max(once, ZERO_LIVE)) if self.zero_stage == 3 else 0
        return b * (kept + min(shape.num_parameters, ZERO_BUCKET))


STRATEGIES: dict[str, Traits] = {
    "single": Traits(
        implementation="pipelines.train.strategies.native:SingleStrategy",
        is_sharded=False,
        beside="single",
        one_worker=True,
        takes_cpu_offload=False,
    ),
    "ddp": _Replicated(
        implementation="pipelines.train.strategies.native:DdpStrategy",
        is_sharded=False,
        beside="single",
        takes_cpu_offload=False,
    ),
    "fsdp2": _ShardedByRows(
        implementation="pipelines.train.strategies.native:Fsdp2Strategy",
        is_sharded=True,
        beside="fsdp2",
    ),
    "zero1": _Zero(family="zero1", zero_stage=1),
    "zero2": _Zero(family="zero2", zero_stage=2),
    "zero3": _Zero(family="zero3", zero_stage=3),
}


def those_that(trait: str) -> str:
    """The names of the strategies with a trait, for a message."""
    return ", ".join(name for name, traits in STRATEGIES.items() if getattr(traits, trait))
