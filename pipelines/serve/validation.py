"""A checkpoint is looked at whole before it may answer anybody: files, shapes, dtypes, every value.

It is read once, by ranges, in threads; nothing of it is kept but the digest of its weights. What is
wrong is said in one line that names the file or the tensor.
"""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from operators.rounding import is_finite
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.architecture import built_architecture, vocabulary_size
from pipelines.checkpoints.digests import (
    READ_ELEMENTS,
    BlockDigests,
    Digests,
    changed_parts,
    identity,
    weights_digest,
)
from pipelines.checkpoints.reader import INDEX, WEIGHTS, read_json
from pipelines.engines.config import DTYPES, EngineConfig
from pipelines.engines.models import check_kind
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.provenance import read_record, recorded_digest
from pipelines.serve.config import DeployConfig, ServeConfig
from pipelines.serve.groups import Group, groups_of
from pipelines.serve.models import check_servable, engine_device, look_at
from pipelines.serve.names import Version

NUM_LISTED = 3


@dataclass(frozen=True, slots=True)
class ValidCheckpoint:
    """A checkpoint that was read whole and found right.

    Attributes:
        weights: the digest of its weights, from the bytes that were read.
        num_bytes: of its tensors.
    """

    checkpoint: Checkpoint
    weights: str
    num_bytes: int


def validated(
    path: str | Path,
    *,
    kind: Literal["generate", "reward"] = "generate",
    head: str | int | None = None,
    probe: Callable[[Path], None] | None = None,
) -> ValidCheckpoint:
    """Read a checkpoint whole and check it.

    Args:
        kind, head: what it is to do, as in an engine's config.
        probe: called last with the folder; it asks the model something, and raises InputError where
            the answer is none.

    Raises:
        InputError: a file that is missing, truncated or damaged; tensors that its config.json does
            not build, or in a dtype that no engine computes in; NaN or Inf; weights that are not
            those of its record; tokens that it has no rows for; files that changed meanwhile.
    """
    path = Path(path)
    weights = CheckpointWeights.open(path)
    checkpoint = weights.checkpoint
    before = identity(checkpoint)
    check_kind(weights, EngineConfig(kind=kind, head=head))
    _check_files(checkpoint)
    _check_shapes(checkpoint)
    _check_dtypes(checkpoint)
    _check_tokens(checkpoint)
    digest = _read_whole(checkpoint)
    _check_record(checkpoint, digest)
    if probe is not None:
        probe(path)
    if identity(checkpoint) != before:
        raise InputError(f"model {path}: its files changed while they were read; try again")
    return ValidCheckpoint(
        checkpoint, digest, sum(each.num_bytes for each in checkpoint.tensors.values())
    )


def examine(name: str, path: str, config: ServeConfig, *, is_known: bool = False) -> Group:
    """Read a checkpoint whole that a name is to mean; returns the group that its shape makes.

    Args:
        is_known: it was served already, wherever it lies.

    Raises:
        InputError: it is outside the allowed folders, or not fit to be served under this name.
    """
    model = config.models[name]
    assert config.deploy is not None
    folder = Path(path) if is_known else _allowed(path, config.deploy)
    for file in [] if is_known else sorted(folder.glob("*")):
        _allowed(str(file), config.deploy)  # where a link leads
    found = validated(folder, kind=model.kind, head=model.head)
    if config.engine.name == "vllm":
        check_servable([look_at(folder)], engine_device())
    version = Version(found.weights, str(folder))
    alone = config.model_copy(update={"models": {name: model}})
    [group] = groups_of(alone, {name: version}, {}, 1)
    return group


def _allowed(path: str, config: DeployConfig) -> Path:
    """A path without its links, below one of the allowed folders."""
    found = Path(path).expanduser().resolve()
    folders = [Path(each).expanduser().resolve() for each in config.folders]
    if not any(found.is_relative_to(folder) for folder in folders):
        raise InputError(f"path: found {path}; allowed: below {', '.join(config.folders)}")
    return found


def _check_files(checkpoint: Checkpoint) -> None:
    """Raise InputError where a file is not just its tensors, or the index tells of others."""
    from safetensors import SafetensorError, safe_open

    path, found = checkpoint.path, Counter[str]()
    is_sharded = not (path / WEIGHTS).is_file()
    places = read_json(path / INDEX)["weight_map"] if is_sharded else {}
    for file in sorted(set(places.values())) or [WEIGHTS]:
        try:
            with safe_open(path / file, framework="pt") as opened:
                found.update(opened.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"model {path}: {file}: cannot be read: {error}") from None
    for name, count in found.items():
        if count > 1:
            raise InputError(f"model {path}: {name} is in {count} of its files; allowed: in one")
    for name in [*places, *checkpoint.tensors] if is_sharded else []:
        tensor = checkpoint.tensors.get(name)
        in_file = "no file" if tensor is None else tensor.file.name
        if places.get(name) != in_file:
            said = places.get(name, "no place")
            raise InputError(f"model {path}: {INDEX}: {name}: found {said}; it is in {in_file}")


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Raise InputError where transformers would not load just these tensors into the model."""
    path = checkpoint.path
    try:
        architecture = built_architecture(checkpoint.config)
    except InputError as error:
        raise InputError(f"model {path}: {error}") from None
    if architecture is None:
        [name, *_] = checkpoint.config.get("architectures") or ["none"]
        raise InputError(
            f"model {path}: config.json: architectures: found {name}; allowed: a class of "
            "transformers"
        )
    report = architecture.try_loading(checkpoint.tensors)
    for name, found, needed in report.mismatched:
        raise InputError(
            f"model {path}: {name}: found shape {found}; allowed: {needed}, as config.json has it"
        )
    for what, names in (("lacks", report.missing), ("has no place for", report.unexpected)):
        if names:
            raise InputError(
                f"model {path}: {what} {_listed(names)}, by config.json's {architecture.name}"
            )


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """Raise InputError for dtypes that an engine would round, which changes answers unnoticed."""
    path, dtypes = checkpoint.path, set()
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype.is_floating_point:
            dtypes.add(tensor.dtype)
            if tensor.dtype not in DTYPES.values():
                raise InputError(
                    f"model {path}: {name}: found {tensor.dtype}; allowed: {', '.join(DTYPES)}"
                )
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if said is not None and getattr(torch, str(said), None) not in dtypes:
        names = " and ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
        raise InputError(
            f"model {path}: config.json: dtype: found {said}; allowed: {names}, as its tensors are"
        )


def _check_tokens(checkpoint: Checkpoint) -> None:
    """Raise InputError for a tokenizer that does not load, or gives tokens without a row."""
    from transformers import AutoTokenizer

    path = checkpoint.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries' own errors have no common base class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: its tokenizer does not load: {first}") from None
    size = vocabulary_size(checkpoint.config)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if size is not None and largest >= size:
        raise InputError(
            f"model {path}: its tokenizer gives token {largest}; its vocabulary has {size} tokens"
        )


def _read_whole(checkpoint: Checkpoint) -> str:
    """The digest of the weights; every value is looked at.

    Raises:
        InputError: NaN or Inf, or a file that became shorter.
    """
    names = list(checkpoint.tensors)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        blocks = threads.map(lambda name: _read_tensor(checkpoint, name), names)
        digests = dict(zip(names, blocks, strict=True))
    described = {name: (each.dtype, each.shape) for name, each in checkpoint.tensors.items()}
    return weights_digest(described, digests)


def _read_tensor(checkpoint: Checkpoint, name: str) -> Digests:
    """The digests of a tensor's blocks. NaN and Inf are refused, but in masks, which have zeros and
    -Inf alone.
    """
    count = checkpoint.tensors[name].num_elements
    digests, finite, masking = BlockDigests(count), True, True
    for start in range(0, count, READ_ELEMENTS):
        values = checkpoint.read(name, start, min(start + READ_ELEMENTS, count))
        digests.update(start, values)
        if values.is_floating_point():
            finite = finite and is_finite(values)
            masking = masking and bool(((values == 0) | (values == -torch.inf)).all())
        if not (finite or masking):
            raise InputError(
                f"model {checkpoint.path}: {name}: holds NaN or Inf; allowed: finite numbers"
            )
    return digests.finished()


def _check_record(checkpoint: Checkpoint, digest: str) -> None:
    """Raise InputError where the weights are not those that the model's own record describes."""
    record = read_record(checkpoint.path)
    known = None if record is None else recorded_digest(record)
    if isinstance(known, dict) and known["weights"] != digest:
        raise InputError(
            f"model {checkpoint.path}: found weights {digest}; its poise.json describes "
            f"{known['weights']}"
        )
    if isinstance(known, str) and changed_parts(checkpoint, known):
        raise InputError(f"model {checkpoint.path}: its files are not those of its poise.json")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(names[:NUM_LISTED]) + more
