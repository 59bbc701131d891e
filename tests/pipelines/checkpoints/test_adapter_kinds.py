"""Every kind of LoRA adapter: applied as PEFT applies it, or refused by name.

Oracle: the logits of PEFT's model with the adapter on it, not merged.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pipelines.checkpoints import open_model
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from tests import model_kinds

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TOKENS[:, 3], TOKENS[:, 7] = 3, 5


def llama(*, tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(*, tied: bool = True) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=tied
    )
    return GPT2LMHeadModel(config)


def neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def tied_llama() -> PreTrainedModel:
    return llama(tied=True)


def untied_gpt2() -> PreTrainedModel:
    return gpt2(tied=False)


def save_trained(
    make: Callable[[], PreTrainedModel], folder: Path, **settings: Any
) -> tuple[Path, Path]:
    """A base and an adapter that has moved from where training begins, as PEFT saves them."""
    torch.manual_seed(0)
    base = make()
    base.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    tuned = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def logits_of_peft(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def written(base: Path, adapter: Path) -> Path:
    """The model that the two are, written by a merge."""
    values = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    return merge(MergeConfig.model_validate(values), base.parent / "out", executor="local")


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
ROWS = {"embed_tokens": [5, 3]}
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "pissa": (llama, ATTENTION | {"init_lora_weights": "pissa"}),
    "pissa, rank-stabilised": (
        llama,
        ATTENTION | {"init_lora_weights": "pissa", "use_rslora": True},
    ),
    "olora": (llama, ATTENTION | {"init_lora_weights": "olora"}),
    "orthogonal": (llama, ATTENTION | {"init_lora_weights": "orthogonal"}),
    "dora": (llama, ATTENTION | {"use_dora": True}),
    "dora of an embedding": (llama, EMBEDDING | {"use_dora": True}),
    "pissa of another architecture": (
        neox,
        {"target_modules": ["query_key_value", "dense"], "init_lora_weights": "pissa"},
    ),
    "dora of another architecture": (neox, {"target_modules": "all-linear", "use_dora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "Conv1D, pissa": (gpt2, {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "Conv1D, dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "Conv1D and a tied head": (gpt2, {"target_modules": ["c_proj", "lm_head"]}),
    "Conv1D and a tied embedding": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "Conv1D and a head": (untied_gpt2, {"target_modules": ["c_proj", "lm_head"]}),
    "tokens": (llama, ATTENTION | {"trainable_token_indices": [3, 5]}),
    "tied tokens": (tied_llama, ATTENTION | {"trainable_token_indices": ROWS}),
    "tokens of embedding and head": (
        tied_llama,
        ATTENTION | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    ),
    "biases": (llama, ATTENTION | {"bias": "all", "modules_to_save": ["norm"]}),
    "biases of factors": (neox, {"target_modules": "all-linear", "lora_bias": True}),
    "biases of factors beside their layers'": (
        neox,
        {"target_modules": ["dense"], "lora_bias": True, "bias": "all", "use_rslora": True},
    ),
    "Conv1D and biases of factors": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "biases of adapted layers": (neox, {"target_modules": ["dense"], "bias": "lora_only"}),
    "an embedding": (llama, EMBEDDING),
    "a whole embedding": (llama, ATTENTION | {"modules_to_save": ["embed_tokens"]}),
    "a tied embedding": (tied_llama, EMBEDDING),
    "a tied embedding, dora": (tied_llama, EMBEDDING | {"use_dora": True}),
    "a tied embedding, kept tied": (tied_llama, EMBEDDING | {"ensure_weight_tying": True}),
    "a tied head": (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "a tied embedding and head": (tied_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a whole tied embedding": (tied_llama, ATTENTION | {"modules_to_save": ["embed_tokens"]}),
    "a whole tied head": (tied_llama, ATTENTION | {"modules_to_save": ["lm_head"]}),
    "both whole": (tied_llama, ATTENTION | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied embedding and a whole head": (tied_llama, EMBEDDING | {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    make, settings = KINDS[kind]
    base, adapter = save_trained(make, tmp_path, **settings)
    found, info = AutoModelForCausalLM.from_pretrained(
        written(base, adapter), output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    expected = logits_of_peft(base, adapter)
    torch.testing.assert_close(logits(found), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_any_range_has_the_same_bits(tmp_path: Path, settings: dict, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.checkpoints.lora._BLOCK_ELEMENTS", 100)
    base, adapter = save_trained(llama, tmp_path, **ATTENTION, **settings)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = open_model(f"{base}+{adapter}").read(name, 0, 1024)
    source = open_model(f"{base}+{adapter}")
    for start, stop in [(1023, 1024), (0, 1), (31, 33), (95, 97), (100, 700), (5, 5)]:
        assert torch.equal(source.read(name, start, stop), whole[start:stop])


@pytest.mark.filterwarnings("ignore")
def test_names_as_they_lie_on_the_hub(tmp_path: Path) -> None:
    """GPT-2's files have `h.0`, its adapters `transformer.h.0`."""
    base, adapter = save_trained(gpt2, tmp_path, target_modules=["c_attn", "c_proj"])
    expected = logits_of_peft(base, adapter)
    file = base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    out = written(base, adapter)
    assert set(load_file(out / "model.safetensors")) == set(tensors)
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        (ATTENTION, True),
        (ATTENTION | {"trainable_token_indices": [3, 5]}, True),
        (ATTENTION | {"modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
)
def test_the_written_config_says_whether_head_and_embedding_are_one(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base, adapter = save_trained(tied_llama, tmp_path, **settings)
    out = written(base, adapter)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(found, logits_of_peft(base, adapter), atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: found 'pissa_niter_16', whi"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: found 'corda', which changes the"),
        ({"lora_bias": True}, "lora_bias: found true; allowed: false, as adapter_model.safetens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: found [[0, 1]], which is not known"),
        ({"a_later_field": {"on": 1}}, "a_later_field: found {'on': 1}, which is not known here"),
        ({"use_dora": True}, "use_dora: found true; allowed: false, as adapter_model.safetensors"),
        ({"trainable_token_indices": [99, 98]}, "trainable_token_indices: found [99, 98] with val"),
        ({"trainable_token_indices": None}, "trainable_token_indices: found none of model.embed_"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, adapter = save_trained(llama, tmp_path, **ATTENTION, trainable_token_indices=[3, 5])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        open_model(f"{base}+{adapter}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "lora_bias: found a bias [32] for model.layers.0.self_attn.q_proj.bias, which is mis"),
        ({"use_dora": True}, "lora_bias: found true beside use_dora, which PEFT does not train to"),
        ({"init_lora_weights": "pissa"}, "lora_bias: found true beside init_lora_weights 'pissa'"),
    ],
)
def test_biases_that_peft_does_not_merge(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, adapter = save_trained(llama, tmp_path, **ATTENTION, lora_bias=True)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        open_model(f"{base}+{adapter}")
    assert message in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "LlavaForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "CLIPModel",
        "T5ForConditionalGeneration",
    ],
)
def test_models_whose_files_have_other_names_than_their_modules(name: str, tmp_path: Path) -> None:
    """Several stacks: the adapter names modules, the files of the base have the hub's names."""
    [(model_type, fields)] = [each[name] for each in model_kinds.KINDS.values() if name in each]
    make, base = getattr(transformers, name), tmp_path / "base"
    torch.manual_seed(0)
    make(AutoConfig.for_model(model_type, **fields)).save_pretrained(base)
    targets = ["q", "v"] if name.startswith("T5") else ["q_proj", "v_proj"]
    adapted = get_peft_model(
        make.from_pretrained(base), LoraConfig(target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    found, info = make.from_pretrained(
        written(base, tmp_path / "adapter"), output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    for key, values in found.state_dict().items():
        torch.testing.assert_close(values, expected[key], atol=1e-6, rtol=1e-6, msg=key)
