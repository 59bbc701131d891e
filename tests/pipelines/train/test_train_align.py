"""Alignment runs from config to checkpoint, under Ray and in this process."""

import json
from pathlib import Path

import pytest
import torch
from training_files import align_config, metrics, run_here, seeded_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.train import align, loop


@pytest.fixture(scope="module")
def runs(
    ray_cluster: None, tiny_llama: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same run with each way of laying the model out."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        strategy: align(
            align_config(
                tiny_llama, preferences, strategy=strategy, num_workers=workers, micro_batch_size=2
            ),
            folder / strategy,
        )
        for strategy, workers in (("single", 1), ("ddp", 2), ("fsdp2", 2))
    }


@pytest.mark.ray
def test_strategies_follow_the_same_curve(runs: dict[str, Path]) -> None:
    """Neither the layout nor the number of workers changes a step."""
    alone = metrics(runs["single"])
    assert [line["step"] for line in alone] == [1, 2, 3, 4, 5, 6]
    assert alone[0]["loss"] == pytest.approx(0.6931472, rel=1e-6)  # log 2: policy is reference
    assert alone[-1]["loss"] < 0.68
    for strategy in ("ddp", "fsdp2"):
        for one, other in zip(alone, metrics(runs[strategy]), strict=True):
            for name in ("loss", "gradient_norm", "chosen_log_probability", "learning_rate"):
                assert other[name] == pytest.approx(one[name], rel=2e-5), (strategy, name)


@pytest.mark.ray
def test_output_is_an_ordinary_checkpoint(runs: dict[str, Path], tiny_llama: Path) -> None:
    """transformers loads it; every tensor has moved; config and provenance are there."""
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    weights = {}
    for strategy, path in runs.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        weights[strategy] = model.state_dict()
        assert model.config.architectures == ["LlamaForCausalLM"]
        assert AutoTokenizer.from_pretrained(path).chat_template
        record = json.loads((path / "poise.json").read_text())
        assert record["config"]["strategy"] == strategy
        assert set(record["inputs"]) == {"model", "data"}
        assert not (path.parent / f".{path.name}.partial").exists()
    for name, tensor in before.items():
        assert not torch.equal(tensor, weights["single"][name]), name
        for strategy in ("ddp", "fsdp2"):
            assert torch.allclose(weights["single"][name], weights[strategy][name], atol=2e-6)


def test_interrupted_run_ends_with_the_same_bytes(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped between checkpoints repeats the lost steps exactly."""
    config = align_config(tiny_llama, preferences)
    whole = run_here(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    real = loop.global_batch

    def stops_at_the_fourth(num_rows: int, size: int, number: int, seed: int) -> list[int]:
        if number == 3:
            raise KeyboardInterrupt
        return real(num_rows, size, number, seed)

    monkeypatch.setattr(loop, "global_batch", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_here(config, broken)
    monkeypatch.setattr(loop, "global_batch", real)
    assert len(metrics(broken)) == 3  # the third step is lost: the last checkpoint is the second's
    run_here(config, broken)
    assert seeded_metrics(broken) == seeded_metrics(whole)
    file = "model/model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()
