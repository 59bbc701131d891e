"""Writing a checkpoint in place: the layout is planned first; ranges are written at offsets."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pipelines.checkpoints.reader import INDEX, WEIGHTS
from pipelines.checkpoints.safetensors_header import StoredTensor, build_header
from pipelines.commit import write_atomically
from pipelines.storage import with_retries


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """The place of one tensor in the output."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """All files of an output: each one's header and length, and each tensor's place."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    tensors: dict[str, OutputTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())

    def create(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Create the files at their full length, so that a full disk fails at once.

        Files of an earlier attempt stay as they are.

        Args:
            names: of the files; default: all of them and the index.

        Raises:
            OSError: the disk has no room for them.
        """
        for name in self.headers if names is None else names:
            path, header = folder / name, self.headers[name]
            if path.is_file() and path.stat().st_size == self.sizes[name]:
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, self.sizes[name])
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)
        if names is None:
            self.write_index(folder)

    def write_index(self, folder: Path) -> None:
        """Write the index (tensor -> file) if there are several files."""
        if len(self.headers) > 1:
            total = sum(prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())
            places = {name: tensor.file for name, tensor in self.tensors.items()}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def stored(self, folder: Path) -> dict[str, StoredTensor]:
        """The tensors as a reader finds them."""
        return {
            name: StoredTensor(
                name, tensor.dtype, tensor.shape, folder / tensor.file, tensor.offset
            )
            for name, tensor in self.tensors.items()
        }

    def write(self, folder: Path, name: str, start: int, values: Tensor) -> None:
        """Write values (in the output's dtype) as a tensor's flat range from element `start` on."""
        tensor = self.tensors[name]
        assert values.dtype == tensor.dtype
        memory = values.contiguous().view(-1).view(torch.uint8).numpy().data
        place = tensor.offset + start * tensor.dtype.itemsize
        with_retries(lambda: _write(folder / tensor.file, memory, place))

    def sync(self, folder: Path) -> None:
        """Flush all files to the disk."""
        for name in self.headers:
            descriptor = os.open(folder / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _write(file: Path, memory: memoryview, place: int) -> None:
    """Write into a file from byte `place` on."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        while memory:
            count = os.pwrite(descriptor, memory, place)
            memory, place = memory[count:], place + count
    finally:
        os.close(descriptor)


def plan_layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    max_shard_bytes: int,
) -> OutputLayout:
    """Put tensors, in their order, into one file, or into shards of at most this many bytes."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    headers, sizes, places = {}, {}, {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        headers[file] = build_header(shard)
        place = len(headers[file])
        for name, (dtype, shape) in shard.items():
            places[name] = OutputTensor(dtype, shape, file, place)
            place += prod(shape) * dtype.itemsize
        sizes[file] = place
    return OutputLayout(headers, sizes, places)
