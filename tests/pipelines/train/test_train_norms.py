"""The lengths of updates and of the trained delta. Oracle: the weights themselves, in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_files import align_config, metrics, run_here

from pipelines.train.checkpoints import step_folder
from pipelines.train.metrics import UpdateLength
from pipelines.train.strategies import build_strategy
from pipelines.train.strategies.lora import is_adapter
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two models."""
    squares = [(one[name].double() - other[name].double()).square().sum() for name in one]
    return float(torch.stack(squares).sum().sqrt())


def test_norms_of_some_steps(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """At the asked steps and the last one, from the weights in the checkpoints around them; what is
    measured changes no byte.
    """
    base = save_tiny_llama(tmp_path / "base", seed=9)
    optimizer = {"name": "ondare", "density": 0.5, "alpha": 1e-2, "learning_rate": 1e-3}
    optimizer |= {"tau": {"base": base, "tuned": tiny_llama}}
    fields = {"optimizer": optimizer, "num_steps": 5}
    config = align_config(
        tiny_llama, preferences, checkpoint_every=1, keep_checkpoints=9, norms_every=2, **fields
    )
    run = run_here(config, tmp_path / "run")
    strategy = build_strategy(config, torch.device("cpu"))
    models = [{n: p.detach().clone() for n, p in strategy.model.named_parameters()}]
    for step in range(1, 6):
        strategy.load(step_folder(run, step))
        models.append({n: p.detach().clone() for n, p in strategy.model.named_parameters()})
    stored = load_file(base / "model.safetensors")
    tau = distance(models[0], {name: stored[name] for name in models[0]})
    for step, line in enumerate(metrics(run), 1):
        assert ("update_norm" in line) == ("delta_norm" in line) == (step in (2, 4, 5))
        if "update_norm" in line:
            update = distance(models[step], models[step - 1])
            delta = distance(models[step], models[0])
            assert line["update_norm"] == pytest.approx(update, rel=1e-9)
            assert line["delta_norm"] == pytest.approx(delta, rel=1e-9)
            assert line["delta_to_tau"] == pytest.approx(delta / tau, rel=1e-6)
    usual = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "usual")
    assert (usual / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    assert ["update_norm" in line for line in metrics(usual)] == [False, True, False, True, True]


def test_the_record_has_the_delta_of_what_is_exported(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Not that of the last step, which an exported average is behind."""
    optimizer = {"learning_rate": 1e-3, "ema": {"coefficient": 0.2, "mode": "export"}}
    run = run_here(align_config(tiny_llama, preferences, optimizer=optimizer), tmp_path / "run")
    found = json.loads((run / "exported").read_text())["delta"]
    exported = load_file(run / WEIGHTS)
    start = load_file(tiny_llama / "model.safetensors")
    assert found["delta_norm"] == pytest.approx(distance(exported, start), rel=1e-6)
    assert found["delta_norm"] < 0.8 * metrics(run)[-1]["delta_norm"]


def test_adapters_move_by_their_products(tiny_llama: Path, preferences: Path) -> None:
    """The length is that of the merged weights' update."""
    config = align_config(tiny_llama, preferences, lora={"rank": 3, "alpha": 5.0})
    strategy = build_strategy(config, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)

    def move(scale: float) -> None:
        for name, factor in strategy.model.named_parameters():
            if is_adapter(name):
                factor.data += scale * torch.randn(factor.shape, generator=draw)

    move(0.3)
    before = {part.name: values.clone() for part, values in strategy.owned()}
    length = UpdateLength(strategy)
    move(1e-3)
    after = {part.name: values.clone() for part, values in strategy.owned()}
    assert length.measure() == pytest.approx(distance(after, before), rel=1e-4)
