"""Fingerprints of weights, taken block by block while a merge reads them anyway."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipelines.checkpoints.reader import Checkpoint
from pipelines.fingerprint import fingerprint, fingerprint_file

# Elements of a block: whoever reads it in whatever steps gets the same digest.
BLOCK_ELEMENTS = 1 << 22
READ_ELEMENTS = 1 << 18
CONFIG_FILES = ("*.json", "*.jinja", "*.model")
# The index only says where tensors lie, and a record of how a model came about is not the model.
NOT_CONTENT = ("*.safetensors.index.json", "poise.json", ".*")

Digests = dict[int, str]  # first element of a block -> 32 hex digits of its bytes


class BlockDigests:
    """Digests of one tensor's blocks, fed with its ranges in ascending order.

    A block of which not every element was seen has no digest.
    """

    def __init__(self, num_elements: int) -> None:
        self._num_elements = num_elements
        self._finished: Digests = {}
        self._hash = xxhash.xxh3_128()
        self._next = -1  # the element that goes on with what was hashed

    def update(self, start: int, values: Tensor) -> None:
        """Take in the elements from `start` on: 1-D, in the stored dtype."""
        done = 0
        while done < values.numel():
            place = start + done
            block = place - place % BLOCK_ELEMENTS
            end = min(block + BLOCK_ELEMENTS, self._num_elements)
            count = min(end - place, values.numel() - done)
            if place == block:
                self._hash.reset()
            if place in (block, self._next):
                self._hash.update(_memory(values[done : done + count]))
                self._next = place + count
                if self._next == end:
                    self._finished[block] = self._hash.hexdigest()
            done += count

    def finished(self) -> Digests:
        """The digests of the blocks that were seen from beginning to end."""
        return self._finished


def tensor_digests(checkpoint: Checkpoint, name: str) -> Digests:
    """Digests of a stored tensor, read for this alone."""
    count = checkpoint.tensors[name].num_elements
    digests = BlockDigests(count)
    for start in range(0, count, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, count)
        digests.update(start, checkpoint.read(name, start, stop))
    return digests.finished()


def checkpoint_fingerprint(
    checkpoint: Checkpoint, known: Mapping[str, Digests], names: Iterable[str] | None = None
) -> str:
    """32 hex digits of a checkpoint's tensors and of the small files beside them.

    Args:
        known: digests that a merge has taken already; the other blocks are read.
        names: the tensors that matter; default all.
    """
    tensors = {}
    for name in sorted(checkpoint.tensors if names is None else names):
        stored = checkpoint.tensors[name]
        digests = known.get(name, {})
        if len(digests) != -(-stored.num_elements // BLOCK_ELEMENTS):
            digests = tensor_digests(checkpoint, name)
        tensors[name] = [str(stored.dtype), list(stored.shape), sorted(digests.items())]
    return fingerprint([tensors, small_files(checkpoint.path)])


def small_files(path: Path) -> dict[str, str]:
    """Digests of config and tokenizer files."""
    found = {file for pattern in CONFIG_FILES for file in path.glob(pattern)}
    found -= {file for pattern in NOT_CONTENT for file in path.glob(pattern)}
    return {file.name: fingerprint_file(file) for file in sorted(found)}


def identity(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Length and time of change of each file: equal ones need not be read again."""
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    files |= {checkpoint.path / name for name in small_files(checkpoint.path)}
    stats = {file.name: file.stat() for file in sorted(files)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _memory(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy())
