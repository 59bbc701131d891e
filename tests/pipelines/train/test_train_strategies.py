"""Every strategy makes the steps of one process, and a killed run ends with the same bytes.

Oracle: a run in this process, without any sharding; and the bytes of a run that nobody disturbed.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import (
    given_gradient,
    memory_of_loading,
    run_on_given_gradients,
    run_workers,
    run_workers_in_turn,
)
from safetensors.torch import load_file
from torch import Tensor
from training_files import align_config, broken_off, metrics, run_here, seeded_metrics
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipelines.train import AlignConfig
from pipelines.train.checkpoints import saved_steps
from pipelines.train.optimizer import build_optimizer
from pipelines.train.strategies.zero import ZeroStrategy
from pipelines.train.strategy_table import STRATEGIES
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and a tuned one, both with tied embeddings."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(
        save_tiny_llama(folder / name, seed=seed, tied=True) for name, seed in (("b", 1), ("t", 2))
    )


def config_of(
    strategy: str, models: tuple[Path, Path], preferences: Path, **fields: Any
) -> AlignConfig:
    """A run whose every part matters: sign consensus, thresholds over ranks, a tail of step-K."""
    base, tuned = models
    settings: dict[str, Any] = {
        "optimizer": {
            "name": "onties",
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "density": 0.4,
            "alpha": 1e-2,
            "merge_every": 3,
            "tau": {"base": base, "tuned": tuned},
        },
        "strategy": strategy,
        "num_workers": 1 if strategy == "single" else 2,
        "micro_batch_size": 2,
        "num_steps": 8,
    }
    return align_config(tuned, preferences, **(settings | fields))


@pytest.fixture(scope="module")
def run_alone(
    models: tuple[Path, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run in this process with some fields set, once for all that are compared with it."""
    runs: dict[str, Path] = {}

    def run(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in runs:
            config = config_of("single", models, preferences, **fields)
            runs[key] = run_here(config, tmp_path_factory.mktemp("single") / "run")
        return runs[key]

    return run


EVALUATED = {"evaluation": {"share": 0.25, "every": 3}}


@pytest.fixture(scope="module")
def whole_runs(
    models: tuple[Path, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of each strategy, in turn on the same two workers."""
    folder = tmp_path_factory.mktemp("whole")
    names = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    runs = {folder / name: config_of(name, models, preferences, **EVALUATED) for name in names}
    run_workers_in_turn(runs)
    return {run.name: run for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_strategy(
    strategy: str,
    models: tuple[Path, Path],
    preferences: Path,
    run_alone: Callable[..., Path],
    whole_runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Losses and norms of each step, the exported weights, and both again after a kill."""
    alone, whole = run_alone(**EVALUATED), whole_runs[strategy]
    config = config_of(strategy, models, preferences, **EVALUATED)
    assert [line["step"] for line in metrics(whole) if "eval_loss" in line] == [3, 6, 8]
    for one, other in zip(metrics(alone), metrics(whole), strict=True):
        for name in {"loss", "gradient_norm", "margin", "eval_loss", "eval_margin"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    found, expected = (load_file(folder / WEIGHTS) for folder in (whole, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Where a sign election hangs on a last bit, single elements may differ by a whole step.
        different = ~torch.isclose(found[name], tensor, atol=5e-6)
        assert different.float().mean() < 0.02, name
    killed = run_workers(config, tmp_path / "killed", kill_after=5)
    assert saved_steps(killed) and not (killed / WEIGHTS).exists()
    run_workers(config, killed)
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert seeded_metrics(killed) == seeded_metrics(whole)


@pytest.mark.parametrize(
    "strategy",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero2")), "zero3"],
)
def test_a_killed_worker_changes_nothing(
    strategy: str, models: tuple[Path, Path], preferences: Path, tmp_path: Path
) -> None:
    """The shortest kill there is, for the fast tests: the run that goes on ends the same, with the
    model of an earlier step, whose evaluation no later one exceeds.
    """
    config = config_of(
        strategy,
        models,
        preferences,
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.3, "weight_decay_on": "matrices"},
        schedule="constant",
        num_steps=5,
        micro_batch_size=4,
        evaluation={"share": 0.25, "every": 2, "keep": "best", "metric": "accuracy"},
    )
    whole = run_workers(config, tmp_path / "whole")
    killed = run_workers(config, tmp_path / "killed", kill_after=3)
    assert saved_steps(killed) and not (killed / WEIGHTS).exists()
    run_workers(config, killed)
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert seeded_metrics(killed) == seeded_metrics(whole)
    told = [json.loads((run / "exported").read_text())["evaluation"] for run in (whole, killed)]
    assert told[0] == told[1] and told[0]["written_step"] == told[0]["best_step"] == 2
    single = {"num_steps": 2, "strategy": "single", "num_workers": 1}
    alone = run_here(config.model_copy(update=single), tmp_path / "alone")
    for name, tensor in load_file(alone / WEIGHTS).items():
        assert torch.allclose(load_file(whole / WEIGHTS)[name], tensor, atol=5e-6), name


KTO = {"objective": {"name": "kto"}, "optimizer": {"learning_rate": 1e-3}, "num_steps": 6}
PLAIN = {"optimizer": {"learning_rate": 1e-3}, "num_steps": 6}
OPTIONS = {"precision": "bf16", "gradient_checkpointing": True, "cpu_offload": True}
IN_TURN = [
    *(("kto", strategy) for strategy in ("ddp", "fsdp2", "zero2", "zero3")),
    *(("options", strategy) for strategy in ("fsdp2", "zero1", "zero2", "zero3")),
]


@pytest.fixture(scope="module")
def runs_in_turn(
    models: tuple[Path, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Runs of two workers, which take turns on the same two."""
    folder = tmp_path_factory.mktemp("in-turn")
    fields = {"kto": KTO, "options": PLAIN | OPTIONS}
    runs = {
        folder / f"{what}-{strategy}": config_of(strategy, models, preferences, **fields[what])
        for what, strategy in IN_TURN
    }
    run_workers_in_turn(runs)
    return dict(zip(IN_TURN, runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [strategy for what, strategy in IN_TURN if what == "kto"])
def test_kto_on_two_workers(
    strategy: str, run_alone: Callable[..., Path], runs_in_turn: dict[tuple[str, str], Path]
) -> None:
    """Its reference point is that of the global batch, whoever has which rows."""
    alone, run = run_alone(**KTO), runs_in_turn["kto", strategy]
    for one, other in zip(metrics(alone), metrics(run), strict=True):
        for name in ("loss", "kl", "gradient_norm", "margin", "kl_per_token"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    assert max(line["kl"] for line in metrics(alone)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [strategy for what, strategy in IN_TURN if what == "options"])
def test_options_of_sharding(
    strategy: str, run_alone: Callable[..., Path], runs_in_turn: dict[tuple[str, str], Path]
) -> None:
    """bf16, gradient checkpointing and CPU offload together stay near the float32 run."""
    alone, run = run_alone(**PLAIN), runs_in_turn["options", strategy]
    for one, other in zip(metrics(alone), metrics(run), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
    assert load_file(run / WEIGHTS)["model.norm.weight"].dtype == torch.float32


@pytest.mark.slow
def test_no_worker_of_zero3_ever_holds_a_whole_model(
    preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four workers comes to hold its quarter, and at most a tensor or two beside it."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")  # what is freed goes back at once
    config = LlamaConfig(
        vocab_size=4096, hidden_size=640, intermediate_size=1720, num_hidden_layers=12
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    size = sum(4 * p.numel() for p in model.parameters())
    run = align_config(tmp_path / "model", preferences, strategy="zero3", num_workers=4)
    held = memory_of_loading(run, tmp_path / "run")
    assert 0.2 * size < max(held) < 0.5 * size


HANDED_OVER = [
    (strategy, precision, workers)
    for strategy in ("zero1", "zero2", "zero3")
    for precision in ("float32", "bf16")
    for workers in ((2, 1), (1, 2))
]


@pytest.fixture(scope="module")
def handed_over(
    models: tuple[Path, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, tuple[int, int]], tuple[Path, Path]]:
    """Runs of so many workers, and the same that others, more or fewer, took up from step 4. All
    runs of as many workers take turns on them.
    """
    folder = tmp_path_factory.mktemp("handed-over")
    places = {case: folder / str(number) for number, case in enumerate(HANDED_OVER)}

    def configs(name: str, place: int, num_workers: int) -> dict[Path, AlignConfig]:
        return {
            places[case] / name: config_of(
                case[0],
                models,
                preferences,
                precision=case[1],
                checkpoint_every=4,
                num_workers=num_workers,
            )
            for case in HANDED_OVER
            if case[2][place] == num_workers
        }

    for num_workers in (1, 2):
        run_workers_in_turn(configs("whole", 0, num_workers))
    for place in places.values():
        broken = broken_off(place / "whole", place / "broken", checkpoint=4, lines=6)
        assert saved_steps(broken) == [4]
    for num_workers in (1, 2):
        run_workers_in_turn(configs("broken", 1, num_workers))
    return {case: (place / "whole", place / "broken") for case, place in places.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", HANDED_OVER)
def test_zero_goes_on_with_another_number_of_workers(
    case: tuple[str, str, tuple[int, int]],
    models: tuple[Path, Path],
    handed_over: dict[tuple[str, str, tuple[int, int]], tuple[Path, Path]],
) -> None:
    """Checkpoints, with moments and the anchor of step-K, are taken up by more ranks or fewer."""
    precision, (whole, broken) = case[1], handed_over[case]
    near = 1e-4 if precision == "float32" else 0.03
    for one, other in zip(metrics(broken), metrics(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=near)
    found, expected = (load_file(folder / WEIGHTS) for folder in (broken, whole))
    base = load_file(models[1] / "model.safetensors")
    moved = sum((expected[n] - base[n]).square().sum() for n in expected).sqrt()
    apart = sum((found[n] - expected[n]).square().sum() for n in expected).sqrt()
    print(f"apart {apart / moved:.1e} of what training has added")
    assert apart < (1e-5 if precision == "float32" else 0.03) * moved


@pytest.mark.slow
def test_another_number_of_workers_goes_on(
    models: tuple[Path, Path],
    preferences: Path,
    run_alone: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Checkpoints of fsdp2 are taken up by one process, which ends within a tolerance."""
    whole = run_alone()
    config = config_of("fsdp2", models, preferences)
    broken = run_workers(config, tmp_path / "broken", kill_after=5)
    run_here(config_of("single", models, preferences), broken)
    found, expected = (load_file(folder / WEIGHTS) for folder in (broken, whole))
    for name, tensor in expected.items():
        different = ~torch.isclose(found[name], tensor, atol=5e-6)
        assert different.float().mean() < 0.02, name


@pytest.fixture(scope="module")
def on_given_gradients(
    models: tuple[Path, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[tuple[str, str], tuple[AlignConfig, dict[str, Tensor]]]]:
    """For a number of workers, once: config and masters of each strategy with each optimizer."""
    base, tuned = models

    @functools.cache
    def run(num_workers: int) -> dict[tuple[str, str], tuple[AlignConfig, dict[str, Tensor]]]:
        folder, configs = tmp_path_factory.mktemp("given"), {}
        for strategy, name in itertools.product(("zero1", "zero2", "zero3"), ("ondare", "onties")):
            optimizer = {
                "name": name,
                "learning_rate": 1e-3,
                "weight_decay": 0.01,
                "eps": 0.5,  # first updates differ in size
                "density": 0.4,
                "alpha": 1e-2,
                "tau": {"base": base, "tuned": tuned},
            }
            configs[strategy, name] = config_of(
                strategy,
                models,
                preferences,
                optimizer=optimizer,
                num_workers=num_workers,
                global_batch_size=2 * num_workers,
            )
        places = {case: folder / "-".join(case) for case in configs}
        found = run_on_given_gradients({places[c]: configs[c] for c in configs}, num_steps=3)
        return {case: (configs[case], found[places[case]]) for case in configs}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ondare", "onties"])
@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_moves_weights_on_given_gradients_as_one_process(
    strategy: str,
    num_workers: int,
    name: str,
    models: tuple[Path, Path],
    on_given_gradients: Callable[
        [int], dict[tuple[str, str], tuple[AlignConfig, dict[str, Tensor]]]
    ],
) -> None:
    """DeepSpeed's own engines, to a unit in the last place: the same masks, cuts and signs."""
    config, found = on_given_gradients(num_workers)[strategy, name]
    model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32)
    alone = build_optimizer(config, model)
    for step in range(3):
        for parameter_name, parameter in model.named_parameters():
            gradient = given_gradient(step, parameter_name, tuple(parameter.shape))
            parameter.grad = gradient.view_as(parameter)
        alone.step()
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for parameter_name, parameter in expected.items():
        bits = [
            x.detach().view(-1).view(torch.int32).long() for x in (found[parameter_name], parameter)
        ]
        assert (bits[0] - bits[1]).abs().max() <= 1, parameter_name


def test_flat_tensors_are_shown_for_a_while_only() -> None:
    """Also where a merge fails, the groups of zero3 hold afterwards what they held."""
    strategy = object.__new__(ZeroStrategy)
    strategy.config = SimpleNamespace(traits=STRATEGIES["zero3"])
    strategy.optimizer = SimpleNamespace(param_groups=[{"params": ["whole"]}, {"params": []}])
    inner = SimpleNamespace(
        fp32_partitioned_groups_flat=["a", "b", "c"], sub_group_to_group_id={0: 0, 1: 1, 2: 0}
    )
    strategy._engine = SimpleNamespace(optimizer=inner)
    groups = strategy.optimizer.param_groups
    with pytest.raises(RuntimeError, match="merge"), strategy._all_parameters_shown():
        assert groups == [{"params": ["a", "c"]}, {"params": ["b"]}]
        raise RuntimeError("merge")
    assert groups == [{"params": ["whole"]}, {"params": []}]
