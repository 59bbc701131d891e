"""Pre-training makes an ordinary checkpoint and repeats itself.

Oracle: transformers, which loads it and measures its loss, and a second run's bytes.
"""

import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.tiny_world import build_world, sizes, train_base

SHORT = sizes.Size(32, 2, 30, 4e-3, 12, 2e-3)


def test_training_learns_saves_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "short", SHORT)
    world = build_world(tmp_path / "world", 0, "short")
    threads = torch.get_num_threads()
    for name in ("first", "second"):
        train_base(world, tmp_path / name, "short", seed=3)
    assert torch.get_num_threads() == threads
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")
    )
    assert first == second
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first", local_files_only=True)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.chat_template
    texts = pyarrow.parquet.read_table(world / "data" / "pretrain.parquet")["text"].to_pylist()
    ids = tokenizer(" ".join(texts[:10]), return_tensors="pt").input_ids
    chance = math.log(len(tokenizer))
    assert model(input_ids=ids, labels=ids).loss < chance - 0.5
