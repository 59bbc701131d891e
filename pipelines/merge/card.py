"""The files beside the merged weights: config, tokenizer, record and card."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from operators.merging import mixup_lambda
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import DigestMemory, model_digest
from pipelines.commit import write_atomically
from pipelines.merge.config import MergeConfig
from pipelines.merge.model_config import model_config
from pipelines.merge.plan import OUTPUT, KnownDigests, MergePlan
from pipelines.merge.tokenizer import TEMPLATE_FILE
from pipelines.merge.vocabulary import TOKENIZER_FILE
from pipelines.provenance import Provenance

GENERATION_FILE = "generation_config.json"
COPIED = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)


def write_companions(
    plan: MergePlan, folder: Path, digests: KnownDigests, memory: DigestMemory
) -> None:
    """Write everything but the weights into the output's folder.

    Args:
        digests: of the blocks that the workers read and wrote, by path and tensor.
        memory: known digests of inputs; new ones are added.
    """
    _write_tokenizer(plan, folder)
    config = model_config(plan.config, plan.tensors, plan.reference)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    output = Checkpoint(folder, config, plan.layout.stored(folder))
    provenance(plan, output, digests, memory).write(folder)


def _write_tokenizer(plan: MergePlan, folder: Path) -> None:
    """Copy the tokenizer's files and the generation settings; write the new files."""
    generation = plan.reference.path / GENERATION_FILE
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_FILE)
    for name in COPIED:
        source = plan.tokenizer.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if plan.tokenizer.text is not None:
        write_atomically(folder / TOKENIZER_FILE, plan.tokenizer.text)
    if plan.template is not None:
        write_atomically(folder / TEMPLATE_FILE, plan.template)


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
        details={"drawn": draws, "settings": plan.settings_key},
        title=f"Merge by {plan.config.merge_method}",
        base_models=list(dict.fromkeys(_written(plan.config))),
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
