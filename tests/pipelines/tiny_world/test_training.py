"""Base and SFT training: real steps, ordinary checkpoints, the same bytes from a seed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.tiny_world import build_world, sizes, train_base, train_sft

SHORT = sizes.Size(32, 2, 30, 4e-3, 12, 2e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("training") / "world", 0, "smoke")


def test_training_learns_saves_and_repeats(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.SIZES, "short", SHORT)
    threads = torch.get_num_threads()
    for name in ("first", "second"):
        train_base(world, tmp_path / name / "base", "short", seed=3)
        train_sft(world, tmp_path / name / "base", tmp_path / name / "sft", "short", seed=3)
    assert torch.get_num_threads() == threads
    for stage in ("base", "sft"):
        first, second = (
            (tmp_path / name / stage / "model.safetensors").read_bytes()
            for name in ("first", "second")
        )
        assert first == second, stage
    base, sft = (load_file(tmp_path / "first" / s / "model.safetensors") for s in ("base", "sft"))
    assert all(not torch.equal(base[name], sft[name]) for name in base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "sft", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first" / "sft", local_files_only=True)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.chat_template
