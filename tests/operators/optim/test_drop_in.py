"""The documented lines, as they stand in docs/optimizers.md, run on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

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
    assert optimizer.path == "reference"


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
