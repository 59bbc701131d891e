"""Digests of a model: one of its weights, one of the files beside them: config, tokenizer, code.

The digest of weights depends only on the tensors' names, dtypes, shapes and bytes: not on shards,
on the order of tensors in files, or on other files. A tensor's elements, row-major and
little-endian, are cut into blocks of `BLOCK_ELEMENTS`. A block's digest is the xxh3 hash (128 bits)
of its bytes. The digest of weights is

    fingerprint({name: [dtype, shape, [[first element of block, its digest], ...]], ...})

with the dtype as torch writes it (`torch.bfloat16`). So code that reads or writes whole blocks can
compute it at the same time, in any order of tensors and blocks. The digest of companions, the files
that travel with the model (pipelines/checkpoints/companions.py), is

    fingerprint({its place below the model's folder: fingerprint_file(file), ...})

Both detect damage and change; they do not protect against forgery.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pipelines.checkpoints.companions import RECORD_FILE, companions_of
from pipelines.checkpoints.reader import Checkpoint
from pipelines.fingerprint import fingerprint, fingerprint_file

BLOCK_ELEMENTS = 1 << 22
READ_ELEMENTS = 1 << 18
# The files in the digests of version 0.1.
_OLD_COMPANIONS = ("*.json", "*.jinja", "*.model")
_OLD_EXCEPTIONS = ("*.safetensors.index.json", RECORD_FILE, ".*")

Digests = dict[int, str]  # first element of a block -> 32 hex digits of its bytes
Identity = dict[str, list[int]]  # file -> length in bytes, time of change in ns


@dataclass(frozen=True, slots=True)
class ModelDigest:
    """A model's digests, 32 hex digits each: of its weights, of the files that travel with them."""

    weights: str
    companions: str


class BlockDigests:
    """Digests of one tensor's blocks, from its ranges in ascending order.

    A block has a digest only after all its elements were given.
    """

    def __init__(self, num_elements: int) -> None:
        self._num_elements = num_elements
        self._finished: Digests = {}
        self._hash = xxhash.xxh3_128()
        self._next = -1  # the element that follows the last hashed one

    def update(self, start: int, values: Tensor) -> None:
        """Hash the elements from `start` on: 1-D, in the stored dtype."""
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
        """The digests of the complete blocks."""
        return self._finished


def tensor_digests(checkpoint: Checkpoint, name: str) -> Digests:
    """Digests of a stored tensor, which is read here."""
    count = checkpoint.tensors[name].num_elements
    digests = BlockDigests(count)
    for start in range(0, count, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, count)
        digests.update(start, checkpoint.read(name, start, stop))
    return digests.finished()


def model_digest(checkpoint: Checkpoint, known: Mapping[str, Digests] | None = None) -> ModelDigest:
    """The digests of a checkpoint or adapter on disk.

    Args:
        known: digests of blocks by tensor, from an earlier read or write; a tensor with a missing
            block is read.
    """
    companions = companions_digest(checkpoint.path)
    return ModelDigest(fingerprint(_described(checkpoint, known or {})), companions)


def weights_digest(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], blocks: Mapping[str, Digests]
) -> str:
    """The digest of weights that need not be on a disk.

    Args:
        tensors: dtype and shape of each tensor.
        blocks: the digests of all blocks of each tensor.
    """
    return fingerprint(
        {
            name: [str(dtype), list(shape), sorted(blocks[name].items())]
            for name, (dtype, shape) in tensors.items()
        }
    )


def companions_digest(folder: Path) -> str:
    """The digest of the files beside a model's weights."""
    return fingerprint(_file_digests(companions_of(folder).files))


def changed_parts(checkpoint: Checkpoint, recorded: Mapping[str, str] | str) -> list[str]:
    """The parts of a checkpoint that differ from its record: `weights`, `companions`.

    Args:
        recorded: a `ModelDigest` as a mapping; or the one digest of earlier versions for both
            parts, which cannot say which of them differs.
    """
    if isinstance(recorded, str):
        files = {file.name: file for file in _old_companions(checkpoint.path)}
        content = fingerprint([_described(checkpoint, {}), _file_digests(files)])
        return [] if content == recorded else ["weights or companions"]
    found = asdict(model_digest(checkpoint))
    return [name for name, digest in found.items() if recorded.get(name) != digest]


def _old_companions(folder: Path) -> set[Path]:
    """The files beside the weights that are in a digest of version 0.1."""
    found = {file for pattern in _OLD_COMPANIONS for file in folder.glob(pattern)}
    return found - {file for pattern in _OLD_EXCEPTIONS for file in folder.glob(pattern)}


def identity(checkpoint: Checkpoint) -> Identity:
    """Length and modification time of each file; files with equal ones are not read again."""
    files = {tensor.file.name: tensor.file for tensor in checkpoint.tensors.values()}
    files |= companions_of(checkpoint.path).files
    stats = {name: file.stat() for name, file in sorted(files.items())}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class DigestMemory:
    """Digests from before: a model is not read again while its files keep their lengths and
    modification times.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Identity, ModelDigest]] = {}

    def load(self, content: str | bytes) -> None:
        """Take in the entries that `dump` gave, except for models that are known already. Other
        content is ignored.
        """
        try:
            for path, found in json.loads(content).items():
                digest = ModelDigest(found["weights"], found["companions"])
                self._known.setdefault(path, (found["files"], digest))
        except (AttributeError, KeyError, TypeError, ValueError):
            return

    def dump(self, models: Iterable[Path]) -> str:
        """The digests of these models, which must be known, as the content of a file."""
        known = {path: self._known[path] for path in map(_key, models)}
        entries = {p: {"files": files, **asdict(digest)} for p, (files, digest) in known.items()}
        return json.dumps(entries, indent=2) + "\n"

    def remember(self, checkpoint: Checkpoint, digest: ModelDigest) -> None:
        """Store the digest of a finished model."""
        self._known[_key(checkpoint.path)] = (identity(checkpoint), digest)

    def digest(
        self,
        checkpoint: Checkpoint,
        known: Mapping[str, Digests] | None = None,
        files: Identity | None = None,
    ) -> ModelDigest:
        """The digests of a model: known ones if its files are unchanged, else by `model_digest`.

        Args:
            files: the model's identity from before `known` was computed.
        """
        files = files or identity(checkpoint)  # before reading, so a later change is noticed
        found = self._known.get(_key(checkpoint.path))
        if found is None or found[0] != files:
            found = (files, model_digest(checkpoint, known))
            self._known[_key(checkpoint.path)] = found
        return found[1]


def _key(model: Path) -> str:
    return str(model.absolute())


def _described(checkpoint: Checkpoint, known: Mapping[str, Digests]) -> dict[str, list[Any]]:
    """Each tensor's dtype, shape and digests of blocks; unknown ones are read in threads."""

    def digests_of(name: str) -> Digests:
        num_blocks = -(-checkpoint.tensors[name].num_elements // BLOCK_ELEMENTS)
        found = known.get(name, {})
        return found if len(found) == num_blocks else tensor_digests(checkpoint, name)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = threads.map(digests_of, checkpoint.tensors)
        return {
            name: [str(tensor.dtype), list(tensor.shape), sorted(blocks.items())]
            for (name, tensor), blocks in zip(checkpoint.tensors.items(), digests, strict=True)
        }


def _file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {place: fingerprint_file(file) for place, file in files.items()}


def _memory(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data
