"""`poise score` on all kinds of rows.

Oracle: transformers' own classes on one conversation at a time (`reward_models.Rewards`).
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from pipelines.commit import partial_path
from pipelines.config import check
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from pipelines.rewards import ScoreConfig, plan_scores, score, scoring
from pipelines.train.data.rows import parts_of, read_part
from tests.pipelines.rewards.reward_models import (
    Rewards,
    bench_rows,
    bpe_tokenizer,
    said,
    save_reward_model,
    write_rows,
)
from tests.tiny_models import save_tiny_llama

DIALOGUE = "\n\nHuman: a b\n\nAssistant:"
KINDS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "pairs of messages": (
        [{"prompt": said("a b"), "chosen": said("", "c d")[1:], "rejected": said("", "e")[1:]}],
        [said("a b", "c d"), said("a b", "e")],
    ),
    "whole conversations": (
        [{"chosen": said("a", "b", "c", "d e"), "rejected": said("a", "b", "c", "f")}],
        [said("a", "b", "c", "d e"), said("a", "b", "c", "f")],
    ),
    "texts that begin alike": (
        [{"chosen": f"{DIALOGUE} c d", "rejected": f"{DIALOGUE} e"}],
        [f"{DIALOGUE} c d", f"{DIALOGUE} e"],
    ),
    "a prompt with responses": (
        [{"prompt": said("a b"), "responses": ["c", "d e f", "g"]}],
        [said("a b", text) for text in ("c", "d e f", "g")],
    ),
    "two responses": (
        [{"prompt": "a b ", "responses": ["c", "d e f"]}],
        ["a b c", "a b d e f"],
    ),
    "a completion": ([{"prompt": "a ", "completion": "b c"}], ["a b c"]),
    "messages": ([{"messages": said("a", "b c", "d", "e")}], [said("a", "b c", "d", "e")]),
    "a text": ([{"text": "a b c d"}], ["a b c d"]),
    "equal responses": ([{"prompt": "a ", "chosen": "b", "rejected": "b"}], ["a b", "a b"]),
}


def scored(out: Path, **values: Any) -> list[dict[str, Any]]:
    """The rows of a file of scores."""
    score(plan_scores(check(values, ScoreConfig, "score"), out))
    if out.suffix == ".parquet":
        return parquet.read_table(out).to_pylist()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_those_of_the_class(
    kind: str, reward_models: dict[str, Path], tmp_path: Path
) -> None:
    rows, conversations = KINDS[kind]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    oracle = Rewards(reward_models["one"])
    found = scored(tmp_path / "scores.jsonl", model=reward_models["one"], data=data)
    expected = [oracle.of(each) for each in conversations]
    assert [each["reward"] for each in found] == pytest.approx(expected, abs=1e-4)
    roles = ["chosen", "rejected"] if "chosen" in rows[0] else ["response"] * len(conversations)
    assert [each["role"] for each in found] == roles
    assert {each["place"] for each in found} == {"rows.jsonl row 1"}


@pytest.mark.parametrize(("model", "head"), [("three", "honesty"), ("three", 2), ("bert", None)])
def test_heads_and_encoders(
    model: str, head: str | int | None, reward_models: dict[str, Path], tmp_path: Path
) -> None:
    """RewardBench's rows, which are recognised; batches of other sizes; both forms of files."""
    rows = bench_rows(per_subset=1)
    data = write_rows(tmp_path / "bench.jsonl", rows)
    oracle = Rewards(reward_models[model], {"honesty": 1, 2: 2, None: 0}[head])
    values = {"model": reward_models[model], "data": data, "head": head}
    found = scored(tmp_path / "a.parquet", **values)
    conversations = [said(r["prompt"], r[role]) for r in rows for role in ("chosen", "rejected")]
    expected = [oracle.of(each) for each in conversations]
    assert [each["reward"] for each in found] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1
    assert [each["subset"] for each in found[::2]] == [row["subset"] for row in rows]
    template = oracle.tokenizer.apply_chat_template
    lengths = [len(template(each, return_dict=False)) for each in conversations]
    assert [each["tokens"] for each in found] == lengths
    answers = [len(each[1]["content"].split()) + 1 for each in conversations]  # and what ends them
    assert [each["response_tokens"] for each in found] == answers
    others = scored(tmp_path / "b.jsonl", **values, engine={"batch_size": 3})
    for one, other in zip(found, others, strict=True):
        assert one.pop("reward") == pytest.approx(other.pop("reward"), abs=1e-4)
        assert one == other
    record = json.loads((tmp_path / "a.parquet.json").read_text())
    assert record["reader"] == "rewardbench"
    assert set(record["summary"]["sections"]) == {
        *("Chat", "Chat Hard", "Safety", "Reasoning", "average")
    }


def test_a_run_that_ends_goes_on_and_a_finished_one_is_left(
    reward_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ROWS", 10)
    data = write_rows(tmp_path / "bench.jsonl", bench_rows())
    values = {"model": reward_models["one"], "data": data}
    whole = scored(tmp_path / "whole.jsonl", **values)
    out, asked = tmp_path / "scores.jsonl", []
    rewards = TransformersEngine.rewards

    def counted(engine: TransformersEngine, conversations: Any) -> list[float]:
        asked.append(len(conversations))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rewards(engine, conversations)

    monkeypatch.setattr(TransformersEngine, "rewards", counted)
    with pytest.raises(KeyboardInterrupt):
        scored(out, **values)
    assert not out.exists() and partial_path(out).is_dir()
    assert scored(out, **values) == whole
    assert asked == [20, 20, 20, 20, 20, 12]  # blocks one and two were kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("bench.jsonl", "scores.jsonl", "scores.jsonl.json", "whole.jsonl", "whole.jsonl.json")
    ]
    before = out.stat().st_mtime_ns
    assert scored(out, **values) == whole
    assert (len(asked), out.stat().st_mtime_ns) == (6, before)
    with pytest.raises(InputError, match="exists already"):
        scored(out, **values, limit=3)
    plan = plan_scores(check(values | {"limit": 3}, ScoreConfig, "score"), out, force=True)
    assert score(plan)["summary"]["rows"] == 3
    out.write_text(out.read_text() + "{}\n")
    with pytest.raises(InputError, match="exists already"):
        scored(out, **values, limit=3)


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.config import check
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.rewards import ScoreConfig, plan_scores, score
from pipelines.rewards import scoring
scoring.BLOCK_ROWS, calls, rewards = 10, [], TransformersEngine.rewards
def last(engine, conversations):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return rewards(engine, conversations)
TransformersEngine.rewards = last
model, data, out = sys.argv[1:]
score(plan_scores(check({"model": model, "data": data}, ScoreConfig, "score"), Path(out)))
"""


@pytest.mark.slow
def test_a_kill_loses_one_block(
    reward_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ROWS", 10)
    data, out = write_rows(tmp_path / "bench.jsonl", bench_rows()), tmp_path / "scores.parquet"
    arguments = [sys.executable, "-c", KILLED, reward_models["one"], data, out]
    ended = subprocess.run(arguments, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL and not out.exists()
    config = check({"model": reward_models["one"], "data": data}, ScoreConfig, "score")
    plan = plan_scores(config, out)
    assert (plan.missing, plan.num_blocks) == ([3, 4], 5)
    score(plan)
    whole = scored(tmp_path / "whole.parquet", model=reward_models["one"], data=data)
    assert parquet.read_table(out).to_pylist() == whole


def test_rows_that_are_too_long(reward_models: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": "a b ", "chosen": "c", "rejected": "d"},
        {"prompt": "a b c d e f g h ", "chosen": "i", "rejected": "j a"},
    ]
    data, model = write_rows(tmp_path / "rows.jsonl", rows), reward_models["one"]
    values = {"model": model, "data": data, "engine": {"max_length": 8}}
    with pytest.raises(InputError, match=r"1 of 2 rows are too long: .* row 2 has 11 tokens; al"):
        scored(tmp_path / "a.jsonl", **values)
    config = check(values | {"too_long": "drop"}, ScoreConfig, "score")
    record = score(plan_scores(config, tmp_path / "a.jsonl"))
    assert (record["counts"]["dropped"], record["summary"]["responses"]) == (1, 2)
    cut = scored(tmp_path / "b.jsonl", **values, too_long="cut_prompt")
    assert [each["prompt_cut"] for each in cut] == [False, False, True, True]
    assert [each["tokens"] for each in cut] == [4, 4, 7, 8]  # both lose as much
    oracle = Rewards(model)
    beginning = oracle.tokenizer.bos_token
    for each, text in zip(cut[2:], ("d e f g h i", "d e f g h j a"), strict=True):
        ids = oracle.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert each["tokens"] == len(ids) + 1 and beginning not in text
    assert [each["reward"] for each in cut[:2]] == pytest.approx(
        [oracle.of("a b c"), oracle.of("a b d")], abs=1e-4
    )


def test_readers_columns_clusters_and_bad_rows(
    reward_models: dict[str, Path], tmp_path: Path
) -> None:
    rows: list[Any] = [
        {"question": "a", "good": "b", "bad": "c", "kind": "x", "person": 1},
        {"question": "a", "good": "d", "bad": "", "kind": "x", "person": 1},
        {"question": "a", "good": "d", "bad": "e", "kind": "y", "person": 1},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    values = {"model": reward_models["one"], "data": data, "columns": columns}
    with pytest.raises(InputError, match=r"row 2: rejected: is empty \(1 of 3 rows are bad"):
        scored(tmp_path / "a.jsonl", **values)
    found = scored(
        tmp_path / "a.jsonl", **values, max_bad_share=0.4, subset="kind", cluster="person"
    )
    assert [(each["number"], each["subset"], each["cluster"]) for each in found] == [
        *[(0, "x", "1")] * 2,
        *[(2, "y", "1")] * 2,
    ]
    assert len({each["cluster"] for each in scored(tmp_path / "b.jsonl", **values, limit=1)}) == 1
    pairs = [
        {
            "prompt": "a",
            "response": r,
            **dict.fromkeys(("helpfulness", "correctness", "coherence"), s),
        }
        for r, s in (("b", 4), ("c", 1))
    ]
    steered = write_rows(tmp_path / "steer.jsonl", pairs)
    found = scored(
        tmp_path / "c.jsonl", model=reward_models["one"], data=steered, reader="helpsteer"
    )
    oracle = Rewards(reward_models["one"])
    assert [each["reward"] for each in found] == pytest.approx(
        [oracle.of(said("a", "b")), oracle.of(said("a", "c"))], abs=1e-4
    )


PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}
BAD: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "two labels": ([PAIR], {"model": "two"}, r"found 2 labels \(LABEL_0, LABEL_1\); allowed: 1 in"),
    "no such head": (
        [PAIR],
        {"model": "three", "head": "honest"},
        "head: found 'honest'; allowed: 0 to 2, or helpfulness, honesty, harmlessness; did you "
        "mean honesty",
    ),
    "a number too high": ([PAIR], {"model": "three", "head": 3}, "head: found 3; allowed: 0 to 2"),
    "a causal model": (
        [PAIR],
        {"model": "causal"},
        "found LlamaForCausalLM; allowed: a sequence classification",
    ),
    "no model": ([PAIR], {"model": "nowhere"}, "nowhere: no Hugging Face checkpoint there"),
    "no common prompt": (
        [{"chosen": "The answer is 4.", "rejected": "The answer is 5."}],
        {},
        "row 1: has no column 'prompt', and chosen and rejected do not begin with the same prompt",
    ),
    "other conversations": (
        [{"chosen": said("a", "b"), "rejected": said("c", "b")}],
        {},
        "row 1: chosen and rejected do not begin with the same prompt and then differ",
    ),
    "missing columns": (
        [{"prompt": "a", "answers": 3}],
        {},
        "row 1: has no column 'completion'; found: prompt, answers; needed: prompt, chosen",
    ),
    "columns that may be content": (
        [PAIR | {"system": "s"}],
        {},
        "columns that may be content are not used: system",
    ),
    "another set": (
        [PAIR],
        {"reader": "helpsteer"},
        "reader helpsteer expects the columns .*; missing: response",
    ),
    "no such column": ([PAIR], {"subset": "kind"}, "no row has the column 'kind'; found: chosen"),
    "an empty prompt": (
        [{"prompt": [], "chosen": said("a", "b")[1:], "rejected": said("a", "c")[1:]}],
        {},
        "row 1: prompt: is empty",
    ),
    "a response that is too long": (
        [PAIR, PAIR | {"chosen": "a b c d e"}],
        {"engine": {"max_length": 4}, "too_long": "cut_prompt"},
        r"row 2: found \d tokens; allowed: max_length 4 .* \(1 of 2 rows are bad",
    ),
    "responses": ([{"prompt": "a", "responses": "b"}], {}, "found 'b'; allowed: a list of texts"),
    "no rows": ([], {}, "rows.jsonl: holds no rows"),
    "no template": (
        [{"messages": said("a", "b")}],
        {"model": "bare"},
        "row 1: holds messages, but model .*bare has no chat template",
    ),
    "a seed": ([PAIR], {"seed": 1}, "seed: has no effect with rows of which none is drawn"),
    "an engine's head": ([PAIR], {"engine": {"head": 0}}, "is a field of its own: head"),
    "an engine that writes": ([PAIR], {"engine": {"kind": "generate"}}, "allowed: reward"),
    "an unknown field": ([PAIR], {"heads": 0}, "heads: unknown field; .*did you mean head?"),
    "weights of NaN": ([PAIR], {"model": "nan"}, "score.weight: holds NaN or Inf"),
}


@pytest.fixture(scope="module")
def bad_models(
    tmp_path_factory: pytest.TempPathFactory, reward_models: dict[str, Path]
) -> dict[str, Path]:
    """Models that give no rewards."""
    from tests.pipelines.engines.references import damage

    root = tmp_path_factory.mktemp("bad")
    bare = save_reward_model(root / "bare")
    (bare / "chat_template.jinja").unlink()
    return reward_models | {
        "two": save_reward_model(root / "two", num_labels=2),
        "causal": save_tiny_llama(root / "causal"),
        "bare": bare,
        "nan": damage(save_reward_model(root / "nan"), "score.weight"),
        "nowhere": root / "nowhere",
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, bad_models: dict[str, Path], tmp_path: Path
) -> None:
    rows, values, message = BAD[case]
    values = {"data": write_rows(tmp_path / "rows.jsonl", rows), **values}
    values["model"] = bad_models[values.get("model", "one")]
    with pytest.raises(InputError, match=message) as error:
        scored(tmp_path / "scores.parquet", **values)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


def test_rewards_that_are_no_numbers(
    reward_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = TransformersEngine.rewards

    def overflow(engine: TransformersEngine, conversations: Any) -> list[float]:
        return [*rewards(engine, conversations)[:-1], float("nan")]

    monkeypatch.setattr(TransformersEngine, "rewards", overflow)
    data, out = write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR]), tmp_path / "scores.jsonl"
    with pytest.raises(InputError, match="row 2: rejected: found the reward nan; allowed: a fin"):
        scored(out, model=reward_models["one"], data=data)
    assert not out.exists()
    with pytest.raises(InputError, match=r"found scores.csv; allowed: a file that ends in"):
        scored(tmp_path / "scores.csv", model=reward_models["one"], data=data)


def answer_of(dialogue: str) -> str:
    """The last answer of a dialogue as a text."""
    return dialogue.rpartition("\n\nAssistant:")[2].strip()


@pytest.mark.long
def test_real_pairs(reward_models: dict[str, Path], tmp_path: Path) -> None:
    """POISE_PAIRS names JSON lines whose `chosen` and `rejected` are dialogues, as in HH-RLHF."""
    file = os.environ.get("POISE_PAIRS")
    if not file:
        pytest.skip("POISE_PAIRS names no file of pairs")
    rows = [row for part in parts_of([Path(file)]) for _, row in read_part(part)]
    tokenizer = bpe_tokenizer(row["chosen"] for row in rows)
    # Larger weights amplify float32's rounding beyond the bound.
    sizes = {"max_position_embeddings": 4096, "initializer_range": 0.1}
    model = save_reward_model(tmp_path / "model", tokenizer=tokenizer, **sizes)
    found = scored(tmp_path / "scores.parquet", model=model, data=file, max_bad_share=0.01)
    oracle = Rewards(model)
    for each in found:
        expected = oracle.of(rows[each["number"]][each["role"]])
        assert each["reward"] == pytest.approx(expected, abs=1e-4)
    record = json.loads((tmp_path / "scores.parquet.json").read_text())
    print(record["counts"], record["summary"]["pairs"], record["summary"]["length"])
    assert record["counts"]["rows"] == len(rows) > 100
    empty = sum(not answer_of(row[role]) for row in rows for role in ("chosen", "rejected"))
    assert record["counts"]["bad"] <= empty
    assert len(found) == 2 * (len(rows) - record["counts"]["bad"])
