"""Weight decay on some parameters. Oracle: transformers' Trainer and its optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import (
    align_config,
    run_here,
    stop_at_the_fourth_step,
)
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from pipelines.train.optimizer import build_optimizer, decaying

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
SIZES |= {"intermediate_size": 8, "num_key_value_heads": 2}
DECAY = {"learning_rate": 1e-2, "weight_decay": 0.3}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "phi"])
def test_the_same_parameters_as_the_trainer(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    trainer = object.__new__(Trainer)
    found = decaying(model)
    named = {name for name, _ in model.named_parameters()}  # a tied head has one name of two
    assert found == named & set(trainer.get_decay_parameter_names(model))
    assert 0 < len(found) < len(list(model.parameters()))


def test_a_step_is_that_of_the_trainers_optimizer(tiny_llama: Path, tmp_path: Path) -> None:
    """From the same gradients."""
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", optim="adamw_torch", **DECAY
    )
    theirs = Trainer(models[1], arguments).create_optimizer()
    settings = DECAY | {"weight_decay_on": "matrices"}
    ours = build_optimizer(align_config(tiny_llama, Path("r"), optimizer=settings), models[0])
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_an_online_optimizer_decays_the_same(tiny_llama: Path) -> None:
    """Where it merges nothing, its steps are those of AdamW with the same groups."""
    online = {
        "name": "onties",
        "density": 1.0,
        "alpha": 0.0,
        "tau": {"base": tiny_llama, "tuned": tiny_llama},
    }
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2)]
    for model, more in zip(models, (online, {}), strict=True):
        settings = DECAY | {"weight_decay_on": "matrices"} | more
        optimizer = build_optimizer(align_config(tiny_llama, Path("r"), optimizer=settings), model)
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_broken_run_goes_on_exactly(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both groups come back with their moments and their decay."""
    settings = DECAY | {"weight_decay_on": "matrices"}
    config = align_config(tiny_llama, preferences, optimizer=settings, num_steps=4)
    whole = run_here(config, tmp_path / "whole")
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    broken = run_here(config, tmp_path / "broken")
    file = "model/model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "found matrices without weight_decay"),
        ({"lora": {"rank": 2}}, "found matrices with lora, whose adapters are matrices; allowed"),
    ],
)
def test_where_it_cannot_act(fields: dict[str, Any], message: str) -> None:
    optimizer = fields.pop("optimizer", DECAY) | {"weight_decay_on": "matrices"}
    with pytest.raises(ValueError, match=message):
        align_config(Path("m"), Path("r"), optimizer=optimizer, **fields)
