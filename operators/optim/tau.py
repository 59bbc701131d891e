"""tau, the reference delta `theta_ref - theta_base`: where it is read from, and where it is kept.

OnDARE keeps it dense: in bfloat16, 2 bytes for each element of this rank's shards. OnTIES keeps
top_p(tau), which is constant: as indices and values if these take less memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from operators.kernels.optimizer import SparseTau
from operators.optim.layout import ShardLayout
from operators.optim.options import check_choice

MissingDelta = Literal["error", "zero_rows", "exclude"]
DeltaPlacement = Literal["device", "host", "source"]
Keep = Callable[[Tensor, int], Tensor]  # F of a float32 host chunk and its first global index
_Place = tuple[str, int]  # a layout's name and first index


class DeltaSource(Protocol):
    """Gives any flat range of any parameter's tau, so that a rank reads only what it owns."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Global shape of a parameter's tau; None if the source has none for it."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's tau, row-major: (stop - start,) float32.

        Several threads may call it at the same time.
        """
        ...


class MappingDelta:
    """A `DeltaSource` around a mapping of parameter names to whole tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor with this name; None if there is none."""
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A flat range of the tensor with this name."""
        part = self._tensors[name].detach().reshape(-1)[start:stop]
        return part.to(torch.float32, copy=True)


@dataclass(slots=True)
class _Sparse:
    """The kept elements of a layout, in order: their indices relative to its start, their values,
    and for each chunk (by its first index) the slice of kept elements in it.
    """

    indices: Tensor  # (kept,) int32
    values: Tensor  # (kept,)
    chunks: dict[int, slice]

    def part(self, done: int, count: int) -> SparseTau:
        """The elements [done, done + count) of the layout, which must be whole chunks."""
        parts = [part for start, part in self.chunks.items() if done <= start < done + count]
        inside = slice(parts[0].start, parts[-1].stop)
        return SparseTau(self.indices[inside], self.values[inside], done)

    def write(self, done: int, dense: Tensor) -> Tensor:
        """Write the elements from `done` on, whole chunks, into `dense`, float32."""
        part = self.part(done, dense.numel())
        places = part.places.to(dense.device, torch.int64) - done
        return dense.zero_().scatter_(0, places, part.values.to(dense.device).float())


class Tau:
    """tau as an optimizer uses it: checked, padded, rounded to `dtype`, by chunk.

    Args:
        source: tensors by name, a `DeltaSource`, or None if no group has an alpha above 0.
        missing: if a parameter has no tau of its shape: `error`; `zero_rows` takes missing rows
            (tokens added later) as zero; `exclude` does not merge the parameter's updates.
        placement: keep tau on the parameter's `device`, on the `host` (pinned if there is a GPU),
            or read it from the `source` at every use.
        dtype: of the kept tau, bfloat16 or float32. Every placement rounds to it.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor] | DeltaSource | None,
        missing: MissingDelta = "error",
        placement: DeltaPlacement = "device",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_choice("missing_delta", missing, ("error", "zero_rows", "exclude"))
        check_choice("delta_placement", placement, ("device", "host", "source"))
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"delta_dtype: found {dtype}; allowed: torch.bfloat16 and torch.float32"
            )
        self.source = MappingDelta(source) if isinstance(source, Mapping) else source
        self._missing, self._placement, self._dtype = missing, placement, dtype
        self._dense: dict[_Place, Tensor] = {}
        self._kept: dict[_Place, Tensor | _Sparse | Keep] = {}

    def covers(self, layout: ShardLayout) -> bool:
        """Whether a parameter takes part in merging.

        Raises:
            ValueError: the parameter has no tau of its shape, and `missing` does not allow that.
        """
        if self.source is None:
            return True
        name, found = layout.name, self.source.shape(layout.name)
        if found == layout.shape or (self._missing == "zero_rows" and _fewer_rows(found, layout)):
            return True
        if self._missing == "exclude":
            return False
        if found is None:
            raise ValueError(f"reference_delta: has no tensor for parameter {name!r}")
        raise ValueError(
            f"reference_delta: {name!r} has shape {found}; the parameter's is {layout.shape}"
        )

    def read(self, layout: ShardLayout, start: int, count: int) -> Tensor:
        """tau's elements [start, start + count) from the source: (count,) float32 on the host.

        Raises:
            ValueError: tau holds NaN or Inf.
        """
        if self.source is None:
            return torch.zeros(count)
        rows_end = torch.Size(self.source.shape(layout.name) or ()).numel()
        stop = min(start + count, rows_end)
        tau = self.source.read(layout.name, start, stop) if start < stop else torch.zeros(0)
        # The sum needs one pass and no memory; it may also overflow, hence the second check.
        if not (torch.isfinite(tau.sum()) or torch.isfinite(tau).all()):
            raise ValueError(f"reference_delta: {layout.name!r} holds NaN or Inf")
        missing = count - tau.numel()
        # C passes and numpy read it by its address, also where the source lies on a GPU.
        tau = tau.to("cpu", torch.float32).contiguous()
        return torch.nn.functional.pad(tau, (0, missing)) if missing else tau

    def chunk(self, layout: ShardLayout, start: int, count: int, device: torch.device) -> Tensor:
        """tau's elements [start, start + count), inside the layout: `dtype` on `device`."""
        if self._placement == "source":
            return self.read(layout, start, count).to(self._dtype).to(device)
        kept = self.dense(layout, device)
        first = start - layout.start
        return kept[first : first + count].to(device)

    def dense(self, layout: ShardLayout, device: torch.device) -> Tensor:
        """The kept tau of a layout (on device or host): (count,), read at the first use."""
        place = (layout.name, layout.start)
        if place not in self._dense:
            kept = self._empty(layout.count, device)
            for start, at in layout.chunks():
                done = start - layout.start
                count = at.stop - at.start
                kept[done : done + count] = self.read(layout, start, count)
            self._dense[place] = kept
        return self._dense[place]

    def has_kept(self, layout: ShardLayout) -> bool:
        """Whether `keep` was called for this layout."""
        return (layout.name, layout.start) in self._kept

    def keep(self, layout: ShardLayout, keep: Keep, density: float, device: torch.device) -> None:
        """Keep F(tau) of a layout, if F is constant.

        Args:
            keep: computes F of a chunk.
            density: the share of elements that F keeps.
        """
        place = (layout.name, layout.start)
        if self._placement == "source":
            self._kept[place] = keep
            return
        width, small = self._dtype.itemsize, layout.count < 1 << 31  # int32 indices suffice
        parts = self._kept_chunks(layout, keep)
        if small and density * (4 + width) < width:
            self._kept[place] = self._sparse(parts, device)
            return
        dense = self._empty(layout.count, device)
        for done, values in parts:
            dense[done : done + values.numel()] = values
        self._kept[place] = dense

    def _sparse(self, parts: Iterator[tuple[int, Tensor]], device: torch.device) -> _Sparse:
        """The kept elements of chunks as indices and values."""
        indices, found, chunks, num_kept = [], [], {}, 0
        for done, values in parts:
            # numpy finds them several times as fast as torch's nonzero.
            places = torch.from_numpy(np.flatnonzero(values.numpy() != 0))
            indices.append((places + done).int())
            found.append(values[places].to(self._dtype))
            chunks[done] = slice(num_kept, num_kept + len(places))
            num_kept = chunks[done].stop
        sparse = _Sparse(
            self._empty(num_kept, device, torch.int32), self._empty(num_kept, device), chunks
        )
        for own, part, values in zip(chunks.values(), indices, found, strict=True):
            sparse.indices[own], sparse.values[own] = part, values
        return sparse

    def _kept_chunks(self, layout: ShardLayout, keep: Keep) -> Iterator[tuple[int, Tensor]]:
        """F(tau) of a layout in chunks, float32 on the host, each with its first local index."""
        for start, at in layout.chunks():
            yield start - layout.start, keep(self.read(layout, start, at.stop - at.start), start)

    def kept_chunk(self, layout: ShardLayout, start: int, room: Tensor) -> Tensor:
        """F(tau) of the elements [start, start + room.numel()), which must be whole chunks; dropped
        elements are zero. The result is on the device of `room` (float32), and is either written
        into `room` or a view of the kept tensor.
        """
        kept, done, count = (
            self._kept[layout.name, layout.start],
            start - layout.start,
            room.numel(),
        )
        if isinstance(kept, _Sparse):
            return kept.write(done, room)
        if isinstance(kept, Tensor):
            return kept[done : done + count].to(room.device)
        tau = kept(self.read(layout, start, count), start)
        return room.copy_(tau.to(self._dtype))

    def kept_sparse(self, layout: ShardLayout, start: int, count: int) -> SparseTau | None:
        """F(tau) of [start, start + count), which must be whole chunks, as indices and values; None
        if it is not kept that way.
        """
        kept = self._kept[layout.name, layout.start]
        return kept.part(start - layout.start, count) if isinstance(kept, _Sparse) else None

    def prepare(self, layout: ShardLayout, device: torch.device) -> None:
        """Read and keep a layout's tau before threads need it; not with placement `source`."""
        if self._placement != "source":
            self.dense(layout, device)

    def num_bytes(self) -> int:
        """Bytes that this rank keeps, on the device or the host."""
        tensors = list(self._dense.values())
        for kept in self._kept.values():
            if isinstance(kept, _Sparse):
                tensors += [kept.indices, kept.values]
            elif isinstance(kept, Tensor):
                tensors.append(kept)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _empty(self, count: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor for `count` values, on the device or the host."""
        dtype = dtype or self._dtype
        if self._placement == "host":
            return torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")
        return torch.empty(count, dtype=dtype, device=device)


def _fewer_rows(found: tuple[int, ...] | None, layout: ShardLayout) -> bool:
    """Whether tau has the parameter's shape except for missing last rows."""
    return (
        found is not None
        and len(found) == len(layout.shape) > 0
        and found[0] < layout.shape[0]
        and found[1:] == layout.shape[1:]
    )
