"""The definition of a model's digests, with json, hashlib and xxhash alone: the tests' oracle."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor


def blake2(value: Any) -> str:
    """32 hex digits of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def described(tensors: dict[str, Tensor], block: int = 1 << 22) -> dict[str, Any]:
    """Dtype, shape and the xxh3 hash of every `block` elements of each tensor."""
    result = {}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        size = tensor.dtype.itemsize
        blocks = [
            [first, xxhash.xxh3_128(raw[first * size : (first + block) * size]).hexdigest()]
            for first in range(0, tensor.numel(), block)
        ]
        result[name] = [str(tensor.dtype), list(tensor.shape), blocks]
    return result


def small_files(folder: Path, names: list[str]) -> dict[str, str]:
    """32 hex digits of each file's bytes."""
    return {
        name: hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
        for name in names
    }


def weights_digest(folder: Path) -> str:
    """The digest of the weights in a checkpoint of one file."""
    return blake2(described(load_file(folder / "model.safetensors")))
