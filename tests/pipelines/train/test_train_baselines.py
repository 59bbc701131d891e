"""The first paper's baselines as settings of a run: ChildTuning-F, rounding, averages of weights.

Oracle: torch's AdamW and the average's recurrence, both in float64; a run on one worker; and the
bytes of a run that nobody disturbed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers_in_turn
from safetensors.torch import load_file
from torch import Tensor, nn
from training_files import (
    align_config,
    metrics,
    run_here,
    seeded_metrics,
    stop_at_the_fourth_step,
)

from pipelines.train import AlignConfig
from pipelines.train.checkpoints import saved_steps, step_folder
from pipelines.train.export_run import export_checkpoint
from pipelines.train.material import material
from pipelines.train.optimizer import build_optimizer
from pipelines.train.strategies import build_strategy
from pipelines.train.strategy_table import STRATEGIES
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"
RATE = 1e-3
MASKED = {"learning_rate": RATE, "weight_decay": 0.1, "gradient_density": 0.3}


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings, one name of two."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tied", seed=5, tied=True)


class Layer(nn.Module):
    """One parameter of a thousand elements."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((40, 25), value))


def optimizer_of(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """As a run builds it."""
    return build_optimizer(align_config(Path("m"), Path("r"), optimizer=settings), model)


@pytest.mark.parametrize("rescale", [True, False])
def test_childtuning_is_adamw_on_masked_gradients(rescale: bool) -> None:
    """The masks are read from the first moment; then torch's AdamW takes the same steps."""
    layer, exact = Layer(0.5), Layer(0.5).double()
    optimizer = optimizer_of(layer, **MASKED, gradient_rescale=rescale)
    oracle = torch.optim.AdamW(exact.parameters(), lr=RATE, weight_decay=0.1, foreach=False)
    draw, before, masks = torch.Generator().manual_seed(0), torch.zeros(40, 25), []
    for _ in range(3):
        gradient = torch.randn(40, 25, generator=draw)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        mean = optimizer.state[layer.weight]["exp_avg"]
        kept = (mean - 0.9 * before) / 0.1
        mask = kept.abs() > gradient.abs() / 2
        scaled = gradient.double() / (0.3 if rescale else 1.0)
        torch.testing.assert_close(kept.double(), scaled * mask, rtol=1e-4, atol=1e-5)
        exact.weight.grad = scaled * mask
        oracle.step()
        before = mean.clone()
        masks.append(mask)
    torch.testing.assert_close(layer.weight.double(), exact.weight, rtol=1e-6, atol=1e-7)
    shares = [mask.double().mean().item() for mask in masks]
    assert shares == pytest.approx([0.3] * 3, abs=4 * (0.3 * 0.7 / 1000) ** 0.5)
    assert not torch.equal(masks[0], masks[1])


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """The spacing at 0.02 is 1.9e-9: steps of 2e-10 vanish in rounding to nearest."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        layer = Layer(0.02)
        start = layer.weight.detach().double()
        optimizer = optimizer_of(layer, learning_rate=2e-10, rounding=rounding)
        for _ in range(20):
            layer.weight.grad = torch.ones(40, 25)
            optimizer.step()
        moved[rounding] = (start - layer.weight.double()).mean().item()
    assert moved["nearest"] == 0
    # Twenty draws for each of a thousand elements: a standard error of 8e-11.
    assert moved["stochastic"] == pytest.approx(20 * 2e-10, abs=3.2e-10)


def test_an_exported_average_is_the_recurrence_over_the_steps(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Over the weights in the checkpoints of the same run without an average."""
    every = {"checkpoint_every": 1, "keep_checkpoints": 9}
    plain = align_config(tiny_llama, preferences, **every)
    run = run_here(plain, tmp_path / "plain")
    strategy = build_strategy(plain, torch.device("cpu"))
    average: dict[str, Tensor] = {}
    for step in range(plain.num_steps + 1):
        if step:
            strategy.load(step_folder(run, step))
        for name, values in strategy.model.named_parameters():
            theta = values.detach().double()
            average[name] = 0.8 * average.get(name, theta) + 0.2 * theta
    ema = {"ema": {"coefficient": 0.2, "mode": "export"}}
    config = align_config(tiny_llama, preferences, optimizer={"learning_rate": RATE} | ema, **every)
    followed = run_here(config, tmp_path / "followed")
    exported, last = load_file(followed / WEIGHTS), load_file(run / WEIGHTS)
    for name, values in average.items():
        torch.testing.assert_close(exported[name].double(), values, rtol=0, atol=7e-8)
        assert (last[name] - exported[name]).abs().max() > 1e-4
    losses = [[line["loss"] for line in seeded_metrics(each)] for each in (run, followed)]
    assert losses[0] == losses[1]  # training does not read it


def settings_of(case: str, tau: Path) -> dict[str, Any]:
    """An optimizer with everything that this file is about, but for what a case is without."""
    everything: dict[str, Any] = MASKED | {"rounding": "stochastic"}
    everything |= {"ema": {"coefficient": 0.1, "mode": "pull"}}
    online = {"name": "ondare", "density": 0.5, "alpha": 1e-2, "rescale": True}
    online |= {"tau": {"base": tau, "tuned": tau}}
    average = {"learning_rate": RATE, "ema": {"coefficient": 0.1, "mode": "export"}}
    return {"adamw": everything, "ondare": everything | online, "average": average}[case]


@pytest.mark.parametrize("case", ["adamw", "ondare", "average"])
def test_a_broken_run_goes_on_exactly(
    case: str, tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(case, tiny_llama)
    config = align_config(tiny_llama, preferences, optimizer=settings, num_steps=4)
    whole = run_here(config, tmp_path / "whole")
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    broken = run_here(config, tmp_path / "broken")
    assert (broken / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert seeded_metrics(broken) == seeded_metrics(whole)


def test_the_average_of_an_unfinished_run(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`poise export` writes the average of its checkpoint: that of a run of so many steps."""
    fields = {"optimizer": settings_of("average", tiny_llama), "schedule": "constant"}
    short = align_config(tiny_llama, preferences, num_steps=2, **fields)
    folder = run_here(short, tmp_path / "short")
    config = align_config(tiny_llama, preferences, num_steps=4, **fields)
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    record = {"fingerprint": "f", "config": config.model_dump(mode="json")}
    (tmp_path / "broken" / "run.json").write_text(json.dumps(record))
    out = export_checkpoint(tmp_path / "broken", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / WEIGHTS).read_bytes()


def test_adapters_with_masked_gradients(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They learn, and a broken run goes on exactly."""
    fields = {"lora": {"rank": 4}, "num_steps": 6}
    fields["optimizer"] = {"learning_rate": 2e-2, "gradient_density": 0.5}
    config = align_config(tiny_llama, preferences, **fields)
    whole = run_here(config, tmp_path / "whole")
    assert seeded_metrics(whole)[-1]["loss"] < seeded_metrics(whole)[0]["loss"] - 0.01
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    broken = run_here(config, tmp_path / "broken")
    assert (broken / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def sharded(strategy: str, model: Path, data: Path, case: str) -> AlignConfig:
    """A run on two workers, or on one."""
    return align_config(
        model,
        data,
        optimizer=settings_of(case, model),
        strategy=strategy,
        num_workers=1 if strategy == "single" else 2,
        num_steps=4,
        global_batch_size=4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("adamw", [name for name in STRATEGIES if name != "single"]),
        ("average", ["fsdp2", "zero1", "zero3"]),
    ],
)
def test_every_strategy(
    case: str, names: list[str], tied_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The weights of one worker, and the same bytes again from a checkpoint."""
    alone = run_here(sharded("single", tied_llama, preferences, case), tmp_path / "alone")
    expected = load_file(alone / WEIGHTS)
    configs = {name: sharded(name, tied_llama, preferences, case) for name in names}
    run_workers_in_turn({tmp_path / name: config for name, config in configs.items()})
    for name in names:
        broken = tmp_path / "again" / name
        shutil.copytree(step_folder(tmp_path / name, 2), step_folder(broken, 2))
        assert saved_steps(broken) == [2]
        for one, other in zip(metrics(alone), metrics(tmp_path / name), strict=True):
            for norm in {"update_norm", "delta_norm"} & set(one):
                assert other[norm] == pytest.approx(one[norm], rel=1e-4), (name, norm)
        for key, values in load_file(tmp_path / name / WEIGHTS).items():
            torch.testing.assert_close(
                values, expected[key], rtol=0, atol=3e-6, msg=f"{name} {key}"
            )
    run_workers_in_turn({tmp_path / "again" / name: config for name, config in configs.items()})
    for name in names:
        found = (tmp_path / "again" / name / WEIGHTS).read_bytes()
        assert found == (tmp_path / name / WEIGHTS).read_bytes(), name


ONLINE = {"density": 0.5, "alpha": 0.1, "tau": {"base": "b", "tuned": "t"}}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"gradient_rescale": False}, "gradient_rescale: has no effect with gradient_density 1"),
        ({"rescale": True}, "rescale: has no effect with adamw"),
        ({"name": "onties", "rescale": True} | ONLINE, "rescale: has no effect with onties"),
        (
            {"name": "ondare", "rescale": True} | ONLINE | {"density": 1},
            "rescale: has no effect with density 1",
        ),
        (
            {"name": "ondare", "rounding": "stochastic", "implementation": "compiled"} | ONLINE,
            "implementation: found compiled with rescale, rounding or gradient_density, which take "
            "the eager path; allowed with them: auto, eager",
        ),
        (
            {"name": "ondare", "merge_every": 3, "ema": {"coefficient": 0.1, "mode": "pull"}}
            | ONLINE,
            "ema: found merge_every 3; allowed with a moving average: 1",
        ),
        ({"ema": {"coefficient": 0.1, "mode": "both"}}, "'export' or 'pull'"),
        ({"ema": {"coefficient": 0, "mode": "pull"}}, "greater than 0"),
        ({"gradient_density": 0}, "greater than 0"),
    ],
)
def test_where_a_setting_has_no_effect(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_config(Path("m"), Path("r"), optimizer={"learning_rate": RATE} | optimizer)


def test_no_average_of_adapters() -> None:
    optimizer = {"learning_rate": RATE, "ema": {"coefficient": 0.1, "mode": "export"}}
    with pytest.raises(ValueError, match=r"optimizer\.ema: found with lora, where an average"):
        align_config(Path("m"), Path("r"), optimizer=optimizer, lora={"rank": 2})


def test_only_what_is_set_is_part_of_a_run() -> None:
    """Configs without the new fields have the fingerprints of earlier versions."""
    plain = material(align_config(Path("m"), Path("r")))["optimizer"]
    new = {"gradient_density", "gradient_rescale", "rounding", "rescale", "ema"}
    assert not new & set(plain)
    masked = material(align_config(Path("m"), Path("r"), optimizer=MASKED))["optimizer"]
    assert set(masked) - set(plain) == {"gradient_density"}
