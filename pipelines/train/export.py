"""The aligned model as an ordinary checkpoint (every rank writes its elements in place), and its
provenance.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from operators.kernels.choice import merging_kernels
from operators.kernels.merging import MergingKernels
from operators.optim import ShardLayout
from operators.rounding import Rounded, loses, round_to
from pipelines.checkpoints import Checkpoint, OutputLayout, plan_layout
from pipelines.checkpoints.adapter import ADAPTER_CONFIG
from pipelines.checkpoints.companions import (
    check_links,
    companions_of,
    copy_files,
    is_of_tokenizer,
)
from pipelines.checkpoints.digests import (
    BlockDigests,
    Digests,
    ModelDigest,
    companions_digest,
    model_digest,
)
from pipelines.checkpoints.hub import hub_ids, recorded
from pipelines.checkpoints.module_view import Part, copied_tensors
from pipelines.checkpoints.reader import read_json
from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.hub.cache import snapshot_of
from pipelines.merge.output_files import GENERATION_FILE
from pipelines.provenance import Provenance
from pipelines.rounding import Row, rounding_record, rounding_text, row_of
from pipelines.train.adapter_files import write_adapter
from pipelines.train.architecture import RewardHead
from pipelines.train.config import SAVED_DTYPES, AlignConfig, SavedDtype
from pipelines.train.evaluation_config import evaluation_text
from pipelines.train.files import ADAPTER_FOLDER
from pipelines.train.models import model_paths, with_names
from pipelines.train.strategies import Strategy, first_rank, wait_for_all
from pipelines.train.strategies.loading import empty_model

MAX_SHARD_BYTES = 5_000_000_000


class Owner(Protocol):
    """The holder of the weights: a strategy, or a checkpoint."""

    parameter_names: frozenset[str]
    tied_names: Mapping[str, list[str]]  # a parameter's first name -> its other names

    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        """Flat ranges of parameters; all ranks together have each element once."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """A written model's digests, and what its dtype keeps of the change (pipelines/rounding.py);
    None for an adapter alone.
    """

    digest: ModelDigest
    rounding: dict[str, Any] | None


def export_model(
    owner: Owner,
    source: Path,
    folder: Path,
    dtype: SavedDtype = "source",
    head: RewardHead | None = None,
) -> Exported | None:
    """Write the policy with the names, layout, dtypes and other files of `source`.

    Parameters are rounded once, from the master weights, and written under each of their names in
    `source`, which need not be those of the model; other tensors are copied. Every rank must call.

    Args:
        dtype: of all floating tensors; `source`: each has its own.
        head: of a reward model.

    Returns:
        on the first rank; None on the others.

    Raises:
        InputError: a value that the written dtype cannot hold.
    """
    _, weights = empty_model(source, head)
    checkpoint = weights.source
    assert isinstance(checkpoint, Checkpoint)
    tensors = {n: (written_dtype(t.dtype, dtype), t.shape) for n, t in checkpoint.tensors.items()}
    kernels = merging_kernels(checkpoint.num_elements)
    layout = plan_layout(tensors, MAX_SHARD_BYTES)
    if first_rank():
        _begin(checkpoint, folder, layout, dtype)
    wait_for_all()
    seen = {name: BlockDigests(tensor.num_elements) for name, tensor in checkpoint.tensors.items()}
    rows: list[Row] = []
    for part, values in owner.owned():
        for name in (part.name, *owner.tied_names.get(part.name, ())):
            for place in weights.parts(name, part.start, values.detach()):
                kind = tensors[place.name][0]
                rounded = _rounded(checkpoint, place, kind, kernels)
                if not rounded.is_finite:
                    raise InputError(
                        f"model: {name}: a trained value does not fit into {kind}, or is NaN"
                    )
                if loses(kind):
                    rows.append(row_of(place.name, place.start, rounded.kept))
                layout.write(folder, place.name, place.start, rounded.values)
                seen[place.name].update(place.start, rounded.values)
    if first_rank():
        for name in copied_tensors(weights, owner.parameter_names):
            copied = checkpoint.read(name).to(tensors[name][0])
            layout.write(folder, name, 0, copied)
            seen[name].update(0, copied)
    wait_for_all()
    layout.sync(folder)
    known, rows = _of_all_ranks({name: digests.finished() for name, digests in seen.items()}, rows)
    if not first_rank():
        return None
    # Blocks that no single rank wrote as a whole are read again.
    written = Checkpoint(folder, checkpoint.config, layout.stored(folder))
    found = rounding_record(rows, [each for each, _ in tensors.values()], str(source))
    return Exported(model_digest(written, known), found)


def _rounded(
    source: Checkpoint, place: Part, dtype: torch.dtype, kernels: MergingKernels | None
) -> Rounded:
    """Trained values in the written dtype, beside those of the source where it may lose some."""
    exact = place.values.float().reshape(-1)
    base = None
    if loses(dtype):
        base = source.read(place.name, place.start, place.start + exact.numel())
    return round_to(dtype, exact, base, kernels)


def _begin(source: Checkpoint, folder: Path, layout: OutputLayout, dtype: SavedDtype) -> None:
    """Make the output's folder, with space for the weights and the files beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layout.create(folder)
    others = companions_of(source.path)
    check_links(source.path, others.foreign)
    copy_files({k: f for k, f in others.files.items() if not _is_of_adapter(k)}, folder)
    config = source.config if dtype == "source" else with_dtype(source.config, dtype)
    if config != read_json(source.path / "config.json"):
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def written_dtype(own: torch.dtype, wanted: SavedDtype) -> torch.dtype:
    """The dtype of a tensor in the output; integers keep theirs."""
    return own if wanted == "source" or not own.is_floating_point else SAVED_DTYPES[wanted]


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json of weights in a dtype; its parts that name one have it too."""
    parts = {k: with_dtype(v, dtype) for k, v in config.items() if _names_dtype(v)}
    result = dict(config) | parts
    return result | {"torch_dtype" if "torch_dtype" in result else "dtype": dtype}


def _names_dtype(part: Any) -> bool:
    return isinstance(part, Mapping) and ("dtype" in part or "torch_dtype" in part)


def export_result(strategy: Strategy, config: AlignConfig, folder: Path) -> Exported | None:
    """Write what the config asks for: the model, with adapters merged in; the adapter alone, with
    the source's tokenizer; or both. Every rank must call.

    Returns, raises: as `export_model`.
    """
    save = "merged" if config.lora is None else config.lora.save
    if save == "adapter":
        return _export_adapter(strategy, config, folder)
    saved = export_model(strategy, config.model, folder, config.save.dtype, config.head)
    if save == "both":
        write_adapter(strategy, config, folder / ADAPTER_FOLDER)
    if saved is not None and save == "both":
        digest = replace(saved.digest, companions=companions_digest(folder))
        saved = replace(saved, digest=digest)
    return saved


def _export_adapter(strategy: Strategy, config: AlignConfig, folder: Path) -> Exported | None:
    """Write the adapter alone."""
    if first_rank():
        shutil.rmtree(folder, ignore_errors=True)
    write_adapter(strategy, config, folder)
    wait_for_all()
    if not first_rank():
        return None
    files = companions_of(config.model).files
    copy_files(
        {k: f for k, f in files.items() if is_of_tokenizer(k) and k != GENERATION_FILE}, folder
    )
    return Exported(model_digest(Checkpoint.at(folder)), None)


def _of_all_ranks(own: dict[str, Digests], rows: list[Row]) -> tuple[dict[str, Digests], list[Row]]:
    """The digests and the sums of all ranks; waits for all of them."""
    if not dist.is_initialized():
        return own, rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (own, rows))
    digests = {name: {k: v for part, _ in parts for k, v in part[name].items()} for name in own}
    return digests, [row for _, part in parts for row in part]


def provenance(
    config: AlignConfig,
    kind: Literal["aligned", "exported"],
    digest: ModelDigest,
    *,
    key: str,
    inputs: Mapping[str, str],
    num_steps: int,
    details: Mapping[str, Any],
) -> Provenance:
    """A trained model's provenance; the card tells `details["rounding"]`.

    Args:
        key: the fingerprint of the work.
        inputs: the fingerprints of the inputs, by the config's fields.
    """
    sets = [*config.sets, *config.held_out_sets]
    paths = [*model_paths(config).values(), *(each.path for each in sets)]
    data = [found[0].id for each in config.sets if (found := snapshot_of(each.path)) is not None]
    config = with_names(config)
    rounding = details.get("rounding")
    told = "" if rounding is None else f"\n\n{rounding_text(rounding)}"
    evaluated = details.get("evaluation")
    if evaluated is not None:
        told = f"\n- held-out rows: {evaluation_text(evaluated)}{told}"
    is_adapter = config.lora is not None and config.lora.save == "adapter"
    made = "an adapter for it, trained" if is_adapter else "trained"
    return Provenance(
        kind=kind,
        digest=digest,
        fingerprint=key,
        config=config.model_dump(mode="json", exclude={"storage", "cache"}),
        inputs=inputs,
        seed=config.seed,
        details={**details, **recorded(paths)},
        title=f"Trained by {config.objective.label} with {config.optimizer.name}",
        base_models=hub_ids(str(config.model)),
        datasets=sorted(set(data)),
        tags=config.objective.names,
        library="peft" if is_adapter else "transformers",
        summary=(
            f"Made with Poise: `{config.model}`, {made}.\n\n"
            f"- objective: {config.objective.label}\n"
            f"- optimizer: {config.optimizer.name}\n"
            f"- data: {', '.join(f'`{each.path}`' for each in config.sets)}\n"
            f"- steps: {num_steps:,} of {config.global_batch_size} rows{told}"
        ),
    )


def _is_of_adapter(place: str) -> bool:
    """Whether a file of the source is an adapter's, which does not fit the trained model."""
    return place == ADAPTER_CONFIG or PurePosixPath(place).parts[0] == ADAPTER_FOLDER
