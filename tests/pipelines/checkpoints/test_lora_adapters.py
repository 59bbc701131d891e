"""Adapters as PEFT writes them.

Oracle: PEFT's own merging.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines.checkpoints import Checkpoint, open_model
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from tests.tiny_models import save_tiny_llama


def save_adapter(base: Path, path: Path, seed: int = 0, **settings: Any) -> Path:
    """A random adapter (both factors), saved by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
        {"r": 3, "target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_values_are_those_of_peft(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    expected = merged_by_peft(base, adapter)
    source = open_model(str(adapter))
    assert set(source.names()) == set(Checkpoint.open(base).tensors)
    plain, changed = load_file(base / "model.safetensors"), 0
    for name in source.names():
        spec = source.find(name)
        values = source.read(name, 0, spec.num_elements).view(spec.shape)
        torch.testing.assert_close(values.float(), expected[name], atol=1e-6, rtol=1e-5)
        changed += not torch.equal(values, plain[name])
    assert changed > 0


def test_any_range_has_the_same_bits(base: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    monkeypatch.setattr("pipelines.checkpoints.lora._BLOCK_ELEMENTS", 100)
    source = open_model(f"{base}+{adapter}")
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = source.read(name, 0, 1024)
    for start, stop in [(0, 1), (31, 33), (95, 97), (100, 700), (1023, 1024), (5, 5)]:
        assert torch.equal(source.read(name, start, stop), whole[start:stop])


def test_adapters_are_merged_like_models(base: Path, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["q_proj", "gate_proj"]}
    adapters = [save_adapter(base, tmp_path / f"a{i}", seed=i, **settings) for i in range(2)]
    config = {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(adapters[0])}, {"model": f"{base}+{adapters[1]}"}],
        "base_model": str(base),
    }
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    plain = load_file(base / "model.safetensors")
    one, two = (merged_by_peft(base, adapter) for adapter in adapters)
    for name, values in load_file(out / "model.safetensors").items():
        expected = one[name] + two[name] - plain[name]
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    provenance = json.loads((out / "poise.json").read_text())
    assert set(provenance["inputs"]) == {str(base), *map(str, adapters)}


def test_a_head_of_its_own_over_a_tied_base(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "tied", tied=True)
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    config = {"merge_method": "linear", "models": [{"model": str(adapter)}, {"model": str(base)}]}
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3'; allowed: 'LORA'"),
        ({"use_dora": True}, "use_dora: found true; allowed: false"),
        ({"base_model_name_or_path": "org/name"}, "its base 'org/name' is no folder here"),
    ],
)
def test_what_cannot_be_applied(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        open_model(str(adapter))
    assert message in str(caught.value)


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    from safetensors.torch import save_file

    save_file({name: values[..., :1].contiguous() for name, values in tensors.items()}, file)
    with pytest.raises(InputError, match=r"found factors \[2, 1\] and \[32, 1\]; allowed: factors"):
        open_model(str(adapter))
