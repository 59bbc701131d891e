"""Rewards by vLLM. Oracle: the engine on transformers, in float32."""

from pathlib import Path

import pytest

from pipelines.config import check
from pipelines.rewards import ScoreConfig, plan_scores, score
from pipelines.rewards.files import frame
from tests.pipelines.rewards.reward_models import bench_rows, save_reward_model, write_rows

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def test_both_engines_give_the_same_rewards(tmp_path: Path) -> None:
    """Of one of three labels; conversations of several lengths, some of several blocks."""
    import pyarrow.parquet as parquet

    model = save_reward_model(tmp_path / "model", 3, num_labels=3)
    rows = bench_rows(per_subset=2)
    rows += [
        row | {"chosen": " ".join("abcdefgh" * 8), "id": 100 + n} for n, row in enumerate(rows[:9])
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = {}
    for name, fields in (("transformers", {}), ("vllm", {"cache_gib": 0.25})):
        engine = {"name": name, "dtype": "float32", **fields}
        config = check({"model": model, "data": data, "head": 1, "engine": engine}, ScoreConfig, "")
        score(plan_scores(config, tmp_path / f"{name}.parquet"))
        found[name] = frame(parquet.read_table(tmp_path / f"{name}.parquet"))
    ours, theirs = found["transformers"], found["vllm"]
    assert list(ours.drop(columns="reward")) == list(theirs.drop(columns="reward"))
    assert ours["reward"].tolist() == pytest.approx(theirs["reward"].tolist(), abs=1e-4)
    assert ours["reward"].max() - ours["reward"].min() > 1
