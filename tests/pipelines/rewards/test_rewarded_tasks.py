"""Rewards as a metric of the matrix.

Oracle: transformers' own classes on the stored answers, one by one, and means by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from operators.statistics import clustered_mean
from pipelines.engines import Sampling, open_engine
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.evaluate import EvaluateConfig, evaluate, plan_evaluation
from pipelines.evaluate.store import Store
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.evaluate.made_up_tasks import save_tasks
from tests.pipelines.rewards.reward_models import Rewards, said, save_reward_model, write_rows

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a reward model with three labels, prompts, tasks; never changed."""
    root = tmp_path_factory.mktemp("rewarded")
    for seed, name in ((5, "a"), (6, "b")):
        save_chatty(root / name, seed, max_position_embeddings=128)
    save_reward_model(root / "reward", 3, num_labels=3, max_position_embeddings=512)
    save_tasks(root / "tasks")
    rows: list[dict[str, Any]] = [{"prompt": "a b c"}, {"prompt": "d e"}, {"prompt": "a b c"}]
    rows += [{"prompt": said("f", "g", "h i")}, {"prompt": "j", "chosen": "x", "rejected": "y"}]
    write_rows(root / "prompts.jsonl", rows)
    return root


def config_of(world: Path, tasks: list[dict[str, Any]], **changes: Any) -> EvaluateConfig:
    tasks = [{"reward": world / "reward", "head": 1, **task} for task in tasks]
    models = {name: world / name for name in "ab"}
    return EvaluateConfig(models=models, tasks=tasks, **changes)


def test_rewards_are_a_column_of_the_matrix(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of one's own, and of a task's answers; then another label of the same answers."""
    asked = {"generate": 0, "rewards": 0}
    for name in asked:
        plain = getattr(TransformersEngine, name)

        def counted(
            self: Any, what: Any, *rest: Any, _name: str = name, _plain: Any = plain
        ) -> Any:
            asked[_name] += len(what)
            return _plain(self, what, *rest)

        monkeypatch.setattr(TransformersEngine, name, counted)
    of = {"include_path": world / "tasks", "names": ["generation"]}
    tasks = [{"data": world / "prompts.jsonl", "max_new_tokens": 6}, {"of": of}]
    groups = {"all": {"members": ["reward.reward", "generation_reward.reward"]}}
    config = config_of(world, tasks, groups=groups, limit=5)
    [summary] = [evaluate(config, tmp_path / "out", executor="local")]
    oracle = Rewards(world / "reward", 1)
    prompts = [said("a b c"), said("d e"), said("a b c"), said("f", "g", "h i"), said("j")]
    clusters = ["0", "1", "0", "3", "4"]
    for name in "ab":
        engine = open_engine(world / name)
        texts = [each.text for each in engine.generate(prompts, Sampling(max_tokens=6))]
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = [oracle.of(p + turn) for p, turn in zip(prompts, turns, strict=True)]
        value, stderr = clustered_mean(rewards, clusters)
        found = summary["models"][name]["tasks"]["reward"]
        assert found["reward"]["value"] == pytest.approx(value, abs=1e-4)
        assert found["reward"]["stderr"] == pytest.approx(stderr, abs=1e-4)
        lengths = [len(text.split()) + 1 for text in texts]
        assert found["reward_tokens"]["value"] == pytest.approx(sum(lengths) / 5)
        notes = summary["models"][name]["scores"]["reward"]
        assert notes["prompts_cut"] == 0 and notes["correlation_with_length"]["n"] == 5
        assert summary["models"][name]["groups"]["all"]["value"] is not None
    plan = plan_evaluation(config, tmp_path / "out")
    answers, _ = Store(tmp_path / "out").read(plan.answers["a", "generation_reward"], 0)
    expected = [
        oracle.of(said(sample.requests[0]["context"], sample.answers[0]["text"]))
        for sample in answers
    ]
    found = summary["models"]["a"]["tasks"]["generation_reward"]["reward"]
    assert found["value"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    before = dict(asked)
    assert evaluate(config, tmp_path / "out", executor="local") == summary
    assert asked == before
    other = config_of(world, [tasks[0] | {"head": 2}], limit=5)
    again = evaluate(other, tmp_path / "out", executor="local")
    assert asked == before | {"rewards": before["rewards"] + 10}
    assert again["models"]["a"]["tasks"]["reward"] != summary["models"]["a"]["tasks"]["reward"]
    cells = [json.loads(f.read_text()) for f in (tmp_path / "out").rglob("cell.json")]
    assert {each["scorer"]["reward"]["head"] for each in cells if "scorer" in each} == {1, 2}


BAD = {
    "two sources": ({"of": "x", "data": "y"}, "of, data: allowed: one of them"),
    "no effect": (
        {"data": None, "of": "x", "columns": {"id": "n"}},
        "columns: has no effect with of",
    ),
    "nothing drawn": (
        {"data": None, "of": "x", "decoding": {"temperature": 1}},
        "decoding: has no effect with of",
    ),
    "greedy": ({"decoding": {"top_k": 3}}, "top_k: has no effect at temperature 0"),
    "no such head": ({"head": "nice"}, "head: found 'nice'; allowed: 0 to 2, or LABEL_0"),
    "no label chosen": ({"head": None}, "found 3 labels"),
    "a causal model": ({"reward": "a"}, "found LlamaForCausalLM; allowed: a sequence class"),
    "no template": ({"reward": "bare"}, "bare: its tokenizer has no chat template"),
    "no prompt": ({"columns": {"prompt": "text"}}, "row 1: has no column 'text'; found: prompt"),
    "no answers": (
        {"data": None, "of": {"include_path": "tasks", "names": ["choice_shots"]}},
        "choice_shots: is of multiple_choice; allowed: a task that is answered in words",
    ),
    "a chat": (
        {"data": None, "of": {"include_path": "tasks", "names": ["generation"], "chat": True}},
        "generation: its prompts are in the chat template of the answering model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entries(case: str, world: Path, tmp_path: Path) -> None:
    values, message = BAD[case]
    values = {"reward": "reward", "data": "prompts.jsonl", **values}
    if not (world / "bare").exists():
        (save_reward_model(world / "bare", num_labels=3) / "chat_template.jinja").unlink()
    values["reward"] = world / values["reward"]
    if values["data"] == "prompts.jsonl":
        values["data"] = world / "prompts.jsonl"
    if isinstance(values.get("of"), dict):
        values["of"] = values["of"] | {"include_path": world / "tasks"}
    with pytest.raises(ValueError, match=message):
        plan_evaluation(config_of(world, [values]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_long_conversations_and_rewards_that_are_no_numbers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"data": world / "prompts.jsonl", "max_new_tokens": 6, "engine": {"max_length": 8}}
    failed = evaluate(config_of(world, [task]), tmp_path / "out", executor="local")["failed"]
    assert re.search(r"document \d: reward model: found \d+ tokens", failed[0]["reason"])
    cut = evaluate(
        config_of(world, [task | {"too_long": "cut_prompt"}]), tmp_path / "out", executor="local"
    )
    assert not cut["failed"] and 0 < cut["models"]["a"]["scores"]["reward"]["prompts_cut"] <= 5
    rewards = TransformersEngine.rewards
    monkeypatch.setattr(
        TransformersEngine, "rewards", lambda *given: [float("inf"), *rewards(*given)[1:]]
    )
    [first, *_] = evaluate(
        config_of(world, [task | {"engine": {}}]), tmp_path / "out", executor="local"
    )["failed"]
    assert "document 0: found the reward inf; allowed: a finite number" in first["reason"]
