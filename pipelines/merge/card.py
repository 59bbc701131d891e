"""The files beside the merged weights: config, tokenizer, record and card."""

import json
from collections.abc import Iterator
from pathlib import Path

from operators.merging import mixup_lambda
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import copy_files
from pipelines.checkpoints.digests import DigestMemory, model_digest
from pipelines.checkpoints.hub import recorded
from pipelines.commit import write_atomically
from pipelines.merge.config import MergeConfig
from pipelines.merge.output_files import CONFIG_FILE
from pipelines.merge.pins import ids_of
from pipelines.merge.plan import OUTPUT, KnownDigests, MergePlan
from pipelines.provenance import Provenance


def write_companions(
    plan: MergePlan, folder: Path, digests: KnownDigests, memory: DigestMemory
) -> None:
    """Write everything but the weights into the output's folder.

    Args:
        digests: of the blocks that the workers read and wrote, by path and tensor.
        memory: known digests of inputs; new ones are added.
    """
    copy_files(plan.files.copied, folder)
    for place, text in plan.files.written.items():
        write_atomically(folder / place, text)
    write_atomically(folder / CONFIG_FILE, json.dumps(plan.files.config, indent=2) + "\n")
    output = Checkpoint(folder, plan.files.config, plan.layout.stored(folder))
    provenance(plan, output, digests, memory).write(folder)


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
    plan: MergePlan, output: Checkpoint, digests: KnownDigests, memory: DigestMemory
) -> Provenance:
    """The output's provenance."""
    base = plan.config.base_model
    rooted = "" if base is None else f"Base model: `{base}`\n\n"
    listed = "\n".join(f"- `{model}`" for model in plan.config.merged_models)
    draws = drawn(plan)
    told = "".join(f"\n\nDrawn: {name} = {value:.6f}" for name, value in draws.items())
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
            **recorded(each.path for each in plan.checkpoints.values()),
        },
        title=f"Merge by {plan.config.merge_method}",
        base_models=ids_of(list(_written(plan.config))),
        tags=["merge"],
        summary=(
            f"Made with Poise: {plan.config.method.summary}.\n\n{rooted}Models:\n\n{listed}{told}"
        ),
    )


def _written(config: MergeConfig) -> Iterator[str]:
    """The models of a merge, the base first; a named merge is replaced by its own models."""
    for name in [config.base_model, *config.merged_models]:
        if name in config.merges:
            merge = config.merges[name]
            yield from _written(merge.model_copy(update={"merges": config.merges_before(name)}))
        elif name is not None:
            yield name
