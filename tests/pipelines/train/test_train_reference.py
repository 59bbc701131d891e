"""The reference on the fly: what its stored log-probabilities give, without a file."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from processes import run_workers
from safetensors.torch import load_file
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoModelForCausalLM

from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.data import global_batch
from pipelines.train.reference_store import (
    DRAWN_FILE,
    VALUES_FILE,
    read_drawn,
    read_log_probabilities,
)
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"
LIVE = {"reference_log_probabilities": "on_the_fly"}
WAYS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "micro-batches": {"micro_batch_size": 2},
    "kto": {"objective": {"name": "kto"}},
    "adapters": {"lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-2}},
}


def assert_same(one: Path, other: Path) -> None:
    """Equal runs up to rounding."""
    for line, expected in zip(metrics(one), metrics(other), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["margin"] == pytest.approx(expected["margin"], rel=1e-3, abs=1e-5)
    found, expected = (load_file(folder / WEIGHTS) for folder in (one, other))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_on_the_fly_equals_stored(
    way: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The same curve and weights; the policy begins as the reference, to the last bit."""
    stored = run_here(align_config(tiny_llama, preferences, **WAYS[way]), tmp_path / "stored")
    config = align_config(tiny_llama, preferences, **WAYS[way], **LIVE)
    (tmp_path / "fly").mkdir()
    live = run_here(config, tmp_path / "fly" / "run")
    assert_same(live, stored)
    assert metrics(live)[0]["margin"] == 0.0
    assert metrics(live)[-1]["margin"] > 0.01
    assert metrics(live)[0]["kl_per_token"] == 0.0
    assert metrics(live)[-1]["kl_per_token"] > 1e-5
    assert metrics(stored)[0]["kl_per_token"] < 1e-6
    assert metrics(stored)[-1]["kl_per_token"] > 1e-5
    assert list((tmp_path / "cache").glob("reference-*"))
    assert not list((tmp_path / "fly" / "cache").glob("reference-*"))


def test_estimated_kl_is_unbiased(tiny_llama: Path, tmp_path: Path) -> None:
    """From drawn tokens, over many positions, against the exact one: within its standard error."""
    other = save_tiny_llama(tmp_path / "other", seed=7)
    data = write_rows(tmp_path / "rows.jsonl", preference_rows(400))
    fields = {"reference_model": other, "num_steps": 10, "global_batch_size": 40}
    fields |= {"optimizer": {"learning_rate": 1e-9}}
    stored = run_here(align_config(tiny_llama, data, **fields), tmp_path / "stored")
    live = run_here(align_config(tiny_llama, data, **fields, **LIVE), tmp_path / "live")
    pairs = zip(metrics(stored), metrics(live), strict=True)
    errors = [one["kl_per_token"] - two["kl_per_token"] for one, two in pairs]
    standard_error = stdev(errors) / len(errors) ** 0.5
    assert abs(fmean(errors)) < 3 * standard_error
    assert standard_error < 0.1 * metrics(live)[0]["kl_per_token"]


def reference_of(config: AlignConfig, folder: Path) -> Path:
    """What a run with a cache of its own keeps of its reference."""
    folder.mkdir()
    run_here(config, folder / "run")
    (reference,) = (folder / "cache").glob("reference-*")
    return reference


def test_what_is_kept_does_not_depend_on_the_batches(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes whatever the micro-batches; and in other passes the same tokens are drawn."""
    fields: dict[str, Any] = {"num_steps": 1, "global_batch_size": 16}
    small, large = (
        reference_of(
            align_config(tiny_llama, preferences, **fields, micro_batch_size=size),
            tmp_path / str(size),
        )
        for size in (2, 16)
    )
    for name in (VALUES_FILE, DRAWN_FILE):
        assert (small / name).read_bytes() == (large / name).read_bytes()
    monkeypatch.setattr("pipelines.train.reference_store.MAX_TOKENS", 50)
    other = reference_of(align_config(tiny_llama, preferences, **fields), tmp_path / "other")
    (ids, log_probability), (other_ids, other_probability) = map(read_drawn, (small, other))
    assert ids.tolist() == other_ids.tolist()
    assert log_probability == pytest.approx(other_probability, abs=1e-5)
    values = map(read_log_probabilities, (small, other))
    assert torch.allclose(*values, atol=1e-5)


def test_kl_per_token_by_hand(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """The first step's, against a reference that is not the model: transformers and float64."""
    other = save_tiny_llama(tmp_path / "other", seed=7)
    config = align_config(
        tiny_llama, preferences, reference_model=other, num_steps=1, micro_batch_size=2, **LIVE
    )
    line = metrics(run_here(config, tmp_path / "run"))[0]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path).double().requires_grad_(False)
        for path in (tiny_llama, other)
    )
    table = plan_alignment(config, tmp_path / "cache").table
    total, count = 0.0, 0
    for row in global_batch(table.num_rows, 8, 0, config.seed):
        for ids, marks in table.sequences(row):
            tokens = torch.from_numpy(ids).long()[None]
            p, q = (model(tokens).logits[0, :-1].log_softmax(-1) for model in (policy, reference))
            learned = torch.from_numpy(marks)[1:].bool()
            total += float((p.exp() * (p - q)).sum(-1)[learned].sum())
            count += int(learned.sum())
    assert line["kl_per_token"] == pytest.approx(total / count, rel=1e-5)


def test_another_reference_on_the_fly(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """It is the model that the config names, also beside adapters."""
    other = {"reference_model": save_tiny_llama(tmp_path / "other", seed=7), "lora": {"rank": 4}}
    stored = run_here(align_config(tiny_llama, preferences, **other), tmp_path / "stored")
    live = run_here(align_config(tiny_llama, preferences, **other, **LIVE), tmp_path / "live")
    assert_same(live, stored)
    assert abs(metrics(live)[0]["margin"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_on_the_fly_under_each_sharding(
    strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Two workers, with a frozen copy each or in shares, make the steps of one."""
    alone = run_here(align_config(tiny_llama, preferences, **LIVE), tmp_path / "alone")
    config = align_config(
        tiny_llama, preferences, **LIVE, strategy=strategy, num_workers=2, micro_batch_size=2
    )
    assert_same(run_workers(config, tmp_path / "run"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapters_off_under_each_sharding(
    strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The base of sharded adapters is the reference, between two passes that learn."""
    fields = WAYS["adapters"] | LIVE
    alone = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "alone")
    config = align_config(
        tiny_llama, preferences, **fields, strategy=strategy, num_workers=2, micro_batch_size=2
    )
    assert_same(run_workers(config, tmp_path / "run"), alone)
