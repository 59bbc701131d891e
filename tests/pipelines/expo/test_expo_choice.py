"""A choice from the merge to the written winner.

Oracle: brute force: every candidate written by `merge`, answered by transformers' own generation, a
prompt at a time, and rewarded by hand; `evaluate` of the written winner.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.checkpoints.digests import model_digest
from pipelines.checkpoints.reader import Checkpoint
from pipelines.engines import Sampling
from pipelines.engines.interface import answer_seed
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.engines.weights import MergeWeights, inspect
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.results import Evaluation
from pipelines.expo import expo
from pipelines.expo.config import PAPER
from pipelines.merge import MergeConfig, load_merge_config, merge, plan_merge
from pipelines.merge.verify import verify
from tests.pipelines.expo.worlds import ALPHAS, LengthScorer, plan_of, prompts_of

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def written(expo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Every candidate, written; alpha 0 is the aligned model itself."""
    folder = tmp_path_factory.mktemp("written")
    found = {0.0: expo_world / "dpo"}
    for alpha in ALPHAS[1:]:
        config = load_merge_config(expo_world / "expo.yaml", [f"parameters.alpha={alpha}"])
        found[alpha] = Path(merge(config, folder / f"{alpha}"))
    return found


@pytest.fixture(scope="module")
def answers(expo_world: Path, written: dict[float, Path]) -> dict[float, list[str]]:
    """By alpha, transformers' greedy answers."""
    found: dict[float, list[str]] = {}
    for alpha, path in written.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        found[alpha] = []
        for prompt in prompts_of(expo_world):
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
            )
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            found[alpha].append(text)
    return found


def best_by_hand(
    answers: dict[float, list[str]], length: float
) -> tuple[float, dict[float, float]]:
    """The alpha with the highest mean of `-|words - length|`, and the means."""
    means = {
        alpha: sum(-abs(len(text.split()) - length) for text in texts) / len(texts)
        for alpha, texts in answers.items()
    }
    return min(means, key=lambda alpha: (-means[alpha], alpha)), means


def length_with_best(answers: dict[float, list[str]], wanted: Any) -> float:
    """A length whose best alpha is one that is wanted."""
    return next(each for each in range(17) if wanted(best_by_hand(answers, each)[0]))


def test_the_choice_is_brute_forces_and_alpha_0_is_the_aligned_model(
    expo_world: Path, written: dict[float, Path], answers: dict[float, list[str]], tmp_path: Path
) -> None:
    length = length_with_best(answers, lambda alpha: 0 < alpha < ALPHAS[-1])
    best, means = best_by_hand(answers, length)
    out = tmp_path / "out"
    told: list[float] = []
    plan = plan_of(expo_world, length)
    result = expo(plan, out, on_value=lambda value, _: told.append(value))
    assert told == ALPHAS
    assert {t["value"]: t["reward"]["value"] for t in result["trials"]} == pytest.approx(means)
    assert (result["best"]["value"], result["evaluations"]) == (best, len(ALPHAS))
    assert result["warnings"] == [] or "length" in result["warnings"][0]
    digests = {trial["value"]: trial["digest"] for trial in result["trials"]}
    for alpha, path in written.items():
        assert digests[alpha] == model_digest(Checkpoint.open(path)).weights
    gain = result["best"]["difference"]["reward"]["value"]
    assert gain == pytest.approx(means[best] - means[0.0])
    assert result["trials"][0]["value"] == 0 and "difference" not in result["trials"][0]
    assert json.loads((out / "expo.json").read_text()) == result
    # The winner is the ordinary merge, with the choice in its record.
    checked = verify(out / "best", again=True)
    assert (checked.output, checked.again) == ("same", True)
    record = json.loads((out / "best/poise.json").read_text())
    assert (record["chosen"]["value"], record["chosen"]["values"]) == (best, ALPHAS)
    assert record["weights"] == digests[best]
    merge_config = load_merge_config(out / "merge.yaml")
    assert merge_config.parameters == {"alpha": best}
    # The output is an evaluation of the candidates.
    rows = {row.model: row.value for row in Evaluation(out).rows() if row.metric == "reward"}
    assert rows == pytest.approx({f"alpha={value:g}": mean for value, mean in means.items()})
    for name in ("reward", "histograms"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is made twice: other values, or another search, ask for what is new alone.
    assert isinstance(plan.task.scorer, LengthScorer)
    again = plan_of(expo_world, length, values=[0.5, 3.0])
    assert expo(plan, out) == result
    with pytest.raises(InputError, match=r"holds another choice: .*or --force to replace"):
        expo(again, out)
    fewer = expo(again, out, force=True)
    assert [trial["value"] for trial in fewer["trials"]] == [0.0, 0.5, 3.0]
    assert isinstance(again.task.scorer, LengthScorer) and again.task.scorer.num_scored == 0
    assert json.loads((out / "best/poise.json").read_text())["chosen"]["values"] == [0, 0.5, 3]


@pytest.mark.slow
def test_where_nothing_is_better_than_the_aligned_model_it_is_written_as_it_is(
    expo_world: Path, answers: dict[float, list[str]], tmp_path: Path
) -> None:
    length = length_with_best(answers, lambda alpha: alpha == 0)
    result = expo(plan_of(expo_world, length, values=[1.0, 2.0]), tmp_path / "out")
    assert result["best"]["value"] == 0
    assert not any("values: try" in line for line in result["warnings"])
    aligned = model_digest(Checkpoint.open(expo_world / "dpo")).weights
    assert model_digest(Checkpoint.open(tmp_path / "out/best")).weights == aligned


def test_alpha_0_of_a_named_merge_is_that_merge(expo_world: Path, tmp_path: Path) -> None:
    soup = {
        "merge_method": "linear",
        "models": [
            {"model": str(expo_world / name), "parameters": {"weight": 0.5}}
            for name in ("sft", "dpo")
        ],
    }
    chain = {
        "merge_method": "expo",
        "base_model": str(expo_world / "sft"),
        "models": [{"model": "soup"}],
        "merges": {"soup": soup},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    plan = plan_of(expo_world, merge=str(tmp_path / "chain.yaml"), values=[0.5, 1.0])
    assert plan.values == (0.0, 0.5, 1.0) and plan.reference == 0
    found = inspect(MergeWeights(plan_merge(plan.merges[0.0])))
    assert found == inspect(MergeWeights(plan_merge(MergeConfig.model_validate(soup))))
    assert found != inspect(MergeWeights(plan_merge(plan.merges[0.5])))


@pytest.mark.slow
def test_answers_are_drawn_as_the_papers_and_the_winner_has_the_evaluations_numbers(
    expo_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = {split: str(expo_world / f"{split}.jsonl") for split in ("development", "test")}
    changes = {
        "values": [0.0, 0.5],
        "data": data,
        "decoding": {},
        "merge": str(tmp_path / "m.yaml"),
    }
    (tmp_path / "m.yaml").write_text((expo_world / "expo.yaml").read_text())
    plan = plan_of(expo_world, **changes)
    result = expo(plan, out)
    assert plan.test_task is not None and result["test"]["reward"]["n"] == 10
    # One prompt at a time, by the engine on the written winner.
    engine = TransformersEngine(out / "best")
    sampling = Sampling(**PAPER, max_tokens=16)
    texts = []
    for place, prompt in enumerate(prompts_of(expo_world)):
        seed = answer_seed(42, "reward-answers", str(place), 0)
        messages = [{"role": "user", "content": prompt}]
        texts.append([engine.generate([messages], sampling, [seed])[0].text])
    stored = [
        [json.loads(row) for row in parquet.read_table(file)["answers"].to_pylist()]
        for file in out.glob("samples/reward-answers/*/*.parquet")
    ]
    assert texts in stored and len(stored) == 4 - (result["best"]["value"] == 0)
    for split, numbers in (("development", result["best"]), ("test", result["test"])):
        entry = {"reward": str(expo_world / "reward"), "data": data, "max_new_tokens": 16}
        config = EvaluateConfig(
            models={"best": out / "best"},
            tasks=[{**entry, "decoding": PAPER}],
            split=split,
            seed=42,
        )
        of = evaluate(config, tmp_path / split, executor="local")["models"]["best"]["tasks"][
            "reward"
        ]
        assert of["reward"] == numbers["reward"]
        assert of["reward_tokens"] == numbers["tokens"]
        blocks = [f.relative_to(tmp_path / split) for f in (tmp_path / split).rglob("0*.parquet")]
        assert len(blocks) == 2
        for block in blocks:  # the same cells: a store of one takes the other's
            assert (out / block).read_bytes() == (tmp_path / split / block).read_bytes()


@pytest.mark.slow
def test_a_number_of_any_method_is_bracketed_by_at_most_half_the_measurements(
    expo_world: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "merge": str(expo_world / "ties.yaml"),
        "parameter": "parameters.lambda",
        "values": {"low": 0.25, "high": 3.0, "step": 0.25},
        "limit": 6,
    }
    bracket = expo(plan_of(expo_world, 9, **changes, search="bracket"), tmp_path / "out")
    measured = {trial["value"]: trial["reward"]["value"] for trial in bracket["trials"]}
    assert 0.25 in measured and len(measured) <= 6 == len(bracket["values"]) / 2
    assert bracket["best"]["value"] == min(measured, key=lambda v: (-measured[v], v))
    grid = plan_of(expo_world, 9, **changes)
    result = expo(grid, tmp_path / "out", force=True)
    assert isinstance(grid.task.scorer, LengthScorer)
    assert grid.task.scorer.num_scored == 6 * (12 - len(measured))
    every = {trial["value"]: trial["reward"]["value"] for trial in result["trials"]}
    assert measured.items() <= every.items()
    record = json.loads((tmp_path / "out/best/poise.json").read_text())
    assert record["config"]["parameters"]["lambda"] == result["best"]["value"]
    MergeConfig.model_validate(record["config"])
