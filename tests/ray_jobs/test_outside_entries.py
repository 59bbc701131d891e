"""A sparsifier and an objective from outside, one function and one line each, used from configs.

Oracle: the numbers of the same merge by hand, and of the objective of the same formula.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from operators.losses import OBJECTIVES, Objective
from operators.parameters import Parameter
from operators.sparsify import SPARSIFIERS, Sparsifier
from pipelines.errors import InputError
from pipelines.merge import load_merge_config, merge
from pipelines.train import AlignConfig
from pipelines.train.optimizer import build_optimizer
from tests.pipelines.merge.conftest import Family, weights_of
from tests.pipelines.merge.conftest import family as family  # the fixture

PAIRS = {"name": "online", "learning_rate": 1e-3, "density": 1.0, "alpha": 0.1}


def clip(x: Tensor, at, parameters) -> Tensor:
    return x.clamp(-parameters["bound"], parameters["bound"])


def squared_loss(pairs, *, beta: float) -> Tensor:
    return (beta * pairs.margin - 1).square()


@pytest.fixture(autouse=True)
def outside(monkeypatch) -> None:
    entry = Sparsifier(clip, {"bound": Parameter("largest magnitude", 0.5, 0)})
    monkeypatch.setitem(SPARSIFIERS, "clip", entry)
    objective = Objective("pairs", squared_loss, {"beta": 0.1}, uses_reference=True)
    monkeypatch.setitem(OBJECTIVES, "squared", objective)


def test_a_merge_config_names_the_sparsifier(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(
        f"""
merge_method: composed
base_model: {family.base}
models: [{{model: {family.models[0]}}}, {{model: {family.models[1]}}}]
parameters: {{sparsifier: clip, consensus: sum, bound: 0.001, weight: 0.5}}
dtype: float32
"""
    )
    found = weights_of(merge(load_merge_config(file), tmp_path / "out"))
    base, one, two = (weights_of(path) for path in (family.base, *family.models[:2]))
    for name, tensor in found.items():
        deltas = [(model[name].double() - base[name]).clamp(-1e-3, 1e-3) for model in (one, two)]
        expected = base[name].double() + 0.5 * deltas[0] + 0.5 * deltas[1]
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    file.write_text(file.read_text().replace("bound:", "gamma:"))
    with pytest.raises(InputError, match="gamma: unknown parameter; allowed: weight, bound, "):
        merge(load_merge_config(file), tmp_path / "other")


def align_config(family: Family, **optimizer) -> AlignConfig:
    data = family.base.parent / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    tau = {"base": str(family.models[0]), "tuned": str(family.base)}
    return AlignConfig.model_validate(
        {
            "model": str(family.base),
            "data": str(data),
            "objective": {"name": "squared", "beta": 0.3},
            "optimizer": {**PAIRS, "tau": tau, **optimizer},
            "num_steps": 1,
            "global_batch_size": 1,
            "strategy": "single",
            "num_workers": 1,
        }
    )


def test_an_align_config_names_both(family: Family) -> None:
    config = align_config(
        family, sparsifier="clip", consensus="sum", sparsifier_parameters={"bound": 1e-4}
    )
    assert config.objective.definition.loss is squared_loss
    assert config.objective.parameters == {"beta": 0.3}
    weights = weights_of(family.base)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(weights[name].float().clone()))
    optimizer = build_optimizer(config, _Named(name, model.w))
    model.w.grad = torch.ones_like(model.w)
    optimizer.step()
    tau = weights[name].double() - weights_of(family.models[0])[name].double()
    tau = tau.bfloat16().double()
    expected = weights[name].double() - 0.9 * 1e-4 + 0.1 * tau.clamp(-1e-4, 1e-4)
    torch.testing.assert_close(model.w.detach().double(), expected, rtol=0, atol=2e-7)


class _Named:
    """A model of one parameter under its name in the checkpoint."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self._named = [(name, parameter)]

    def named_parameters(self):
        return self._named


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({}, "sparsifier: required with online"),
        ({"sparsifier": "clip"}, "consensus: required with online"),
        ({"sparsifier": "clip", "consensus": "mixup"}, "consensus: found 'mixup', which draws"),
        (
            {"sparsifier": "clap", "consensus": "sum"},
            "sparsifier: found 'clap'; allowed: 'identity', 'top', 'bernoulli', 'magprune', "
            "'breadcrumbs', 'clip'",
        ),
        (
            {"name": "ondare", "sparsifier": "clip"},
            "sparsifier: has no effect with ondare; allowed with online",
        ),
    ],
)
def test_what_an_align_config_cannot_have(family: Family, optimizer, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        align_config(family, **optimizer)
