"""Activations in CPU memory: what goes there, and that no bit of a run changes.

Oracle: the bytes of the run that keeps its activations.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers_in_turn
from torch import nn
from training_files import align_config, run_here, seeded_metrics

from pipelines.train import activations
from pipelines.train.activations import offload_activations

WEIGHTS = "model/model.safetensors"


def test_what_is_kept_goes_and_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and activations are copied, weights are not; the gradients are the same."""
    packed: list[Any] = []
    real = activations._pack
    monkeypatch.setattr(activations, "_pack", lambda t: packed.append(real(t)) or packed[-1])
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    with offload_activations():
        loss = model(x).sum()
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    kept = [entry for entry in packed if isinstance(entry, torch.Tensor)]
    gone = [entry[1] for entry in packed if isinstance(entry, tuple)]
    assert sorted(tuple(t.shape) for t in kept) == [(4, 8), (8, 1)]  # transposed
    assert sorted(tuple(t.shape) for t in gone) == [(3, 4), (3, 8), (3, 8)]
    assert x.data_ptr() not in {t.data_ptr() for t in gone}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_ends_with_the_same_bytes(
    checkpointing: bool, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Forced on a CPU, where `poise align` refuses it; with gradient checkpointing too."""
    fields = {"gradient_checkpointing": checkpointing, "micro_batch_size": 4}
    plain = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "plain")
    config = align_config(tiny_llama, preferences, **fields, activation_offload=True)
    run = run_here(config, tmp_path / "run")
    assert (run / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert seeded_metrics(run) == seeded_metrics(plain)


@pytest.mark.slow
def test_sharded_runs_end_with_the_same_bytes(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Weights that are gathered for a pass are not held by what the pass keeps."""
    fields = {"num_workers": 2, "micro_batch_size": 2, "precision": "bf16"}
    strategies = ("ddp", "fsdp2", "zero2", "zero3")
    run_workers_in_turn(
        {
            tmp_path / strategy / name: align_config(
                tiny_llama, preferences, **fields, strategy=strategy, activation_offload=offload
            )
            for strategy in strategies
            for name, offload in (("plain", False), ("run", True))
        }
    )
    for strategy in strategies:
        plain, run = (tmp_path / strategy / name / WEIGHTS for name in ("plain", "run"))
        assert run.read_bytes() == plain.read_bytes(), strategy
