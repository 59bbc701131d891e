"""Weights that are brought block by block. Oracle: the list of what is read."""

import time
from functools import partial

import pytest
import torch
from torch import Tensor

from pipelines.dam.layers import Turn
from pipelines.dam.stream import Lent, Stream

NUM_BLOCKS, NUM_EXPERTS = 4, 3


class Files:
    """Four blocks, each with a merged layer of three experts and one that is the base's."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str, int]] = []
        self.turn = Turn()
        stream = Stream(self.turn, NUM_BLOCKS, torch.device("cpu"))
        self.layers: list[dict[str, Lent]] = []
        for block in range(NUM_BLOCKS):
            counts = {"merged": NUM_EXPERTS, "base's": NUM_EXPERTS + 1}
            self.layers.append(
                {
                    kind: stream.lend(
                        block,
                        [partial(self._values, block, kind, place) for place in range(count)],
                        merged=kind == "merged",
                    )
                    for kind, count in counts.items()
                }
            )

    def _values(self, block: int, kind: str, place: int) -> Tensor:
        self.read.append((block, kind, place))
        return torch.tensor([block, place])

    def wait_for(self, expected: list[tuple[int, str, int]]) -> None:
        """Until the thread has read so many; then they are these."""
        end = time.monotonic() + 20
        while len(self.read) < len(expected) and time.monotonic() < end:
            time.sleep(0.001)
        assert self.read == expected


def whole(block: int) -> list[tuple[int, str, int]]:
    """What the merged model needs of a block."""
    return [*((block, "merged", place) for place in range(NUM_EXPERTS)), (block, "base's", 3)]


def test_the_next_block_is_brought_before_it_is_asked_for() -> None:
    """Forward, and then backward, without any that is brought twice."""
    files, expected = Files(), []
    order = [0, 1, 2, 3, 2, 1, 0]
    for at, block in enumerate(order):
        layer = files.layers[block]["merged"]
        assert [each.tolist() for each in layer] == [[block, place] for place in range(3)]
        assert files.layers[block]["base's"][-1].tolist() == [block, 3]
        expected += whole(0) if at == 0 else []
        expected += whole(order[at + 1]) if at + 1 < len(order) else []
        files.wait_for(expected)


def test_a_pass_of_one_expert_brings_it_alone() -> None:
    files = Files()
    files.turn.expert = 1
    with torch.no_grad():
        for block in range(NUM_BLOCKS):
            for kind in ("merged", "base's"):
                assert files.layers[block][kind][1].tolist() == [block, 1]
    alone = [(block, kind, 1) for block in range(NUM_BLOCKS) for kind in ("merged", "base's")]
    files.wait_for([*alone, *whole(0)])  # a pass of the merged model follows
    assert len(files.layers[0]["merged"]) == 3
    with pytest.raises(IndexError):
        files.layers[0]["merged"][3]


def test_what_a_file_lacks_is_an_error_of_the_pass_that_needs_it() -> None:
    def broken() -> Tensor:
        raise OSError("gone")

    stream = Stream(Turn(), 1, torch.device("cpu"))
    with pytest.raises(OSError, match="gone"):
        stream.lend(0, [broken], merged=True)[0]
