"""Adapters of experts and other parameters, and of biases, on bases in both layouts.

Oracle: the logits of PEFT's model with the adapter on it, not merged, and its merged weights.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipelines.checkpoints import open_model
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from tests.hub_models import ARCHITECTURES, random_model
from tests.model_kinds import KINDS

TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
BOTH = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PLAIN = {"target_modules": []}
SQUARE = {"intermediate_size": 32}


def model_of(name: str, **fields: Any) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return random_model(name, **fields)
    [(kind, own)] = [each[name] for each in KINDS.values() if name in each]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **own | fields)
    model: PreTrainedModel = getattr(transformers, name)(config)
    return model


def save_adapted(
    name: str, folder: Path, *, fused: bool, fields: dict[str, Any] | None = None, **settings: Any
) -> tuple[Path, Path]:
    """A base in the hub's layout, or in that of the model, and an adapter as PEFT saves it."""
    model = model_of(name, **fields or {})
    model.save_pretrained(folder / "base", save_original_format=not fused)
    settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def adapted_by_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def check_against_peft(base: Path, adapter: Path, out: Path) -> None:
    """A merge of the two alone: files as the base's, weights and logits as PEFT's."""
    values = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    merge(MergeConfig.model_validate(values), out, executor="local")
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    assert {k: x.shape for k, x in before.items()} == {k: x.shape for k, x in after.items()}
    found, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    tuned = adapted_by_peft(base, adapter)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    expected = logits(tuned)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(found), expected, atol=2e-6, rtol=1e-5)
    expected = tuned.merge_and_unload().state_dict()
    for name, each in found.state_dict().items():
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=1e-6, msg=name)


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("mixtral", PLAIN | BOTH),
    "one of two": ("qwen3_moe", PLAIN | {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "the other": ("olmoe", PLAIN | {"target_parameters": ["down_proj"]}),
    "one layer, rank-stabilised": (
        "qwen2_moe",
        {"target_modules": ["q_proj"], "use_rslora": True}
        | {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    ),
    "patterns": (
        "mixtral",
        PLAIN
        | BOTH
        | {"rank_pattern": {"layers.0.mlp.experts.down_proj": 2}}
        | {"alpha_pattern": {"gate_up_proj": 11}},
    ),
    "with the router": ("mixtral", {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}),
    "all-linear": ("deepseek_v3", {"target_modules": "all-linear"}),
    "weights of layers": (
        "deepseek_v2",
        PLAIN | {"target_parameters": ["shared_experts.gate_proj.weight", "gate_up_proj"]},
    ),
    "transposed": ("GptOssForCausalLM", PLAIN | BOTH),
    "transposed, square": ("GptOssForCausalLM", PLAIN | BOTH | {"fields": SQUARE}),
    "square": ("mixtral", PLAIN | BOTH | {"fields": SQUARE}),
    "one expert": (
        "mixtral",
        PLAIN | BOTH | {"fields": {"num_local_experts": 1, "num_experts_per_tok": 1}},
    ),
    "a matrix of biases": (
        "GptOssForCausalLM",
        PLAIN | {"target_parameters": ["gate_up_proj", "gate_up_proj_bias", "down_proj"]},
    ),
    "of a hybrid": ("JambaForCausalLM", {"target_modules": ["in_proj"]} | BOTH),
    "whole experts": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "beside whole modules": ("qwen3_moe", PLAIN | BOTH | {"modules_to_save": ["norm", "gate"]}),
}


FAST = {"patterns", "whole experts", "with the router", "a matrix of biases", "square"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FAST)) for kind in EXPERTS]
)
def test_adapters_of_parameters(kind: str, fused: bool, tmp_path: Path) -> None:
    name, settings = EXPERTS[kind]
    check_against_peft(*save_adapted(name, tmp_path, fused=fused, **settings), tmp_path / "out")


def save_layers_of_experts(
    folder: Path, layers: tuple[str, ...], *, fused: bool
) -> tuple[Path, Path]:
    """A Mixtral and an adapter of its experts as layers, as they were before they were fused."""
    model_of("mixtral").save_pretrained(folder / "base", save_original_format=not fused)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, expert, name in product(range(2), range(4), layers):
        module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        width, height = (48, 32) if name == "w2" else (32, 48)
        for part, shape in (("A", (3, width)), ("B", (height, 3))):
            values = 0.1 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5}
    settings |= {"target_modules": [*layers], "base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "base", adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layers", [("w1", "w2", "w3"), ("w2",)])
def test_adapters_expert_by_expert(layers: tuple[str, ...], fused: bool, tmp_path: Path) -> None:
    """As transformers 4 had them; PEFT fuses their factors."""
    check_against_peft(*save_layers_of_experts(tmp_path, layers, fused=fused), tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
def test_any_range_has_the_same_bits(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.checkpoints.factors._BLOCK_ELEMENTS", 100)
    base, adapter = save_adapted("mixtral", tmp_path, fused=fused, **PLAIN, **BOTH)
    source = open_model(f"{base}+{adapter}")
    for name in source.names():
        if ".experts." not in name or ".layers.0." not in name:
            continue
        spec = source.find(name)
        assert spec is not None and source.stored(name) is None
        whole = source.read(name, 0, spec.num_elements)
        places = torch.randint(spec.num_elements + 1, (6, 2), generator=torch.Generator()).tolist()
        for start, stop in [(0, 1), (31, 33), (95, 97), (5, 5), *map(sorted, places)]:
            assert torch.equal(source.read(name, start, stop), whole[start:stop])


@pytest.mark.filterwarnings("ignore")
def test_bases_of_two_layouts_in_one_merge(tmp_path: Path) -> None:
    """A merge of an adapter on fused experts with a model whose experts are one by one."""
    base, adapter = save_adapted("qwen3_moe", tmp_path, fused=True, **PLAIN, **BOTH)
    other = tmp_path / "other"
    random_model("qwen3_moe", 5).save_pretrained(other, save_original_format=True)
    weighted = [(str(other), 0.25), (f"{base}+{adapter}", 0.75)]
    models = [{"model": name, "parameters": {"weight": each}} for name, each in weighted]
    values = {"merge_method": "linear", "models": models}
    out = merge(MergeConfig.model_validate(values), tmp_path / "out", executor="local")
    assert (
        load_file(out / "model.safetensors").keys() == load_file(other / "model.safetensors").keys()
    )
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    one = AutoModelForCausalLM.from_pretrained(other).state_dict()
    two = adapted_by_peft(base, adapter).merge_and_unload().state_dict()
    for name, values in found.items():
        wanted = (0.25 * one[name].double() + 0.75 * two[name].double()).float()
        torch.testing.assert_close(values, wanted, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layers", "change", "message"),
    [
        (
            ("w1",),
            {},
            "changes some of the layers that are one tensor in its base",
        ),
        (
            ("w1", "w2", "w3"),
            {"init_lora_weights": "pissa"},
            "init_lora_weights: found 'pissa' of m",
        ),
    ],
)
def test_what_fused_experts_cannot_take(
    layers: tuple[str, ...], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, adapter = save_layers_of_experts(tmp_path, layers, fused=True)
    assert message in refusal(base, adapter, change)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": ["down_proj"]}, "is no part of target_parameters"),
        (
            {"target_parameters": None},
            "is no part of target_parameters",
        ),
        (
            {"r": 2, "target_parameters": ["experts.gate_up_proj"]},
            "is no part of target_parameters",
        ),
    ],
)
def test_parameters_that_the_config_does_not_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, adapter = save_adapted("mixtral", tmp_path, fused=False, **PLAIN, **BOTH)
    assert message in refusal(base, adapter, change)


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_is_not_known(tmp_path: Path) -> None:
    base, adapter = save_adapted("mixtral", tmp_path, fused=False, **PLAIN, **BOTH)
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["OwnForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    assert "for a class that transformers does not know" in refusal(base, adapter, {})


def refusal(base: Path, adapter: Path, change: dict[str, Any]) -> str:
    """The one line with which an adapter is refused once its config has changed."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        open_model(f"{base}+{adapter}")
    assert "\n" not in str(caught.value)
    return str(caught.value)
