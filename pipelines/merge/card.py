"""What stands beside the merged weights: config, tokenizer, model card and provenance."""

import json
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from operators.merging import mixup_lambda
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import checkpoint_fingerprint
from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.merge.config import MergeConfig
from pipelines.merge.model_config import model_config
from pipelines.merge.plan import OUTPUT, KnownDigests, MergePlan
from pipelines.merge.vocabulary import TOKENIZER_FILE
from pipelines.versions import versions

PROVENANCE_FILE = "poise.json"
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
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


def write_companions(plan: MergePlan, folder: Path, digests: KnownDigests) -> None:
    """Write everything but the weights into the output's folder.

    Args:
        digests: what the workers took while they read and wrote, by path and tensor.
    """
    _write_tokenizer(plan, folder)
    config = model_config(plan.config, plan.tensors, plan.reference)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    output = Checkpoint(folder, config, plan.layout.stored(folder))
    provenance = {
        "kind": "merge",
        "config": _config(plan),
        "inputs": plan.input_fingerprints(digests),
        "output": checkpoint_fingerprint(output, digests.get(OUTPUT, {})),
        "seed": plan.config.seed,
        "drawn": drawn(plan),
        "settings": fingerprint(plan.settings),
        "key": plan.key,
        "versions": versions(),
    }
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    write_atomically(folder / "README.md", model_card(plan))


def _write_tokenizer(plan: MergePlan, folder: Path) -> None:
    """Copy the tokenizer's files and the generation settings; put in what is new."""
    generation = plan.reference.path / GENERATION_FILE
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_FILE)
    for name in COPIED:
        source = plan.tokenizer.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if plan.tokenizer.text is not None:
        write_atomically(folder / TOKENIZER_FILE, plan.tokenizer.text)
    if plan.config.chat_template is not None:
        write_atomically(folder / TEMPLATE_FILE, chat_template(plan))


def chat_template(plan: MergePlan) -> str:
    """The chat template that the config asks for: the text itself, a model's, or with `auto` the
    one that most models have.

    Raises:
        InputError: a model without one.
    """
    wanted = plan.config.chat_template or ""
    if "{" in wanted:
        return wanted
    if wanted == "auto":
        folders = dict.fromkeys(each.path for each in (plan.reference, *plan.models.values()))
        files = [folder / TEMPLATE_FILE for folder in folders]
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        if not texts:
            raise InputError(f"chat_template: found 'auto', and no model has a {TEMPLATE_FILE}")
        return max(texts, key=texts.count)  # the first of equals: the reference's
    source = plan.models.get(wanted)
    path = (Path(wanted) if source is None else source.path) / TEMPLATE_FILE
    if not path.is_file():
        raise InputError(
            f"chat_template: found {wanted!r}, and no {path}; allowed: a Jinja template, or a "
            "model that has one"
        )
    return path.read_text(encoding="utf-8")


def drawn(plan: MergePlan) -> dict[str, float]:
    """What the seed drew once for the merge, M3's lambda, where the method has it; of the named
    merges that it is made of with their names before it.
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


def _config(plan: MergePlan) -> dict[str, Any]:
    """The merge's config, as a user would write it again."""
    return plan.config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"num_workers", "storage", "memory_budget", "executor"},
    )


def model_card(plan: MergePlan) -> str:
    """A Hugging Face model card: front matter, the method in words, the config."""
    models = plan.config.merged_models
    base = plan.config.base_model
    front = {
        "base_model": list(dict.fromkeys(_written(plan.config))),
        "library_name": "transformers",
        "tags": ["merge", "poise"],
    }
    listed = "\n".join(f"- `{model}`" for model in models)
    rooted = "" if base is None else f"\nBase model: `{base}`\n"
    draws = "".join(f"\nDrawn: {name} = {value:.6f}\n" for name, value in drawn(plan).items())
    config = yaml.safe_dump(_config(plan), sort_keys=False)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merge by {plan.config.merge_method}\n\n"
        f"Made with Poise: {plan.config.method.summary}.\n{rooted}\nModels:\n\n{listed}\n{draws}\n"
        f"The config, from which the merge can be made again:\n\n```yaml\n{config}```\n"
    )


def _written(config: MergeConfig) -> Iterator[str]:
    """The models that a merge is made of, base first; a named merge stands for its own."""
    for name in [config.base_model, *config.merged_models]:
        if name in config.merges:
            earlier = dict(
                takewhile(lambda item, last=name: item[0] != last, config.merges.items())
            )
            yield from _written(config.merges[name].model_copy(update={"merges": earlier}))
        elif name is not None:
            yield name
