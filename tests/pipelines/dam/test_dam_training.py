"""Learning DAM's coefficients. Oracle: transformers on the experts' own checkpoints and on the
written merge, and an undisturbed run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipelines.dam import DamConfig, dam, estimate_memory, plan_dam
from pipelines.dam import loop as training
from pipelines.dam.loop import Run
from pipelines.dam.model import build
from pipelines.dam.run import worker_settings
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from pipelines.merge.verify import verify
from pipelines.train.errors import DivergenceError
from pipelines.train.metrics import MEASURED
from tests.pipelines.dam.conftest import Experts, make_experts

CPU = torch.device("cpu")
IDS = torch.tensor([[7, 8, 30, 9, 12], [5, 6, 11, 7, 10]])


def logits_of(path: Path) -> Tensor:
    """What transformers computes with a checkpoint."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found: Tensor = model(input_ids=IDS).logits
    return found


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"lm_head": False, "include_base": True, "loss": "entropy"}),
    ({"attention_bias": True}, {"norms": True, "materialise": "never"}),
    ({"tied": True}, {"embeddings": True, "materialise": "always"}),
    ({"tied": True}, {"gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("sizes", "fields"), VARIANTS)
def test_one_model_is_each_expert_and_their_merge(
    tmp_path: Path, here: None, sizes: dict[str, Any], fields: dict[str, Any]
) -> None:
    """The experts exactly; after training, the checkpoint that the merge engine writes."""
    experts = make_experts(tmp_path, **sizes)
    config = experts.config(**fields)
    model = build(config, CPU)
    for place, each in enumerate(config.experts):
        with model.acting_as(place):
            assert torch.equal(model.logits(IDS), logits_of(Path(each.model)))
    out = dam(config, tmp_path / "out")
    file = out / "coefficients" / "dam.safetensors"
    trained = load_file(file)
    assert all((each != 1 / len(config.experts)).any() for each in trained.values())
    with torch.no_grad():
        for name, values in model.coefficients.items():
            values.copy_(trained[name])
        torch.testing.assert_close(model.logits(IDS), logits_of(out), rtol=1e-4, atol=1e-5)
    again = {
        "merge_method": "dam",
        "coefficients": str(file),
        "base_model": str(experts.base),
        "models": [{"model": str(path)} for path in experts.models],
    }
    same = Path(merge(MergeConfig.model_validate(again), tmp_path / "again"))
    weights = "model.safetensors"
    assert (same / weights).read_bytes() == (out / weights).read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, without what is measured."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


@pytest.mark.parametrize("loss", ["kl", "mse", "entropy"])
def test_the_loss_of_a_step_is_the_papers(
    experts: Experts, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first step, with the experts and the merge by equal coefficients in transformers."""
    config = experts.config(loss=loss, l1=0.001, l2=0.002, cosine=0.003)
    plan = plan_dam(config, tmp_path / "cache")
    run = Run(plan.config, worker_settings(plan, tmp_path), CPU)
    equal = run.coefficients()
    equal.write(tmp_path / "equal.safetensors")
    fields = {
        "merge_method": "dam",
        "coefficients": str(tmp_path / "equal.safetensors"),
        "base_model": str(experts.base),
        "models": [{"model": str(path)} for path in experts.models],
    }
    merged = Path(merge(MergeConfig.model_validate(fields), tmp_path / "equal"))
    rows, expected = run._rows(0), 0.0
    for place, [row] in rows.items():
        [(ids, _)] = plan.tables[place].sequences(row)
        monkeypatch.setattr(f"{__name__}.IDS", torch.tensor([ids.tolist()]))
        m, e = logits_of(merged).double(), logits_of(experts.models[place]).double()
        p, q = m.softmax(-1), e.softmax(-1)
        expected += {
            "kl": (p * (p / q).log()).sum(-1).mean(),
            "mse": ((m - e) ** 2).mean() / 2,
            "entropy": -0.1 * (p * p.log()).sum(-1).mean(),
        }[loss].item()
    columns = [each for each in equal.tensors.values() if each.dim() == 2]
    numbers = sum(each.numel() for each in columns)
    penalty = 0.003 * len(columns) + 0.001 * numbers / 2 + 0.002 * numbers / 4
    record = run._gradients(rows)
    assert record["penalty"] == pytest.approx(penalty, rel=1e-5)
    assert record["loss"] == pytest.approx(expected + penalty, rel=1e-4, abs=1e-6)


def test_a_killed_run_ends_in_the_same_bytes(
    experts: Experts, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experts.config(evaluation={"share": 0.3, "every": 2}, rows_per_set=2, num_steps=5)
    whole = dam(config, tmp_path / "whole")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        update = Run._update
        patch.setattr(
            Run,
            "_update",
            lambda run, step, loss: (killed if step == 4 else update)(run, step, loss),
        )
        with pytest.raises(KeyboardInterrupt):
            dam(config, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.dam.run.merge_planned", killed)
        with pytest.raises(KeyboardInterrupt):
            dam(config, tmp_path / "killed")
    again = dam(config, tmp_path / "killed")
    for name in ("model.safetensors", "coefficients/dam.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert lines(again) == lines(whole)
    assert [r["step"] for r in lines(whole) if "eval_loss" in r] == [2, 4, 5]
    assert {"eval_loss_rows-0", "loss_rows-1", "penalty", "gradient_norm"} <= lines(whole)[1].keys()
    assert verify(again, again=True).again
    assert dam(config, again) == again  # it is finished
    with pytest.raises(InputError):
        dam(experts.config(num_steps=3), again)


def test_the_best_evaluation_is_kept_and_a_run_stops_without_a_better_one(
    experts: Experts, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made up: the second evaluation is the best one."""
    values = iter([3.0, 1.0, 2.0, 2.5, 3.0, 1.0])
    real = training.Evaluations.add
    monkeypatch.setattr(
        training.Evaluations,
        "add",
        lambda own, step, numbers: real(own, step, numbers | {"eval_loss": next(values)}),
    )
    held_out = {"share": 0.3, "every": 1, "keep": "best", "patience": 2}
    out = dam(experts.config(evaluation=held_out, num_steps=9), tmp_path / "out")
    record = json.loads((out / "poise.json").read_text())
    told = record["training"]["evaluation"]
    assert (told["best_step"], told["written_step"], told["stopped_at"]) == (2, 2, 4)
    two = dam(experts.config(num_steps=2, evaluation=held_out), tmp_path / "two")
    file = "coefficients/dam.safetensors"
    # The same rows are held out, so two steps alone end where the best evaluation was.
    monkeypatch.undo()
    assert (out / file).read_bytes() == (two / file).read_bytes()


def test_training_lowers_the_held_out_loss(experts: Experts, tmp_path: Path, here: None) -> None:
    held_out = {"share": 0.3, "every": 1}
    config = experts.config(evaluation=held_out, num_steps=30, l1=0, l2=0, cosine=0)
    losses = [record["eval_loss"] for record in lines(dam(config, tmp_path / "out"))]
    assert losses[-1] < 0.8 * losses[0]


def test_numbers_that_are_not_finite_stop_the_run(
    experts: Experts, tmp_path: Path, here: None
) -> None:
    with pytest.raises(DivergenceError, match=r"^step 2: the loss is (nan|inf); try a lower"):
        dam(experts.config(learning_rate=1e30), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan_and_its_memory(experts: Experts, tmp_path: Path) -> None:
    plan = plan_dam(experts.config(num_steps=None), tmp_path)
    assert plan.num_steps == 11  # rows of the larger set
    memory = estimate_memory(plan.config, plan.roles, 10)
    run = build(plan.config, CPU)
    assert memory.coefficients == 16 * sum(each.numel() for each in run.coefficients.values())
    num_parameters = sum(t.numel() for t in load_file(experts.base / "model.safetensors").values())
    assert 2 * 4 * num_parameters < memory.experts < 3 * 4 * num_parameters


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.0, "loss": "mse"}, "temperature: has no effect with loss mse"),
    ({"base_data": "x"}, "base_data: has no effect without include_base: true"),
    ({"include_base": True}, "base_data: required with loss kl"),
    ({"num_epochs": 2}, "give either num_steps or num_epochs"),
    ({"evaluation": {"data": "x", "every": 1}}, "evaluation.data: allowed here: share"),
    ({"loss": "js"}, "loss"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_configs_that_cannot_be(experts: Experts, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experts.config(**fields)


def test_experts_that_cannot_be(experts: Experts, tmp_path: Path) -> None:
    fields = experts.fields()
    with pytest.raises(ValueError, match="found one expert alone; allowed: two or more"):
        DamConfig.model_validate(fields | {"models": fields["models"][:1]})
    without = [fields["models"][0], {"model": fields["models"][1]["model"]}]
    with pytest.raises(ValueError, match=f"{experts.models[1]}: data: required with loss kl"):
        DamConfig.model_validate(fields | {"models": without})

    def refused(model: Path, **changes: Any) -> str:
        models = [fields["models"][0], fields["models"][1] | {"model": str(model)}]
        with pytest.raises(InputError) as error:
            plan_dam(experts.config(models=models, **changes), tmp_path / "cache")
        return str(error.value)

    wide = make_experts(tmp_path / "wide", intermediate_size=40)
    assert "found shape [32, 40]; allowed: [32, 48]" in refused(wide.models[0])
    turned = make_experts(tmp_path / "turned", rms_norm_eps=0.5)
    assert "config.json: rms_norm_eps: found 0.5; allowed: 1e-06" in refused(turned.models[0])
    tied = make_experts(tmp_path / "tied", tied=True)
    with pytest.raises(InputError, match=r"^lm_head: found true, but .* has no head of its own"):
        plan_dam(tied.config(lm_head=True), tmp_path / "cache")
