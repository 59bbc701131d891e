"""Lazy reading of Hugging Face checkpoints: any flat range of a tensor."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.checkpoints.architecture import tied_names
from pipelines.checkpoints.safetensors_header import StoredTensor, read_header
from pipelines.errors import InputError
from pipelines.storage import is_address, with_retries

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory, one file or sharded; opening it reads only headers."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the headers.

        Raises:
            InputError: no checkpoint there, pickled weights only, or damaged files.
        """
        path = Path(path)
        config = path / "config.json"
        if not path.is_dir():
            if is_address(path):
                raise InputError(f"model {path}: found an address; allowed: a folder")
            raise InputError(f"model {path}: no such directory")
        if not config.is_file():
            raise InputError(f"model {path}: no config.json; expected a Hugging Face checkpoint")
        settings = read_json(config)
        if "quantization_config" in settings:
            raise InputError(
                f"{config}: quantization_config: a quantised checkpoint cannot be merged; allowed: "
                "one with float weights"
            )
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(path):
            tensors |= read_header(file)
        return cls(path, settings, tensors)

    @property
    def home(self) -> Path:
        """The folder of its config.json: its own."""
        return self.path

    @property
    def num_elements(self) -> int:
        """Elements of all tensors together."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def embedding(self) -> str | None:
        """The input embedding's name, if exactly one is stored."""
        names = [name for name in self.tensors if is_embedding(name)]
        return names[0] if len(names) == 1 else None

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding and not stored separately. If the config does not say,
        a missing head means that it is tied.
        """
        settings = self.config.get("text_config") or self.config
        tied = bool(settings.get("tie_word_embeddings", True))
        return tied and HEAD not in self.tensors and self.embedding is not None

    @classmethod
    def at(cls, path: Path) -> Self:
        """The files of a checkpoint, or of an adapter alone, without its base."""
        settings = path / "adapter_config.json"
        if not settings.is_file():
            return cls.open(path)
        return cls(path, read_json(settings), read_header(path / "adapter_model.safetensors"))

    def checkpoints(self) -> Iterable["Checkpoint"]:
        """All checkpoints that are read: itself."""
        return [self]

    def names(self) -> Iterable[str]:
        """All stored tensors, in the order of the files."""
        return self.tensors.keys()

    def find(self, name: str) -> StoredTensor | None:
        """The tensor with this name; a tied head is the embedding."""
        if name == HEAD and self.is_tied:
            assert self.embedding is not None
            return self.tensors[self.embedding]
        if name in self.tensors:
            return self.tensors[name]
        others = (other for other in tied_names(self.config, name) if other in self.tensors)
        return self.tensors.get(next(others, ""))

    def stored(self, name: str) -> tuple["Checkpoint", StoredTensor] | None:
        """This checkpoint and the stored tensor; None for a tied head, which is not stored."""
        found = self.tensors.get(name)
        return None if found is None else (self, found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor in row-major order: 1-D, in the stored dtype."""
        tensor = self.find(name)
        assert tensor is not None, name
        return read_range(tensor, start, tensor.num_elements if stop is None else stop)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of a model whose head is no longer its embedding."""
    result = config | {"tie_word_embeddings": False}
    if "tie_word_embeddings" in (config.get("text_config") or {}):
        result["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return result


def is_embedding(name: str) -> bool:
    """Whether a tensor is an input embedding, by the usual names."""
    return _EMBEDDING.search(name) is not None


def read_range(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a stored tensor: 1-D, in the stored dtype."""
    assert 0 <= start <= stop <= tensor.num_elements, (tensor.name, start, stop)
    result = torch.empty(stop - start, dtype=tensor.dtype)
    if stop == start:
        return result
    memory = result.view(torch.uint8).numpy().data
    place = tensor.offset + start * tensor.dtype.itemsize
    with_retries(lambda: _fill(memory, tensor, place))
    return result


def _fill(memory: memoryview, tensor: StoredTensor, place: int) -> None:
    """Read a tensor's file from byte `place` on."""
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        while memory:
            count = os.preadv(descriptor, [memory], place)
            if count == 0:
                raise InputError(f"{tensor.file}: truncated while it was read: {tensor.name}")
            memory, place = memory[count:], place + count
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        InputError: it is not valid JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: not valid JSON: found {type(found).__name__}, expected an object"
        )
    return found


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory; as in transformers, a single file is
    preferred to shards.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / INDEX
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise InputError(f"{index}: weight_map: required, not given")
        names = sorted(set(places.values()), key=str)
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(
                    f"{index}: weight_map: found {name!r}; allowed: files of the same folder"
                )
            if not (path / name).is_file():
                raise InputError(f"model {path}: {INDEX} names {name}, which is missing")
        return [path / name for name in names]
    for pattern in ("*.bin", "*.pt", "*.pth"):
        for file in path.glob(pattern):
            raise InputError(
                f"model {path}: found {file.name}, a pickle, which can run code; allowed: "
                "safetensors (convert it: load it with transformers where you trust it, then "
                "save_pretrained)"
            )
    raise InputError(f"model {path}: no {WEIGHTS} and no {INDEX}")
