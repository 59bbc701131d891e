"""Where an engine's weights come from: a checkpoint's files, or a merge that is computed here.

Both are a stream of named tensors in the dtypes that the files have or would have. What goes into
an engine is looked at on its way: NaN and Inf are refused, and the digest of weights is taken.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.rounding import is_finite
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.adapter import is_adapter
from pipelines.checkpoints.companions import companions_of, is_of_tokenizer
from pipelines.checkpoints.digests import BlockDigests, weights_digest
from pipelines.errors import InputError
from pipelines.merge.contexts import model_contexts
from pipelines.merge.executors import check_gpu, many_short_calls
from pipelines.merge.kept import Kept, KeptMerge
from pipelines.merge.plan import MergePlan
from pipelines.merge.tensor import gather_contexts

_FEW_ELEMENTS = 1 << 22  # a merge of fewer is done before threads have started
Described = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


class Weights(Protocol):
    """A model's weights as a stream, with what stands beside them."""

    @property
    def name(self) -> str:
        """For messages to the user."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def tensors(self) -> Mapping[str, Described]:
        """All tensors, known before any is read."""

    @property
    def text_files(self) -> Mapping[str, Path | str]:
        """The tokenizer's files by their names: where each is, or its text."""

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, once, in its shape and dtype.

        Raises:
            InputError: values that a merge cannot use.
        """


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """The weights in a checkpoint's folder."""

    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: str | Path) -> "CheckpointWeights":
        """Read the headers.

        Raises:
            InputError: no checkpoint there, damaged files, or an adapter beside the model.
        """
        if (Path(path) / "config.json").is_file() and is_adapter(Path(path)):
            raise InputError(
                f"model {path}: holds an adapter beside the model; allowed: one of them "
                "(poise merge makes a model of both)"
            )
        return cls(Checkpoint.open(path))

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.checkpoint.path)

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, Described]:
        """From the headers."""
        return {name: (each.dtype, each.shape) for name, each in self.checkpoint.tensors.items()}

    @property
    def text_files(self) -> Mapping[str, Path | str]:
        """The tokenizer's files in the folder."""
        files = companions_of(self.checkpoint.path).files
        return {place: file for place, file in files.items() if is_of_tokenizer(place)}

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors, in the order of the files."""
        for name, tensor in self.checkpoint.tensors.items():
            yield name, self.checkpoint.read(name).view(tensor.shape)


@dataclass(frozen=True, slots=True)
class MergeWeights:
    """The weights that a merge would write, bit for bit.

    Attributes:
        kept: what earlier merges of the same models have left in memory; None reads the models.
    """

    plan: MergePlan
    kept: Kept | None = None

    @property
    def name(self) -> str:
        """The method."""
        return f"merge by {self.plan.config.merge_method}"

    @property
    def config(self) -> dict[str, Any]:
        """The output's config.json."""
        return self.plan.files.config

    @property
    def tensors(self) -> Mapping[str, Described]:
        """The output's tensors."""
        return {name: (each.dtype, each.shape) for name, each in self.plan.tensors.items()}

    @property
    def text_files(self) -> Mapping[str, Path | str]:
        """The output's tokenizer."""
        files: dict[str, Path | str] = {**self.plan.files.copied, **self.plan.files.written}
        return {place: file for place, file in files.items() if is_of_tokenizer(place)}

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Merged tensors in the output's order. Each is merged by one thread, as in files, so that
        sums are the same; a tensor a worker is computed ahead.
        """
        check_gpu(self.plan)
        num_workers, tensors = self.plan.config.num_workers, self.plan.tensors
        kept = None if self.kept is None else KeptMerge(self.kept, self.plan.identities)
        if kept is not None and any(tensor.is_of_model for tensor in tensors.values()):
            tensors = {name: kept.prepared(tensor) for name, tensor in tensors.items()}
        gather = gather_contexts if kept is None else kept.contexts
        contexts = model_contexts(tensors, num_workers, gather)
        names = iter(tensors)

        def merged(name: str) -> Tensor:
            tensor = tensors[name] if kept is None else kept.prepared(tensors[name])
            if tensor.models[0].held is None and self.plan.is_held(tensor):
                tensor = tensor.in_memory()
            context = contexts.get(name)
            if context is None:
                context = gather({name: tensor})[name]
            values = torch.empty(tensor.num_elements, dtype=tensor.dtype)
            for start, stop in tensor.steps(0, tensor.num_elements):
                values[start:stop] = tensor.rounded(tensor.merged(start, stop, context), start)
            return values.view(tensor.shape)

        if sum(tensor.num_elements for tensor in tensors.values()) < _FEW_ELEMENTS:
            with many_short_calls():
                yield from ((name, merged(name)) for name in names)
            return
        with many_short_calls(), ThreadPoolExecutor(num_workers) as pool:
            running = deque(
                (name, pool.submit(merged, name)) for name in islice(names, num_workers)
            )
            try:
                while running:
                    name, future = running.popleft()
                    values = future.result()
                    running.extend((each, pool.submit(merged, each)) for each in islice(names, 1))
                    yield name, values
            finally:
                pool.shutdown(cancel_futures=True)


def weights_of(source: "str | Path | MergePlan | Weights") -> Weights:
    """What an engine's user may give as weights.

    Raises:
        InputError: a folder that is no checkpoint, or a merge that writes named merges on its way.
    """
    if isinstance(source, str | Path):
        return CheckpointWeights.open(source)
    if isinstance(source, MergePlan):
        for name in source.named:
            raise InputError(f"merges.{name}.out: has no effect in a merge that is not written")
        return MergeWeights(source)
    return source


class Inspection:
    """Looks at tensors on their way: refuses NaN and Inf (but in masks, which have zeros and -Inf
    alone), takes the digest of weights.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._blocks: dict[str, dict[int, str]] = {}

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The weights' tensors.

        Raises:
            InputError: NaN or Inf in a tensor.
        """
        for name, tensor in self._weights.stream():
            if tensor.is_floating_point() and not (is_finite(tensor) or _is_mask(tensor)):
                raise InputError(
                    f"{self._weights.name}: {name}: holds NaN or Inf; allowed: finite numbers"
                )
            blocks = BlockDigests(tensor.numel())
            blocks.update(0, tensor.reshape(-1))
            self._blocks[name] = blocks.finished()
            yield name, tensor

    @property
    def digest(self) -> str:
        """The digest of weights, after the stream has ended."""
        return weights_digest(self._weights.tensors, self._blocks)


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is one of the few that hold infinities for good."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def inspect(weights: Weights) -> str:
    """Read weights that go nowhere: returns their digest.

    Raises:
        InputError: NaN or Inf in a tensor.
    """
    inspection = Inspection(weights)
    deque(inspection.stream(), maxlen=0)
    return inspection.digest


def stored_dtype(weights: Weights) -> torch.dtype:
    """The dtype of a model: as its config says, else that of its first floating tensor."""
    name = weights.config.get("dtype") or weights.config.get("torch_dtype")
    named = getattr(torch, str(name), None)
    if isinstance(named, torch.dtype):
        return named
    floating = (dtype for dtype, _ in weights.tensors.values() if dtype.is_floating_point)
    return next(floating, torch.float32)


def check_same_shapes(new: Weights, old: Mapping[str, Described]) -> None:
    """Raise InputError where new weights have other names or shapes than the running ones."""
    for name in [*old.keys() - new.tensors.keys(), *new.tensors.keys() - old.keys()]:
        has, lacks = ("the engine's model", "it") if name in old else ("it", "the engine's model")
        raise InputError(
            f"swap: {new.name}: {name} is in {has} and not in {lacks}; allowed: the same tensors"
        )
    for name, (_, shape) in new.tensors.items():
        if shape != old[name][1]:
            raise InputError(
                f"swap: {new.name}: {name}: found shape {list(shape)}; allowed: "
                f"{list(old[name][1])}, as in the engine's model"
            )


# What a config.json says that changes no answer: where it comes from, and in which dtype it is
# stored; numbers of tokens are the tokenizer's affair.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
}


def check_same_config(new: Weights, old: Mapping[str, Any]) -> None:
    """Raise InputError where weights of the same shapes would be computed with in another way."""
    for key in sorted((new.config.keys() | old.keys()) - _WITHOUT_EFFECT):
        if _comparable(new.config.get(key)) != _comparable(old.get(key)):
            raise InputError(
                f"swap: {new.name}: config.json: {key}: found {new.config.get(key)!r}; allowed: "
                f"{old.get(key)!r}, as in the engine's model"
            )


def comparable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json weights must have in common to be computed with in one way."""
    found = _comparable(config)
    return {key: value for key, value in found.items() if value is not None}


def _comparable(value: Any) -> Any:
    """A config's value without what has no effect; absent and null are one."""
    if isinstance(value, Mapping):
        return {k: _comparable(v) for k, v in value.items() if k not in _WITHOUT_EFFECT}
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
