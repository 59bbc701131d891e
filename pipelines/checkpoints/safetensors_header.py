"""The safetensors format: the position of each tensor's bytes in a file.

A file is eight bytes (little-endian length of the header), the header (JSON: name -> dtype, shape,
offsets into the data), and the data, row-major and little-endian.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoints.source import TensorSpec
from pipelines.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """One tensor in a file; `offset` is the position of its first byte."""

    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_elements * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, checked against the file's length.

    Raises:
        InputError: not a safetensors file, a truncated one, or an unknown dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: not a safetensors file, or a truncated one ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path}: its safetensors header is damaged") from None
    return {name: _stored(name, entry, path, 8 + length, size) for name, entry in entries.items()}


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """An entry of a header: name of the dtype, shape, first byte, one after the last byte."""
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), int(begin), int(end)


def _stored(
    name: str, entry: tuple[str, tuple[int, ...], int, int], path: Path, data: int, size: int
) -> StoredTensor:
    """One checked tensor of a file; the file's data begin at byte `data`."""
    dtype, shape, begin, end = entry
    if dtype not in DTYPES:
        raise InputError(
            f"{path}: {name}: found dtype {dtype}; allowed: {', '.join(DTYPES)} "
            "(quantised checkpoints cannot be merged)"
        )
    tensor = StoredTensor(name, DTYPES[dtype], shape, path, data + begin)
    if begin < 0 or end - begin != tensor.num_bytes:
        raise InputError(f"{path}: {name}: its header is damaged: shape and offsets disagree")
    if data + end > size:
        raise InputError(f"{path}: truncated: {name} ends at byte {data + end} of {size}")
    return tensor


def build_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file with these tensors in this order; the data follow directly."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the data to eight bytes, for readers
    return struct.pack("<Q", len(text)) + text
