"""What DAM's training refuses, and what its plan says. Oracle: the exact words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.dam import DamConfig, plan_dam
from pipelines.errors import InputError
from ray_jobs.dam import describe_plan
from tests.pipelines.dam.conftest import Experts, make_experts
from tests.tiny_models import save_tiny_gpt2


def test_what_does_not_fit_is_said_by_the_plan(
    experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experts.config(cache=str(tmp_path / "cache"))
    assert "note" not in describe_plan(config)
    monkeypatch.setattr("ray_jobs.dam._device_memory", lambda: ("this machine", 1000))
    last = describe_plan(config).splitlines()[-1]
    assert last.startswith("note: this machine has 0.00 GB; fewer experts, bf16, ")
    for fields, where in (
        ({"strategy": "fsdp2", "num_workers": 3}, "sharded over 3 worker(s)"),
        ({"experts": "source"}, "brought from their files"),
    ):
        assert where in describe_plan(experts.config(cache=config.cache, **fields))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.0, "loss": "mse"}, "temperature: has no effect with loss mse"),
    ({"base_data": "x"}, "base_data: has no effect without include_base: true"),
    ({"include_base": True}, "base_data: required with loss kl"),
    ({"num_epochs": 2}, "give either num_steps or num_epochs"),
    ({"evaluation": {"data": "x", "every": 1}}, "evaluation.data: allowed here: share"),
    ({"loss": "js"}, "loss"),
    ({"num_workers": 2}, "num_workers: found 2; allowed with strategy single: 1"),
    ({"experts": "source", "strategy": "fsdp2"}, "allowed with it: device or host"),
    ({"models": []}, "models"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_configs_that_cannot_be(experts: Experts, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experts.config(**fields)


def test_experts_that_cannot_be(experts: Experts, tmp_path: Path) -> None:
    fields = experts.fields()
    with pytest.raises(ValueError, match="found one expert alone; allowed: two or more"):
        DamConfig.model_validate(fields | {"models": fields["models"][:1]})
    without = [fields["models"][0], {"model": fields["models"][1]["model"]}]
    with pytest.raises(ValueError, match=f"{experts.models[1]}: data: required with loss kl"):
        DamConfig.model_validate(fields | {"models": without})

    def refused(model: Path, **changes: Any) -> str:
        models = [fields["models"][0], fields["models"][1] | {"model": str(model)}]
        with pytest.raises(InputError) as error:
            plan_dam(experts.config(models=models, **changes), tmp_path / "cache")
        return str(error.value)

    wide = make_experts(tmp_path / "wide", intermediate_size=40)
    assert "found shape [32, 40]; allowed: [32, 48]" in refused(wide.models[0])
    longer = copied(experts.models[1], tmp_path / "longer")
    tensors = load_file(longer / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, longer / "model.safetensors", {"format": "pt"})
    change(longer / "config.json", lambda config: config.update(vocab_size=len(tensors[name])))
    assert f"{longer}: lm_head.weight: found shape [" in refused(longer)
    other = copied(experts.models[1], tmp_path / "other")
    change(other / "tokenizer.json", exchange_last_tokens)
    assert "vocabularies differ: 2 tokens" in refused(other)
    turned = make_experts(tmp_path / "turned", rms_norm_eps=0.5)
    assert "config.json: rms_norm_eps: found 0.5; allowed: 1e-06" in refused(turned.models[0])
    tied = make_experts(tmp_path / "tied", tied=True)
    with pytest.raises(InputError, match=r"^lm_head: found true, but .* has no head of its own"):
        plan_dam(tied.config(lm_head=True), tmp_path / "cache")
    conv = str(save_tiny_gpt2(tmp_path / "gpt2"))
    models = [each | {"model": conv} for each in fields["models"]]
    with pytest.raises(InputError, match=r"c_attn.weight: is stored as \(in, out\)"):
        plan_dam(experts.config(base_model=conv, models=models), tmp_path / "cache")


def copied(model: Path, to: Path) -> Path:
    """A copy of a checkpoint, to be changed."""
    shutil.copytree(model, to)
    return to


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def exchange_last_tokens(tokenizer: dict[str, Any]) -> None:
    """Give two tokens each other's number."""
    vocabulary = tokenizer["model"]["vocab"]
    *_, one, two = vocabulary
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
