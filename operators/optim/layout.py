"""Which elements of a parameter this rank owns."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from operators.counter_random import WORDS, canonical_name
from operators.kernels import CHUNK


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One flat range of a parameter on this rank.

    `name` is the parameter's name in the checkpoint, `shape` its global shape. The rank owns the
    row-major elements [start, start + count); count may be 0. In this rank's flat tensor they begin
    at `offset`, which is 0 unless the tensor is a flat partition of several parameters. If a rank
    owns several ranges of a parameter, each has a layout. `group` holds the ranks that share the
    parameter; None if this process has all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    group: ProcessGroup | None = None
    offset: int = 0

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row: the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def has_whole_rows(self) -> bool:
        """Whether the range splits no row."""
        width = max(1, self.width)
        return self.start % width == 0 and self.count % width == 0

    def row_chunks(self) -> Iterator[tuple[int, slice]]:
        """As `chunks`, but in chunks of whole rows."""
        size = max(1, CHUNK // max(1, self.width)) * self.width
        for done in range(0, self.count, max(1, size)):
            last = min(done + size, self.count)
            yield self.start + done, slice(self.offset + done, self.offset + last)

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, slice]]:
        """The range in chunks: the first global index of each, and its place in the flat tensor.
        No chunk crosses a multiple of 2^32, so its indices share their upper half.
        """
        done = 0
        while done < self.count:
            start = self.start + done
            count = min(size, self.count - done, WORDS - start % WORDS)
            yield start, slice(self.offset + done, self.offset + done + count)
            done += count


def layout_of(name: str, parameter: Tensor) -> ShardLayout:
    """The layout of a plain parameter, or of a DTensor that is sharded by rows over one mesh axis
    and replicated over all others (FSDP2, and its hybrid form).

    Raises:
        ValueError: a DTensor with another placement; the message names parameter and placement.
    """
    name, shape = canonical_name(name), tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return ShardLayout(name, shape, 0, parameter.numel())
    axes = [i for i, at in enumerate(parameter.placements) if not isinstance(at, Replicate)]
    if not axes:
        return ShardLayout(name, shape, 0, parameter.numel())
    if [parameter.placements[i] for i in axes] != [Shard(0)]:
        raise ValueError(
            f"parameter {name!r}: found placement {parameter.placements}; "
            "allowed: a plain tensor, or a DTensor sharded by its rows over one mesh axis"
        )
    mesh, [axis] = parameter.device_mesh, axes
    rows, row_size = shape[0], prod(shape[1:])
    # As torch.chunk: equal shares, rounded up, so the last ranks may own less or nothing.
    share = -(-rows // mesh.size(axis))
    first = min(mesh.get_local_rank(axis) * share, rows)
    count = local(parameter).numel()
    assert count == (min(first + share, rows) - first) * row_size
    return ShardLayout(name, shape, first * row_size, count, mesh.get_group(axis))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, flat; it shares memory with the tensor."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.detach().view(-1)


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient (not None): flat, row-major."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    return gradient.detach().reshape(-1).contiguous()


def sum_over(group: ProcessGroup | None, counts: Tensor) -> Tensor:
    """Sum counts over the ranks of a group; without a group they are unchanged."""
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts
