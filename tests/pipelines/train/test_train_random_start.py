"""Starts with random weights. Oracle: the model that transformers makes of a config and a seed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines.errors import InputError
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.export_run import export_checkpoint
from pipelines.train.material import material
from pipelines.train.run import _unfinished_run

RANDOM: dict[str, Any] = {"init": "random", "objective": {"name": "sft"}}


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model's config and tokenizer without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_llama, tmp_path / "folder", ignore=ignored))


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in preference_rows(24)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def unfinished(config: AlignConfig, out: Path) -> Path:
    """A run whose workers are done and whose output was not put into place."""
    folder = out.with_name(f".{out.name}.partial")
    with _unfinished_run(folder, plan_alignment(config, out.parent / "cache"), force=False):
        return run_here(config, folder)


def test_the_steps_are_those_of_transformers_own_model(
    folder: Path, conversations: Path, tmp_path: Path
) -> None:
    """Saved by hand and trained, it ends with the same bytes; so does an exported checkpoint."""
    config = align_config(folder, conversations, **RANDOM, seed=7)
    run = unfinished(config, tmp_path / "run")
    own = shutil.copytree(folder, tmp_path / "own")
    torch.manual_seed(7)
    settings = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(own)
    by_hand = align_config(own, conversations, objective={"name": "sft"}, seed=7)
    expected = run_here(by_hand, tmp_path / "by hand" / "run")
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (expected / weights).read_bytes()
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(expected)]
    exported = export_checkpoint(tmp_path / "run", tmp_path / "exported")
    assert (exported / "model.safetensors").read_bytes() == (run / weights).read_bytes()
    record = json.loads((exported / "poise.json").read_text())
    assert (record["config"]["model"], record["config"]["init"]) == (str(folder), "random")
    other = unfinished(config.model_copy(update={"seed": 8}), tmp_path / "other")
    first, second = (load_file(each / weights)["lm_head.weight"] for each in (run, other))
    assert not torch.equal(first, second)


def test_weights_in_the_folder_are_not_read(
    folder: Path, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    runs = [
        run_here(align_config(model, conversations, **RANDOM, num_steps=1), tmp_path / name / "run")
        for name, model in (("without", folder), ("with", tiny_llama))
    ]
    one, other = ((run / "model" / "model.safetensors").read_bytes() for run in runs)
    assert one == other


def test_what_a_random_start_needs(folder: Path, conversations: Path, preferences: Path) -> None:
    """A config, and sft of the whole model; other runs stay the runs that they were."""
    with pytest.raises(ValueError, match="init: found random with objective dpo; allowed with it"):
        align_config(folder, preferences, init="random")
    with pytest.raises(ValueError, match="init: found random with lora; allowed with it: checkpo"):
        align_config(folder, conversations, **RANDOM, lora={"rank": 2})
    assert "init" not in material(align_config(folder, preferences))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json, by which init: random makes a model"):
        plan_alignment(align_config(folder, conversations, **RANDOM))
