"""Which elements of a parameter this rank owns."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from operators.counter_random import canonical_name


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One flat range of a parameter on this rank.

    `name` is the parameter's name in the checkpoint, `shape` its global shape; the rank owns the
    row-major elements [start, start + count), which may be none. `group` holds the ranks that
    share the parameter; None where this process has all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    group: ProcessGroup | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)


def layout_of(name: str, parameter: Tensor) -> ShardLayout:
    """The layout of a plain parameter, or of a DTensor that is sharded by rows over one mesh axis.

    Raises:
        ValueError: a DTensor with another placement; names parameter and placement.
    """
    name = canonical_name(name)
    if not isinstance(parameter, DTensor):
        return ShardLayout(name, tuple(parameter.shape), 0, parameter.numel())
    if parameter.placements != (Shard(0),):
        raise ValueError(
            f"parameter {name!r}: found placement {parameter.placements}; "
            "allowed: a plain tensor, or a DTensor sharded by its rows over one mesh axis"
        )
    mesh = parameter.device_mesh
    rows, row_size = parameter.shape[0], prod(parameter.shape[1:])
    # torch.chunk's rule: equal shares, rounded up, so that the last ranks may own less or nothing.
    share = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * share, rows)
    count = local(parameter).numel()
    layout = ShardLayout(name, tuple(parameter.shape), first * row_size, count, mesh.get_group())
    assert count == (min(first + share, rows) - first) * row_size
    return layout


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, flat; it shares memory with the tensor."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.detach().view(-1)


def sum_over(group: ProcessGroup | None, counts: Tensor) -> Tensor:
    """Counts summed over the ranks of a group; unchanged without one."""
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts
