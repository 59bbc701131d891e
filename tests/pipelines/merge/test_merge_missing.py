"""Tensors that some models lack: heads of reward models, and whatever else `allow_missing` names.

Oracle: means and task vectors by hand, and transformers, which loads the result without a word.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_work
from pipelines.merge import MergeConfig, merge
from pipelines.merge.plan import plan_merge
from tests.pipelines.merge.conftest import Family, save_weights, set_config, weights_of

EXTRA, NORM = "model.extra.weight", "model.norm.weight"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def test_those_that_have_a_tensor_merge_it(own_family: Family, tmp_path: Path) -> None:
    """As the method has it; where the base lacks it, as the mean; of one alone, as it is."""
    first = own_family.models[0]
    for model in (own_family.base, *own_family.models):
        set_config(model, architectures=["OwnForCausalLM"])
    for scale, model in enumerate(own_family.models[1:], start=1):
        save_weights(model, weights_of(model) | {EXTRA: scale * torch.arange(3.0)})
    without = weights_of(first)
    del without[NORM]
    save_weights(first, without)
    config = own_family.config("task_arithmetic", allow_missing=["*.extra.*"])
    with pytest.raises(InputError, match=f"model {first}: has no tensor '{NORM}'"):
        merge(MergeConfig.model_validate(config), tmp_path / "out")
    config["allow_missing"] = ["*.extra.*", NORM]
    result = weights_of(merge(MergeConfig.model_validate(config), tmp_path / "out"))
    having = [weights_of(model) for model in own_family.models[1:]]
    mean = torch.stack([tensors[EXTRA] for tensors in having]).mean(0)
    torch.testing.assert_close(result[EXTRA], mean)
    base = weights_of(own_family.base)[NORM]
    weights = [each.get("parameters", {}).get("weight", 1.0) for each in config["models"][1:]]
    deltas = [w * (each[NORM] - base) for w, each in zip(weights, having, strict=True)]
    torch.testing.assert_close(result[NORM], base + sum(deltas), atol=1e-6, rtol=1e-5)


def save_rewards(make: type, config: type, folder: Path, num_labels: int = 1) -> list[str]:
    """Two models with a score head."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        make(config(**SIZES, num_labels=num_labels)).save_pretrained(folder / name)
    return [str(folder / "a"), str(folder / "b")]


def assert_loads(path: Path) -> Any:
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic"])
def test_reward_models_on_a_language_model(method: str, tmp_path: Path) -> None:
    """The result is a reward model: its config, and its tensors alone."""
    models = save_rewards(LlamaForSequenceClassification, LlamaConfig, tmp_path)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    values = {
        "merge_method": method,
        "parameters": {"density": 0.5} if method == "ties" else {},
        "base_model": str(tmp_path / "base"),
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
        "allow_missing": ["score.weight", "lm_head.weight"],
    }
    out = merge(MergeConfig.model_validate(values), tmp_path / "out", executor="local")
    model = assert_loads(out)
    assert model.config.num_labels == 1
    heads = [load_file(Path(m) / "model.safetensors")["score.weight"] for m in models]
    torch.testing.assert_close(model.score.weight.detach(), torch.stack(heads).mean(0))
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    plan = plan_merge(MergeConfig.model_validate(values))
    left_out = f"left out, as {models[0]} does not have them: lm_head.weight"
    assert (left_out in plan.notices()) == (method != "linear")  # which does not merge the base
    told = [line for line in plan.notices() if line.startswith("base_model: ")]
    given = "linear does not merge it; the result's tokenizer is from it"
    assert told == ([f"base_model: {given}"] if method == "linear" else [])
    # Results of versions that copied the head do not pass for finished.
    assert plan.settings_key != fingerprint_work(plan.settings, "merge")


def test_reward_models_without_a_base(tmp_path: Path) -> None:
    """Of another architecture, with three labels; nothing is missing."""
    models = save_rewards(Qwen2ForSequenceClassification, Qwen2Config, tmp_path, num_labels=3)
    values = {
        "merge_method": "linear",
        "models": [
            {"model": m, "parameters": {"weight": w}} for m, w in zip(models, (1, 3), strict=True)
        ],
    }
    model = assert_loads(merge(MergeConfig.model_validate(values), tmp_path / "out"))
    heads = [load_file(Path(m) / "model.safetensors")["score.weight"] for m in models]
    torch.testing.assert_close(model.score.weight.detach(), (heads[0] + 3 * heads[1]) / 4)
    assert model.config.num_labels == 3
