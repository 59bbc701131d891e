"""A checkpoint as judge in an engine of Ray's workers. Oracle: the same evaluation in no worker."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.run import ExecutorName
from tests.pipelines.engines.references import save_chatty

PROMPTS = [{"prompt": f"{a} {b}"} for a in "abcdefg" for b in "no yes".split()]
# A random judge says letters; the first of these that it says is its verdict.
LABELS = {
    **dict.fromkeys("abcdefghijklm", "refusal"),
    **dict.fromkeys("nopqrstuvwxyz", "compliance"),
}


def verdicts(out: Path) -> dict[str, Any]:
    """What a judge said, by the key of its question, which is there once."""
    lines = [
        json.loads(line)
        for file in (out / "verdicts").rglob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line.pop("key"): line for line in lines}


@pytest.mark.slow
def test_a_judge_in_workers_says_what_it_says_here(tmp_path: Path, ray_cluster: None) -> None:
    """Two models, two engines for answers, then the judge's; a later run asks nobody."""
    sizes = {"max_position_embeddings": 2048}
    models = {name: save_chatty(tmp_path / name, seed, **sizes) for seed, name in enumerate("ab")}
    judge = save_chatty(tmp_path / "judge", 7, **sizes)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    entry = {
        "judged": "refusal",
        "data": data,
        "judge": {"model": str(judge), "engine": {"batch_size": 4}},
        "parser": {"kind": "label", "labels": LABELS, "precedence": True},
        "max_new_tokens": 6,
        "max_invalid": 1.0,
    }
    config = EvaluateConfig(models=models, tasks=[entry], num_workers=2)
    found = {}
    executors: tuple[ExecutorName, ...] = ("local", "ray")
    for executor in executors:
        summary = evaluate(config, tmp_path / executor, executor=executor)
        assert not summary["failed"]
        found[executor] = summary["models"], verdicts(tmp_path / executor)
    assert found["ray"] == found["local"]
    assert len(found["ray"][1]) == len(
        {(row["prompt"], model) for row in PROMPTS for model in models}
    )
    written = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "ray").rglob("*.jsonl")]
    again = evaluate(config, tmp_path / "ray", executor="ray")
    assert again["models"] == found["ray"][0]
    assert written == [(path, path.stat().st_mtime_ns) for path, _ in written]
