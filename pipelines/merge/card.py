"""The files beside the merged weights: config, tokenizer, record and card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from operators.merging import mixup_lambda
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import copy_files
from pipelines.checkpoints.digests import DigestMemory, companions_digest, model_digest
from pipelines.checkpoints.hub import recorded
from pipelines.commit import write_atomically
from pipelines.merge.config import MergeConfig
from pipelines.merge.journal import digests_of
from pipelines.merge.output_files import CONFIG_FILE, OutputFiles
from pipelines.merge.pins import ids_of
from pipelines.merge.plan import OUTPUT, MergePlan
from pipelines.provenance import Provenance
from pipelines.rounding import rounding_record, rounding_text


def write_companions(
    plan: MergePlan,
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    memory: DigestMemory,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write everything but the weights into the output's folder.

    Args:
        results: of the workers: digests of the blocks that they read and wrote, and what rounding
            keeps.
        memory: known digests of inputs; new ones are added.
        details: further fields of the record.
    """
    _write_files(plan.files, folder)
    output = Checkpoint(folder, plan.files.config, plan.layout.stored(folder))
    made = provenance(plan, output, results, memory)
    replace(made, details={**made.details, **(details or {})}).write(folder)


def digest_of_companions(files: OutputFiles) -> str:
    """The digest of the files beside a merge's weights, as if they were written."""
    with TemporaryDirectory() as folder:
        _write_files(files, Path(folder))
        return companions_digest(Path(folder))


def _write_files(files: OutputFiles, folder: Path) -> None:
    """Write config, tokenizer and what else travels with the weights."""
    copy_files(files.copied, folder)
    for place, text in files.written.items():
        write_atomically(folder / place, text)
    write_atomically(folder / CONFIG_FILE, json.dumps(files.config, indent=2) + "\n")


def drawn(plan: MergePlan) -> dict[str, float]:
    """The numbers that the seed drew once for the merge: M3's lambda, if the method has it. For
    named merges, the key begins with the merge's name.
    """
    found = {}
    for tensor in plan.tensors.values():
        if "mixup_lambda" in tensor.parameters:
            found["mixup_lambda"] = mixup_lambda(tensor.parameters, plan.config.seed)
            break
    for name, each in plan.config.merges.items():
        if "mixup_lambda" in each.method.parameters:
            given = {"mixup_alpha": None, "mixup_lambda": None} | each.parameters
            found[f"{name}.mixup_lambda"] = mixup_lambda(given, each.seed)
    return found


def provenance(
    plan: MergePlan,
    output: Checkpoint,
    results: Sequence[Mapping[str, Any]],
    memory: DigestMemory,
) -> Provenance:
    """The output's provenance."""
    digests, rounding = digests_of(results), rounding_of_merge(plan, results)
    base = plan.config.base_model
    rooted = "" if base is None else f"Base model: `{base}`\n\n"
    listed = "\n".join(f"- `{model}`" for model in plan.config.merged_models)
    draws = drawn(plan)
    told = "".join(f"\n\nDrawn: {name} = {value:.6f}" for name, value in draws.items())
    told += "" if rounding is None else f"\n\n{rounding_text(rounding)}"
    return Provenance(
        kind="merged",
        digest=model_digest(output, digests.get(OUTPUT, {})),
        fingerprint=plan.key,
        config=plan.settings,
        inputs=plan.input_digests(digests, memory),
        seed=plan.config.seed,
        details={
            "drawn": draws,
            "settings": plan.settings_key,
            "rounding": rounding,
            **({"coefficients": dict(plan.coefficients)} if plan.coefficients else {}),
            **recorded(each.path for each in plan.checkpoints.values()),
        },
        title=f"Merge by {plan.config.merge_method}",
        base_models=ids_of(list(_written(plan.config))),
        tags=["merge"],
        summary=(
            f"Made with Poise: {plan.config.method.summary}.\n\n{rooted}Models:\n\n{listed}{told}"
        ),
    )


def rounding_of_merge(
    plan: MergePlan, results: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What the output's dtype keeps of the change; None where an earlier version, which did not add
    it up, did a part of the merge.
    """
    if any("rounding" not in result for result in results):
        return None
    has_base = any(tensor.base is not None for tensor in plan.tensors.values())
    origin = plan.config.base_model if has_base else plan.config.merged_models[0]
    if has_base or len(plan.config.merged_models) == 1:
        named = str(origin)
    elif plan.config.has_slices:
        named = "the first model of each slice"
    else:
        named = f"{origin}, the first model"
    rows = [row for result in results for row in result["rounding"]]
    return rounding_record(rows, [t.dtype for t in plan.tensors.values()], named)


def _written(config: MergeConfig) -> Iterator[str]:
    """The models of a merge, the base first; a named merge is replaced by its own models."""
    for name in [config.base_model, *config.merged_models]:
        if name in config.merges:
            merge = config.merges[name]
            yield from _written(merge.model_copy(update={"merges": config.merges_before(name)}))
        elif name is not None:
            yield name
