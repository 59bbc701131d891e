"""What stands beside the merged weights: config, tokenizer, model card and provenance."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import checkpoint_fingerprint
from pipelines.checkpoints.reader import HEAD
from pipelines.commit import write_atomically
from pipelines.fingerprint import fingerprint
from pipelines.merge.layers import num_layers
from pipelines.merge.plan import OUTPUT, KnownDigests, MergePlan
from pipelines.versions import versions

PROVENANCE_FILE = "poise.json"
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def write_companions(plan: MergePlan, folder: Path, digests: KnownDigests) -> None:
    """Write everything but the weights into the output's folder.

    Args:
        digests: what the workers took while they read and wrote, by path and tensor.
    """
    for name in COPIED:
        source = plan.reference.path / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    write_atomically(folder / "config.json", json.dumps(_model_config(plan), indent=2) + "\n")
    provenance = {
        "kind": "merge",
        "config": _config(plan),
        "inputs": plan.input_fingerprints(digests),
        "output": checkpoint_fingerprint(Checkpoint.open(folder), digests.get(OUTPUT, {})),
        "settings": fingerprint(plan.settings),
        "key": plan.key,
        "versions": versions(),
    }
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    write_atomically(folder / "README.md", model_card(plan))


def _config(plan: MergePlan) -> dict[str, Any]:
    """The merge's config, as a user would write it again."""
    return plan.config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"num_workers", "storage", "memory_budget", "executor"},
    )


def _model_config(plan: MergePlan) -> dict[str, Any]:
    """The reference's config.json with dtype, number of layers and tying as in the output."""
    config = dict(plan.reference.config)
    dtypes = [tensor.dtype for tensor in plan.tensors.values()]
    floating = sorted(str(d).removeprefix("torch.") for d in dtypes if d.is_floating_point)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = floating[0]
    if HEAD in plan.tensors and HEAD not in plan.reference.names():
        config["tie_word_embeddings"] = False
    if plan.config.slices:
        config |= _stacked(plan)
    return config


def _stacked(plan: MergePlan) -> dict[str, Any]:
    """What slices change in config.json: the number of layers, and lists with an entry a layer."""
    config = plan.reference.config
    own = num_layers(plan.reference)
    layers = [layer for each in plan.config.slices for layer in range(*each.sources[0].layer_range)]
    changed: dict[str, Any] = {key: len(layers) for key in LAYER_COUNTS if config.get(key) == own}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == own and max(layers) < own:
            changed[key] = [value[layer] for layer in layers]
    return changed


def model_card(plan: MergePlan) -> str:
    """A Hugging Face model card: front matter, the method in words, the config."""
    models = plan.config.merged_models
    base = plan.config.base_model
    front = {
        "base_model": list(dict.fromkeys([*([] if base is None else [base]), *models])),
        "library_name": "transformers",
        "tags": ["merge", "poise"],
    }
    listed = "\n".join(f"- `{model}`" for model in models)
    rooted = "" if base is None else f"\nBase model: `{base}`\n"
    config = yaml.safe_dump(_config(plan), sort_keys=False)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merge by {plan.config.merge_method}\n\n"
        f"Made with Poise: {plan.config.method.summary}.\n{rooted}\nModels:\n\n{listed}\n\n"
        f"The config, from which the merge can be made again:\n\n```yaml\n{config}```\n"
    )
