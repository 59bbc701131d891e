"""The documented lines, as they stand in docs/optimizers.md, run on a tiny model.

Oracle: they run, and their steps move along tau as documented.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from operators.counter_random import canonical_name
from operators.optim import OnlineMergingAdamW
from tests.tiny_models import save_tiny_llama


def documented(project_root: Path, words: str) -> str:
    """The one block of code in the document that has these words."""
    text = (project_root / "docs" / "optimizers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    [block] = [block for block in blocks if words in block]
    return block


@pytest.fixture
def checkpoints(tmp_path) -> dict:
    """A base model, a tuned one, and the tuned one loaded."""
    base, sft = save_tiny_llama(tmp_path / "base"), save_tiny_llama(tmp_path / "sft", seed=1)
    model = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32)
    return {"base": base, "sft": sft, "model": model}


def run(code: str, names: dict) -> dict:
    """Run documented lines, with a learning rate that suits so small a model."""
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec(code.replace("lr=5e-7", "lr=1e-3").replace("density=0.01", "density=0.9"), names)
    moved = {n: not torch.equal(p, before[n]) for n, p in names["model"].named_parameters()}
    assert all(moved.values()) == ("trainer" in names), moved
    return names


def stepped(names: dict) -> None:
    """One step of the optimizer that lines have made, on the model's own loss."""
    names["model"](input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    names["optimizer"].step()


def test_the_lines_of_another_pair(project_root, checkpoints) -> None:
    names = {**checkpoints}
    lines = documented(project_root, "breadcrumbs")
    exec(lines.replace("lr=5e-7", "lr=1e-3, weight_decay=0.0"), names)
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    stepped(names)
    for name, parameter in names["model"].named_parameters():
        moved = (parameter != before[name]).double().mean().item()
        assert 0.2 < moved < 0.9, name  # what breadcrumbs keeps of the update or of tau


def test_the_lines_of_the_docstring(checkpoints, monkeypatch) -> None:
    """Pasted as they stand, beside checkpoints of these names."""
    monkeypatch.chdir(checkpoints["base"].parent)
    block = OnlineMergingAdamW.__doc__.split("\n\n", 1)[1].split("    Args:")[0]
    names = {"model": checkpoints["model"]}
    exec(inspect.cleandoc(block), names)
    stepped(names)
    assert names["optimizer"].param_groups[0]["consensus"] == "ties"


def test_the_lines_of_an_average(project_root, checkpoints) -> None:
    """ChildTuning-F moves what it keeps, and the average follows a thousandth of the way."""
    names = {**checkpoints}
    exec(documented(project_root, "ExponentialMovingAverage").replace("lr=5e-7", "lr=1e-3"), names)
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    stepped(names)
    after = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    names["take_average"](names["optimizer"])
    for name, parameter in names["model"].named_parameters():
        assert not torch.equal(after[name], before[name]), name
        expected = before[name] + 1e-3 * (after[name] - before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def arguments(path: Path) -> dict:
    """Options that TrainingArguments and DPOConfig share."""
    return {
        "output_dir": str(path / "run"),
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 4,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def test_the_lines_of_an_own_loop(project_root, checkpoints) -> None:
    names = run(documented(project_root, "lr=5e-7, density=0.01, alpha=1e-7\n)"), checkpoints)
    model, optimizer = names["model"], names["optimizer"]
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    assert optimizer.path == "eager"


def test_the_lines_of_trl(project_root, checkpoints, tmp_path) -> None:
    from datasets import Dataset
    from trl import DPOConfig

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": message("user", "a b c d"),
            "chosen": message("assistant", "yes ."),
            "rejected": message("assistant", "no"),
        }
    ] * 8
    names = {
        **checkpoints,
        "args": DPOConfig(**arguments(tmp_path), bf16=False),
        "dataset": Dataset.from_list(rows),
        "tokenizer": AutoTokenizer.from_pretrained(checkpoints["sft"]),
    }
    run(documented(project_root, "DPOTrainer"), names)
    assert names["trainer"].state.global_step == 7
    assert len(names["optimizer"].state) == len(list(names["model"].parameters()))


def test_the_lines_of_transformers(project_root, checkpoints, tmp_path) -> None:
    rows = [{"input_ids": torch.arange(5, 12), "labels": torch.arange(5, 12)}] * 8
    names = {
        **checkpoints,
        "args": TrainingArguments(**arguments(tmp_path)),
        "dataset": rows,
    }
    run(documented(project_root, "NAdam"), names)
    saved = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert "anchor" in saved["state"][0]
    assert names["trainer"].state.global_step == 7
    # A resumed trainer goes on from there.
    resumed = AutoModelForCausalLM.from_pretrained(names["sft"], dtype=torch.float32)
    base = type(names["base_optimizer"])(
        resumed.named_parameters(), lr=1e-3, decoupled_weight_decay=True
    )
    delta = names["CheckpointDelta"](names["base"], names["sft"])
    optimizer = names["OnlineMerging"](
        base, delta, consensus="ties", density=0.2, alpha=1e-7, merge_every=5
    )
    trainer = Trainer(
        resumed, names["args"], train_dataset=names["dataset"], optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    optimizer.merge_pending()
    for found, expected in zip(resumed.parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(found, expected)


def adapted(checkpoints: dict, rank: int) -> dict:
    """A model with new adapters, and what a reference has made of the same ones."""
    torch.manual_seed(0)
    settings = LoraConfig(r=rank, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(checkpoints["model"], settings)
    trained = {canonical_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    reference = {name: p.detach() + 0.1 for name, p in trained.items()}
    return {"model": model, "reference_adapters": reference}


def test_the_lines_for_adapters(project_root: Path, checkpoints: dict) -> None:
    """Every adapter moves along its tau, what is frozen stays, another rank is an error."""
    names, code = adapted(checkpoints, 4), documented(project_root, "reference_adapters")
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec(code.replace("density=0.01", "density=1.0").replace("alpha=1e-7", "alpha=0.5"), names)
    for parameter in names["adapters"].values():
        parameter.grad = torch.zeros_like(parameter)
    names["optimizer"].step()
    for name, parameter in names["model"].named_parameters():
        moved = parameter.detach() - before[name]
        expected = 0.05 if parameter.requires_grad else 0.0
        torch.testing.assert_close(moved, torch.full_like(moved, expected), atol=1e-3, rtol=0)
    adapters = names["adapters"]
    first = next(iter(adapters))
    for tau, message in (
        ({n: p.detach()[:2] for n, p in adapters.items()}, f"'{first}' has shape"),
        ({}, f"has no tensor for parameter '{first}'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            OnlineMergingAdamW(adapters.items(), tau, alpha=0.1, density=0.5)
