"""What stands beside the merged weights: config, tokenizer, model card and provenance."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from pipelines.checkpoints.reader import HEAD
from pipelines.commit import write_atomically
from pipelines.merge.plan import MergePlan
from pipelines.versions import versions

PROVENANCE_FILE = "poise.json"
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


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write everything but the weights into the output's folder."""
    for name in COPIED:
        source = plan.reference.path / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    write_atomically(folder / "config.json", json.dumps(_model_config(plan), indent=2) + "\n")
    provenance = {
        "kind": "merge",
        "config": _config(plan),
        "parameters": plan.config.complete_parameters(),
        "inputs": plan.input_fingerprints,
        "fingerprint": plan.fingerprint,
        "versions": versions(),
    }
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    write_atomically(folder / "README.md", model_card(plan))


def _config(plan: MergePlan) -> dict[str, Any]:
    """The merge's config, as a user would write it again."""
    return plan.config.model_dump(
        mode="json", exclude_defaults=True, exclude={"num_workers", "storage"}
    )


def _model_config(plan: MergePlan) -> dict[str, Any]:
    """The reference's config.json with the output's dtype, and tied only where the output is."""
    config = dict(plan.reference.config)
    dtypes = {tensor.dtype for tensor in plan.layout.tensors.values()}
    floating = sorted(str(d).removeprefix("torch.") for d in dtypes if d.is_floating_point)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = floating[0]
    if HEAD in plan.layout.tensors and HEAD not in plan.reference.tensors:
        config["tie_word_embeddings"] = False
    return config


def model_card(plan: MergePlan) -> str:
    """A Hugging Face model card: front matter, the method in words, the config."""
    models = [str(entry.model) for entry in plan.config.merged_models]
    base = plan.config.base_model
    front = {
        "base_model": [*([] if base is None else [str(base)]), *models],
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
