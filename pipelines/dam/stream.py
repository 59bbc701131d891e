"""Experts that do not stay on the device: a block of layers has its weights there only while it is
at work, and a thread brings those of the block that comes next meanwhile.

Layers ask a `Lent` for their weights at each use, forward and backward, so nothing else has to know
when a block begins or ends. At most two blocks are on the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import overload

import torch
from torch import Tensor

from pipelines.dam.layers import Turn

Read = Callable[[], Tensor]  # one weight, in the memory of the CPU
_Key = tuple[int, int | None]  # a block, and whose weights: an expert's, or all that are merged


class Stream:
    """The blocks of a model in the order of a forward pass."""

    def __init__(self, turn: Turn, num_blocks: int, device: torch.device) -> None:
        self._turn, self._device = turn, device
        self._blocks: list[list[tuple[Sequence[Read], bool]]] = [[] for _ in range(num_blocks)]
        self._thread = ThreadPoolExecutor(1, "experts")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._now: tuple[_Key, list[dict[int, Tensor]]] | None = None
        self._ahead: tuple[_Key, Future[list[dict[int, Tensor]]]] | None = None

    def lend(self, block: int, reads: Sequence[Read], *, merged: bool) -> "Lent":
        """A layer's weights.

        Args:
            block: its place in the order.
            reads: of each expert; where the layer is not merged, the base's follows.
            merged: whether the merged model needs all of them, not the base's.
        """
        self._blocks[block].append((reads, merged))
        return Lent(self, block, len(self._blocks[block]) - 1, len(reads))

    def tensor(self, block: int, layer: int, place: int) -> Tensor:
        """A weight on the device, for the use that is at hand alone."""
        key = (block, self._turn.expert)
        if self._now is None or self._now[0] != key:
            self._enter(key)
        assert self._now is not None
        return self._now[1][layer][place]

    def _enter(self, key: _Key) -> None:
        """Bring a block's weights, drop the last one's, and send for the next one's."""
        before, ahead, self._now, self._ahead = self._now, self._ahead, None, None
        backward = before is not None and before[0][0] > key[0] and before[0][1] == key[1]
        del before
        if ahead is None or ahead[0] != key:
            if ahead is not None:
                ahead[1].cancel()
            ahead = key, self._thread.submit(self._bring, key)
        values = ahead[1].result()
        if self._side is not None:  # the allocator must know that this stream uses them, too
            for each in values:
                for tensor in each.values():
                    tensor.record_stream(torch.cuda.current_stream(self._device))
        self._now = key, values
        following = self._following(key, backward)
        if following != key:
            self._ahead = following, self._thread.submit(self._bring, following)

    def _following(self, key: _Key, backward: bool) -> _Key:
        """The block that is likely to be next; a wrong guess costs time alone."""
        block, expert = key
        if backward:
            return max(block - 1, 0), expert
        if block + 1 < len(self._blocks):
            return block + 1, expert
        return (block - 1 if torch.is_grad_enabled() else 0), None

    def _bring(self, key: _Key) -> list[dict[int, Tensor]]:
        """The weights of a block's layers on the device, by their place among the experts."""
        found = []
        with torch.cuda.stream(self._side):
            for reads, merged in self._blocks[key[0]]:
                places: Sequence[int] = range(len(reads))
                if key[1] is not None or not merged:
                    places = [len(reads) - 1 if key[1] is None else key[1]]
                found.append({p: reads[p]().to(self._device, non_blocking=True) for p in places})
        if self._side is not None:
            self._side.synchronize()
        return found


class Lent(Sequence[Tensor]):
    """The weights of a layer in a stream: those of the experts; where it is not merged, the base's
    follow.
    """

    def __init__(self, stream: Stream, block: int, layer: int, count: int) -> None:
        self._stream, self._block, self._layer, self._count = stream, block, layer, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(place)
        return self._stream.tensor(self._block, self._layer, place % self._count)
