"""Held-out rows: their numbers, the early stop, the best model.

Oracles: the first step of a run whose only batch is these rows, DPO's formula in float64, and runs
that nobody disturbed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_files import (
    align_config,
    evaluated,
    metrics,
    preference_rows,
    run_here,
    seeded_metrics,
    stop_at_the_fourth_step,
    write_rows,
)
from transformers import AutoModelForCausalLM

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.checkpoints import saved_steps
from pipelines.train.data import TokenTable
from pipelines.train.evaluation import Evaluations
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that is not the policy, so that no number is 0."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=5)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dpo", "stored"),
        ("dpo", "on_the_fly"),
        ("kto", "stored"),
        ("kto", "on_the_fly"),
        ("orpo", None),
        ("sft", None),
    ],
)
def test_the_numbers_are_those_of_one_batch(
    name: str,
    reference: str | None,
    tiny_llama: Path,
    preferences: Path,
    held_out: Path,
    other: Path,
    tmp_path: Path,
) -> None:
    """All that a step tells of its batch, after steps that changed nothing."""
    fields: dict[str, Any] = {"objective": {"name": name}}
    if reference is not None:
        fields |= {"reference_model": other, "reference_log_probabilities": reference}
    if name == "sft":
        preferences, held_out = (
            as_conversations(path, tmp_path) for path in (preferences, held_out)
        )
    count = 38 if name == "kto" else 19
    still = {"optimizer": {"learning_rate": 1e-12}, "num_steps": 1}
    batch = align_config(tiny_llama, held_out, **fields, **still, global_batch_size=count)
    (expected,) = metrics(run_here(batch, tmp_path / "batch"))
    fields["evaluation"] = {"data": held_out, "every": 5}
    found = evaluated(
        run_here(align_config(tiny_llama, preferences, **fields, **still), tmp_path / "run")
    )
    assert list(found) == [1]
    lacking = {k for k in expected if k not in found[1]}
    assert lacking <= {
        "step",
        "gradient_norm",
        "learning_rate",
        "delta_norm",
        "update_norm",
        "tokens_per_s",
        "seconds",
        "memory_bytes",
    }
    for key, value in found[1].items():
        assert value == pytest.approx(expected[key], rel=2e-5, abs=1e-6), key


def as_conversations(rows: Path, folder: Path) -> Path:
    """The chosen responses as conversations."""
    folder.mkdir(exist_ok=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    return write_rows(
        folder / rows.name, [{"messages": row["prompt"] + row["chosen"]} for row in found]
    )


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_dpo_in_float64(
    lora: dict[str, int] | None, tiny_llama: Path, preferences: Path, held_out: Path, tmp_path: Path
) -> None:
    """The last evaluation is of the model that is written."""
    evaluation = {"data": held_out, "every": 2}
    config = align_config(tiny_llama, preferences, evaluation=evaluation, lora=lora)
    folder = run_here(config, tmp_path / "run")
    assert sorted(evaluated(folder)) == [2, 4, 6]
    table = plan_alignment(config, tmp_path / "cache").held_out
    assert table is not None and table.num_rows == 19
    now, before = (log_probabilities(path, table) for path in (folder / "model", tiny_llama))
    margins = 0.1 * ((now - before)[:, 0] - (now - before)[:, 1])
    found = evaluated(folder)[6]
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=2e-6)
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["margin"] == pytest.approx(margins.mean(), abs=5e-6)


def log_probabilities(model: Path, table: TokenTable) -> np.ndarray:
    """(rows, 2) float64, one sequence at a time."""
    exact, sums = AutoModelForCausalLM.from_pretrained(model).double(), []
    for row in range(table.num_rows):
        for ids, marks in table.sequences(row):
            tokens = torch.tensor(ids.tolist())
            with torch.no_grad():
                chances = exact(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
            own = chances.gather(1, tokens[1:, None])[:, 0]
            sums.append(own[torch.tensor(marks[1:].tolist()).bool()].sum().item())
    return np.array(sums).reshape(-1, 2)


def test_evaluation_leaves_training_alone(
    tiny_llama: Path, preferences: Path, held_out: Path, tmp_path: Path
) -> None:
    """The same bytes with and without, and the same lines but for the added numbers."""
    plain = align_config(tiny_llama, preferences)
    watched = align_config(tiny_llama, preferences, evaluation={"data": held_out, "every": 1})
    one, two = (run_here(c, tmp_path / n) for c, n in ((plain, "plain"), (watched, "watched")))
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    for before, now in zip(seeded_metrics(one), seeded_metrics(two), strict=True):
        assert before.items() <= now.items()


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_numbers_by_set(
    name: str, tiny_llama: Path, preferences: Path, held_out: Path, other: Path, tmp_path: Path
) -> None:
    """Those of each set are what a run tells that has this set alone; those of all are what it
    tells of one file with all rows.
    """
    fields: dict[str, Any] = {"objective": {"name": name}, "num_steps": 1}
    fields |= {} if name == "sft" else {"reference_model": other}
    second = write_rows(tmp_path / "second.jsonl", preference_rows(8, 9))
    if name == "sft":
        preferences, held_out, second = (
            as_conversations(path, tmp_path / path.stem) for path in (preferences, held_out, second)
        )
    joint = tmp_path / "joint.jsonl"
    joint.write_text(held_out.read_text() + second.read_text())
    sets = [{"path": held_out, "name": "a/b"}, {"path": second, "name": "c"}]
    found = []
    for number, data in enumerate((sets, held_out, second, joint)):
        config = align_config(
            tiny_llama, preferences, **fields, evaluation={"data": data, "every": 1}
        )
        found.append(evaluated(run_here(config, tmp_path / str(number)))[1])
    by_set, first, last, whole = found
    close = {"rel": 2e-5, "abs": 1e-6}
    assert by_set.keys() == {f"{key}{label}" for key in whole for label in ("", "/a/b", "/c")}
    last.pop("kl_per_token", None)  # an estimate, by draws that depend on a row's number
    for label, expected in (("/a/b", first), ("/c", last)):
        if name == "kto":  # whose rows meet other rows' responses, of other sets too
            expected = {k: v for k, v in expected.items() if k not in ("kl", "loss", "accuracy")}
        for key, value in expected.items():
            assert by_set[key + label] == pytest.approx(value, **close), key
    for key, value in whole.items():
        assert by_set[key] == pytest.approx(value, **close), key


def test_the_best_of_a_set(tiny_llama: Path, preferences: Path, held_out: Path) -> None:
    """A set's metric decides; names that are none are refused."""
    sets = [{"path": held_out, "name": "a"}, {"path": preferences, "name": "b"}]
    evaluation = {"data": sets, "every": 1, "keep": "best"}
    config = align_config(tiny_llama, preferences, evaluation=evaluation | {"metric": "accuracy/b"})
    assert config.evaluation is not None
    evaluations = Evaluations(config.evaluation, Path("none"), 0)
    for step, (a, b) in enumerate(((0.9, 0.1), (0.1, 0.9), (0.5, 0.5)), 1):
        evaluations.add(step, {"eval_accuracy/a": a, "eval_accuracy/b": b})
    assert evaluations.kept_step == 2
    for data, metric, allowed in (
        (sets, "margin/c", "margin, margin/a, margin/b"),
        (held_out, "margin/c", "margin"),
    ):
        fields = evaluation | {"data": data, "metric": metric}
        message = (
            rf"evaluation.metric: found margin/c; allowed with these held-out rows: {allowed} \["
        )
        with pytest.raises(ValueError, match=message):
            align_config(tiny_llama, preferences, evaluation=fields)


def test_a_set_without_held_out_rows(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """A drawn share may leave a set none; then it has no numbers, and cannot decide."""
    single = write_rows(tmp_path / "single.jsonl", preference_rows(1, 9))
    data = [{"path": preferences, "name": "a"}, {"path": single, "name": "b"}]
    evaluation = {"share": 0.1, "every": 1, "keep": "best"}
    config = align_config(
        tiny_llama, data, evaluation=evaluation | {"metric": "loss/a"}, num_steps=1
    )
    numbers = evaluated(run_here(config, tmp_path / "run"))[1]
    assert "loss/a" in numbers and "loss/b" not in numbers
    config = align_config(tiny_llama, data, evaluation=evaluation | {"metric": "loss/b"})
    message = "^evaluation.metric: found loss/b, but no row of b is held out"
    with pytest.raises(InputError, match=message):
        plan_alignment(config, tmp_path / "cache")


@pytest.mark.parametrize("earlier", [1, 3])
def test_before_the_first_step(
    earlier: int,
    tiny_llama: Path,
    preferences: Path,
    held_out: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start's numbers are the first model's, in float64; nothing else changes, nor after an
    interruption before the first checkpoint or after it.
    """
    fields: dict[str, Any] = {"reference_model": other, "checkpoint_every": 2, "num_steps": 4}
    evaluation = {"data": held_out, "every": 2, "keep": "best", "patience": 2}
    plain = run_here(
        align_config(tiny_llama, preferences, **fields, evaluation=evaluation), tmp_path / "plain"
    )
    config = align_config(
        tiny_llama, preferences, **fields, evaluation=evaluation | {"on_start": True}
    )
    folder = tmp_path / "run"
    stop_at_the_fourth_step(config, folder, monkeypatch, earlier=earlier)
    run_here(config, folder)
    start, *others = seeded_metrics(folder)
    assert others == seeded_metrics(plain)
    assert (folder / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    table = plan_alignment(config, tmp_path / "cache").held_out
    assert table is not None
    now, before = (log_probabilities(path, table) for path in (tiny_llama, other))
    margins = 0.1 * ((now - before)[:, 0] - (now - before)[:, 1])
    assert start["step"] == 0 and start.keys() == {
        key for key in others[1] if key == "step" or key.startswith("eval_")
    }
    assert start["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=2e-6)
    assert start["eval_accuracy"] == pytest.approx((margins > 0).mean())


def test_the_best_model_of_a_run_that_stops(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops by its patience; what is written is the best step's model, after an
    interruption too, and when it is begun again between the last step and the end.
    """
    config = align_config(
        tiny_llama,
        preferences,
        evaluation={"share": 0.25, "every": 1, "keep": "best", "patience": 1},
        num_steps=12,
        keep_checkpoints=1,
        checkpoint_every=100,
        schedule="constant",
        optimizer={"learning_rate": 1e-2},
    )
    whole = run_here(config, tmp_path / "whole")
    values = {step: numbers["loss"] for step, numbers in evaluated(whole).items()}
    best = min(values, key=values.__getitem__)
    assert best == 2 and max(values) == 3
    assert saved_steps(whole) == [2, 3]
    told = json.loads((whole / "exported").read_text())["evaluation"]
    assert told == {
        "metric": "eval_loss",
        "best_step": best,
        "best": values[best],
        "written_step": best,
        "stopped_at": 3,
    }
    last = config.evaluation.model_copy(update={"keep": "last", "patience": None})
    short = config.model_copy(update={"num_steps": best, "evaluation": last})
    expected = (run_here(short, tmp_path / "short") / WEIGHTS).read_bytes()
    assert (whole / WEIGHTS).read_bytes() == expected
    broken = tmp_path / "broken"
    stop_at_the_fourth_step(config, broken, monkeypatch, earlier=1)
    run_here(config, broken)
    for _ in range(2):
        assert seeded_metrics(broken) == seeded_metrics(whole)
        assert (broken / WEIGHTS).read_bytes() == expected
        (broken / "exported").unlink()
        (broken / WEIGHTS).unlink()
        run_here(config, broken)
