"""Which parameters an optimizer's tensors hold, and the checks that need all ranks."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from operators.optim.layout import ShardLayout, layout_of, local, sum_over
from operators.optim.options import MergeOptions, check_dtype
from operators.optim.tau import Tau

Bound = tuple[list[ShardLayout], list[bool]]


class Bindings:
    """For each tensor of the optimizer, the ranges of parameters in it; built at first use."""

    def __init__(self, tau: Tau) -> None:
        self._tau = tau
        self._names: dict[Tensor, str] = {}
        self._layouts: dict[Tensor, list[ShardLayout]] = {}
        self._bound: dict[Tensor, Bound] = {}

    def add(
        self, names: Iterable[str], parameters: Iterable[Tensor], options: MergeOptions
    ) -> None:
        """Store the names of a group's parameters, and check the trainable ones."""
        for name, parameter in zip(names, parameters, strict=True):
            self._names[parameter] = name
            if parameter.requires_grad:
                self.of(parameter, options)

    def replace(self, layouts: Mapping[Tensor, Sequence[ShardLayout]]) -> None:
        """Bind the flat tensors that now hold the parameters.

        Raises:
            ValueError: ranges that overlap or leave their tensor.
        """
        for tensor, parts in layouts.items():
            end = 0
            for part in sorted(parts, key=lambda part: (part.offset, part.count)):
                stop, size = part.offset + part.count, local(tensor).numel()
                if part.offset < end or stop > size:
                    raise ValueError(
                        f"layouts: {part.name!r} at [{part.offset}, {stop}) overlaps another "
                        f"range or leaves its tensor of {size} elements"
                    )
                end = stop
        self._names.clear()
        self._bound.clear()
        self._layouts = {tensor: list(parts) for tensor, parts in layouts.items()}

    def of(self, tensor: Tensor, options: MergeOptions) -> Bound:
        """A tensor's ranges of parameters, and for each whether it is merged.

        Raises:
            ValueError: an unknown or non-contiguous tensor, a dtype that the group's rounding does
                not support, a parameter without a tau of its shape, or a row that is split where
                the sparsifier needs whole rows.
        """
        if tensor not in self._bound:
            if tensor in self._names:
                self._layouts[tensor] = [layout_of(self._names[tensor], tensor)]
            if tensor not in self._layouts:
                raise ValueError(
                    f"parameters: found a tensor of shape {tuple(tensor.shape)} that was not "
                    "given; allowed: the named parameters, or tensors given to `bind`"
                )
            layouts = self._layouts[tensor]
            if not tensor.is_contiguous():
                raise ValueError(
                    f"parameter {self.name(tensor)}: found one that is not contiguous; "
                    "allowed: row-major tensors"
                )
            check_dtype(layouts[0].name if layouts else "", tensor, options.rounding)
            merged = [options.merge and self._tau.covers(layout) for layout in layouts]
            _check_rows(layouts, options, tensor.device)
            self._bound[tensor] = layouts, merged
        return self._bound[tensor]

    def name(self, tensor: Tensor) -> str:
        """The name of a tensor for messages."""
        return ", ".join(repr(layout.name) for layout in self._layouts.get(tensor, [])[:3])

    def num_elements(self, dtype: torch.dtype) -> int:
        """The number of elements of all bound parameters in tensors of this dtype; it is the same
        on every rank and for every sharding.
        """
        sizes = {
            layout.name: layout.num_elements
            for tensor, layouts in self._layouts.items()
            for layout in layouts
            if tensor.dtype == dtype
        }
        return sum(sizes.values())

    def flags_anywhere(self, flags: Tensor) -> Tensor:
        """Nonzero for each flag that is set on this rank or on a rank that shares a parameter.

        Args:
            flags: int64 (n,), 0 where not set; the same n on every rank.
        """
        every = [layout.group for layouts in self._layouts.values() for layout in layouts]
        for group in dict.fromkeys(every):
            flags = sum_over(group, flags)
        return flags


def _check_rows(
    layouts: Sequence[ShardLayout], options: MergeOptions, device: torch.device
) -> None:
    """Raise ValueError if the sparsifier needs whole rows and a rank has parts of rows."""
    if options.needs != "row" or not options.merge:
        return
    for layout in layouts:
        cut = torch.tensor([not layout.has_whole_rows], dtype=torch.int64, device=device)
        if sum_over(layout.group, cut).item():  # summed over ranks, so that all ranks raise
            raise ValueError(
                f"sparsifier: found {options.names[0]!r}, which needs whole rows, on parameter "
                f"{layout.name!r}, of which this rank has the elements [{layout.start}, "
                f"{layout.start + layout.count}) of rows of {layout.width}; allowed: a sharding by "
                "rows, or a sparsifier on elements"
            )
