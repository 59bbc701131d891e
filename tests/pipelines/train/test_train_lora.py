"""Adapters: what is trained, what comes out, and that sharding changes neither.

Oracle: the rank of what has changed, PEFT's own start, and a run of one worker.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import run_workers
from pydantic import ValidationError
from safetensors.torch import load_file
from training_files import (
    align_config,
    metrics,
    run_here,
    seeded_metrics,
    stop_at_the_fourth_step,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from pipelines.checkpoints import open_model
from pipelines.errors import InputError
from pipelines.merge.verify import verify
from pipelines.train import plan_alignment
from pipelines.train.config import LoraSettings
from pipelines.train.export_run import export_checkpoint
from pipelines.train.material import material
from pipelines.train.run import _unfinished_run
from pipelines.train.strategies.loading import empty_model, materialize
from pipelines.train.strategies.lora import A, add_adapters, begin_adapters, merged_parameters
from tests.hub_models import save_as_on_hub
from tests.tiny_models import save_tiny_llama, tiny_tokenizer

WEIGHTS_FILE = "model.safetensors"
WEIGHTS = f"model/{WEIGHTS_FILE}"
LORA: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]},
    "optimizer": {"learning_rate": 2e-2},
    "num_steps": 12,
}


def test_only_adapted_layers_change_and_by_low_rank(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The output has the adapters merged in; the reference is the base without them."""
    run = run_here(align_config(tiny_llama, preferences, **LORA), tmp_path / "run")
    lines = metrics(run)
    assert lines[0]["loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert lines[-1]["loss"] < 0.68
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(run / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "q_proj" in name or "down_proj" in name:
            assert torch.linalg.matrix_rank((after[name] - tensor).double(), rtol=1e-3) == 4
        else:
            assert torch.equal(after[name], tensor), name
    delta = sum((after[n].double() - before[n].double()).square().sum() for n in before)
    assert lines[-1]["delta_norm"] == pytest.approx(delta.sqrt().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("target_modules", ["all-linear", ["c_proj", "lm_head"]])
def test_layers_that_store_inputs_first(target_modules: str | list[str]) -> None:
    """GPT-2's: the merged weights give the logits of the model with its adapters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    plain = GPT2LMHeadModel(config).eval()
    adapted = copy.deepcopy(plain)
    settings = LoraSettings(rank=4, alpha=8.0, target_modules=target_modules)
    add_adapters(adapted, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = {
        layout.name: values.view(layout.shape)
        for layout, values in merged_parameters(adapted, settings)
    }
    tokens = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        expected = adapted(tokens).logits
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain(tokens).logits, expected, atol=2e-6, rtol=1e-5)


def test_interrupted_adapters_go_on(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without the interruption."""
    config = align_config(tiny_llama, preferences, **LORA)
    whole = run_here(config, tmp_path / "whole")
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    broken = run_here(config, tmp_path / "broken")
    assert (broken / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert seeded_metrics(broken) == seeded_metrics(whole)


def test_adapters_begin_as_in_peft(tiny_llama: Path) -> None:
    """A uniform in +-1/sqrt(inputs), B zero; a function of the seed."""
    weights = []
    for seed in (0, 0, 1):
        model, stored = empty_model(tiny_llama)
        add_adapters(model, LoraSettings(rank=16))
        materialize(model, torch.device("cpu"), stored)
        begin_adapters(model, seed)
        weights.append(model.model.layers[0].mlp.down_proj)
    one, same, other = (layer.lora_A["default"].weight for layer in weights)
    assert torch.equal(one, same) and not torch.equal(one, other)
    bound = 1 / 48**0.5
    assert one.abs().max() <= bound and one.abs().max() > 0.98 * bound
    assert abs(one.mean()) < 0.1 * bound
    assert not weights[0].lora_B["default"].weight.any()


def test_fused_experts_are_left_as_they_are(preferences: Path, tmp_path: Path) -> None:
    """`all-linear` adapts linear layers, which the experts of such a mixture are not."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    add_adapters(model, LoraSettings())
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if A in name}
    assert {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"} <= adapted
    assert not any("experts" in name for name in adapted)


def test_what_lora_cannot_do(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """Unknown layers, those that are not linear or share a weight, ZeRO, optimizers with a tau; the
    plan tells it, too.
    """
    for names, message in {
        "nothing": r"lora\.target_modules: \['nothing'\]: Target modules",
        "embed_tokens": r"lora\.target_modules: model.embed_tokens: found Embedding; allowed",
    }.items():
        settings = LORA | {"lora": {"target_modules": [names]}}
        with pytest.raises(InputError, match=message):
            plan_alignment(align_config(tiny_llama, preferences, **settings))
    tied, _ = empty_model(save_tiny_llama(tmp_path / "tied", tied=True))
    with pytest.raises(
        InputError, match=r"lora\.target_modules: lm_head: found a weight that is t"
    ):
        add_adapters(tied, LoraSettings(target_modules=["lm_head"]))
    with pytest.raises(ValidationError, match="allowed with lora: single, ddp, fsdp2"):
        align_config(tiny_llama, preferences, **LORA, strategy="zero2", num_workers=2)
    online = {
        "name": "ondare",
        "learning_rate": 1e-3,
        "density": 0.5,
        "alpha": 0.1,
        "tau": {"base": tiny_llama, "tuned": tiny_llama},
    }
    with pytest.raises(ValidationError, match="allowed with lora: adamw"):
        align_config(tiny_llama, preferences, lora={}, optimizer=online)


def with_adapter(source: Path, adapter: Path) -> PeftModel:
    """What PEFT makes of a base and an adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), adapter).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("target", ["all-linear", "some"])
def test_the_adapter_and_the_merged_model_are_one(
    name: str, target: str, preferences: Path, tmp_path: Path
) -> None:
    """As on the hub, with names that PEFT finds in the model: equal logits, equal adapters."""
    source = save_as_on_hub(name, tmp_path / "source")
    some = {"gpt2": ["attn.c_proj"], "gpt_neox": ["query_key_value"]}.get(name, ["q_proj"])
    lora = LORA["lora"] | {"target_modules": some if target == "some" else target}
    runs = {}
    for save in ("both", "adapter"):
        config = align_config(source, preferences, **(LORA | {"lora": lora | {"save": save}}))
        runs[save] = run_here(config, tmp_path / save) / "model"
    merged = AutoModelForCausalLM.from_pretrained(runs["both"]).eval()
    tokens = torch.randint(6, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = merged(tokens).logits
        for adapter in (runs["both"] / "adapter", runs["adapter"]):
            found = with_adapter(source, adapter)(tokens).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        before = AutoModelForCausalLM.from_pretrained(source).eval()(tokens).logits
    assert (expected - before).abs().max() > 1e-2
    assert load_file(runs["both"] / WEIGHTS_FILE).keys() == load_file(source / WEIGHTS_FILE).keys()
    files = {path.name for path in runs["adapter"].iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not files & {WEIGHTS_FILE, "config.json"}
    file = "adapter_model.safetensors"
    assert (runs["adapter"] / file).read_bytes() == (runs["both"] / "adapter" / file).read_bytes()


def test_adapters_have_records_and_can_be_merged(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Both kinds of output are what their records say; `poise merge` reads the adapter. A later
    training of the merged model leaves the adapter behind, which no longer fits.
    """
    for save in ("both", "adapter"):
        fields = LORA | {"lora": LORA["lora"] | {"save": save}, "num_steps": 2}
        config, folder = (
            align_config(tiny_llama, preferences, **fields),
            tmp_path / f".{save}.partial",
        )
        with _unfinished_run(folder, plan_alignment(config, tmp_path / "cache"), force=False):
            run_here(config, folder)
        assert verify(export_checkpoint(tmp_path / save, tmp_path / f"{save}-out")).output == "same"
    source = open_model(str(tmp_path / "adapter-out"))
    for name, tensor in load_file(tmp_path / "both-out" / WEIGHTS_FILE).items():
        found = source.read(name, 0, tensor.numel()).view(tensor.shape)
        torch.testing.assert_close(found, tensor, atol=1e-6, rtol=1e-5)
    assert (tmp_path / "both-out" / "adapter" / "adapter_config.json").is_file()
    again = run_here(
        align_config(tmp_path / "both-out", preferences, num_steps=1), tmp_path / "more"
    )
    assert not (again / "model" / "adapter").exists()


def test_what_is_saved_is_part_of_the_run(tiny_llama: Path, preferences: Path) -> None:
    """Another kind of output is another run; runs of before `save` stay the same runs."""
    merged = material(align_config(tiny_llama, preferences, lora={"rank": 4}))
    assert merged["lora"] == {"rank": 4, "alpha": 32.0, "target_modules": "all-linear"}
    other = material(align_config(tiny_llama, preferences, lora={"rank": 4, "save": "both"}))
    assert other["lora"] == merged["lora"] | {"save": "both"}
    with pytest.raises(ValidationError, match="save"):
        align_config(tiny_llama, preferences, lora={"save": "all"})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sharded_adapters(
    strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Two workers make the steps of one and merge the same weights."""
    fields = LORA | {"lora": LORA["lora"] | {"save": "both"}}
    alone = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "alone")
    config = align_config(tiny_llama, preferences, **fields, strategy=strategy, num_workers=2)
    run = run_workers(config, tmp_path / "run")
    for one, other in zip(metrics(alone), metrics(run), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    found, expected = (load_file(folder / WEIGHTS) for folder in (run, alone))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    found, expected = (
        load_file(folder / "model/adapter/adapter_model.safetensors") for folder in (run, alone)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name
