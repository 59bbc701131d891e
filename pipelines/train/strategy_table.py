"""The strategies by name: what each is, what goes with it, and what a worker holds under it.

A new strategy is an entry here and the class that it names; everything else asks these traits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.train.memory import ModelShape

ZERO_BUCKET = 50_000_000  # elements whose gradients ZeRO reduces at once
ZERO_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a strategy is. The numbers of bytes are a worker's: of a model of n parameters, of which
    `trained` have gradients, with b bytes a number in the passes.
    """

    implementation: str  # module and class, imported when a run needs them
    is_sharded: bool  # whether workers share out state and gradients
    beside: str  # the strategy of a reference model that runs beside the policy
    family: str = "native"  # strategies of one family go on from each other's checkpoints
    zero_stage: int = 0
    package: str | None = None  # to be installed for it
    one_worker: bool = False
    takes_adapters: bool = True
    takes_asynchronous_checkpoints: bool = True
    takes_cpu_offload: bool = True

    def weight_bytes(self, n: int, b: int, workers: int) -> int:
        """Weights of the passes that are not the masters: autocast keeps a copy through a pass."""
        return b * n if b == 2 else 0

    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        """Gradients while they add up."""
        return 4 * trained

    def gathered_bytes(self, shape: "ModelShape", b: int) -> int:
        """What is put together for a while: weights of blocks, gradients on their way to others."""
        return 0


@dataclass(frozen=True, kw_only=True)
class _Replicated(Traits):
    def gradient_bytes(self, trained: int, b: int, workers: int) -> int:
        return 8 * trained  # its buckets are copies


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
    """The names of the strategies that have a trait, for a message."""
    return ", ".join(name for name, traits in STRATEGIES.items() if getattr(traits, trait))
