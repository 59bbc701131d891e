"""What engines ask of a cluster; whether evaluations and searches ask for it.

Oracle: the GPUs that Ray gives, in a Ray of its own with two made-up ones.
"""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from pipelines.config import check
from pipelines.engines import EngineConfig, Need
from pipelines.errors import InputError
from pipelines.search.pool import check_room

CPUS, GPUS = {"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("fields", "cluster", "expected"),
    [
        ({}, CPUS, Need(0.9, 0)),
        ({}, GPUS, Need(0.9, 1)),
        ({"device": "cpu"}, GPUS, Need(0.9, 0)),
        ({"device": "cuda"}, CPUS, Need(0.9, 1)),
        ({"name": "vllm", "tensor_parallel": 2}, GPUS, Need(0.9, 2)),
        ({"name": "vllm", "tensor_parallel": 2}, CPUS, Need(1.8, 0)),
    ],
)
def test_what_an_engine_needs(fields: dict, cluster: dict, expected: Need) -> None:
    assert EngineConfig(**fields).need(cluster) == expected


def test_how_many_have_room() -> None:
    assert Need(0.9, 1).most(GPUS) == 2
    assert Need(0.9, 2).most(GPUS) == 1
    assert Need(0.9, 0).most(GPUS) == 4
    assert Need(0.9, 1).most({"CPU": 1.0, "GPU": 8.0}) == 1
    assert Need(0.9, 1).options == {"num_cpus": 0.9, "num_gpus": 1}
    assert Need(0.9, 1).bundle == {"CPU": 0.9, "GPU": 1}
    assert Need(0.9, 0).bundle == {"CPU": 0.9}


@pytest.mark.parametrize(
    "fields", [{"tensor_parallel": 2}, {"cache_gib": 2.0}, {"name": "vllm", "batch_size": 8}]
)
def test_fields_without_effect(fields: dict) -> None:
    name = next(field for field in fields if field != "name")
    with pytest.raises(InputError, match=rf"engine\.{name}: has no effect with"):
        check(fields, EngineConfig, "engine")


def test_a_trial_that_never_fits_is_an_error() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 2.0}]
    check_room({"CPU": 4.0, "GPU": 1}, nodes)
    with pytest.raises(InputError, match=r"needs 0\.9 CPU, 2 GPU on a node; .* 4 CPU, 1 GPU; 0\.5"):
        check_room({"CPU": 0.9, "GPU": 2}, nodes)


def by_begin(trial: list) -> float:
    """When a trial began."""
    return trial[1]


SCRIPT = """
import json, sys, time
from pathlib import Path
import ray, yaml
from pipelines.evaluate import run as evaluation
from pipelines.evaluate import pools
from pipelines.evaluate.workers import Worker
from pipelines.engines import EngineConfig
from pipelines.search import pool as searching
from ray_jobs.session import quiet_environment, worker_environment
from tests.tiny_models import save_tiny_llama

root = Path(sys.argv[1])
quiet_environment()
for name in ("x", "y", "z"):
    save_tiny_llama(root / name)
row = {"id": "0", "prompt": [{"role": "user", "content": "a"}], "answer": "a", "cluster": "0"}
(root / "rows.jsonl").write_text(json.dumps(row) + "\\n")
task = {"name": "t", "dimension": "honesty", "grader": {"name": "exact"}}
task["files"] = {"test": "rows.jsonl", "development": "rows.jsonl"}
(root / "tasks.yaml").write_text(yaml.safe_dump([task]))

class Spy(Worker):
    def measure(self, block):
        (root / f"{block.model.name}.seen").write_text(json.dumps(ray.get_gpu_ids()))
        return super().measure(block)

class Timed:
    def measured(self, candidate, documents, race):
        begin = time.time()
        time.sleep(1)
        seen = [ray.get_gpu_ids(), begin, time.time()]
        (root / f"{candidate}.seen").write_text(json.dumps(seen))

pools.Worker, searching._Actor = Spy, Timed
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={"env_vars": worker_environment()})
try:
    models = {name: root / name for name in "xyz"}
    config = evaluation.EvaluateConfig(
        models=models, tasks=root / "tasks.yaml", max_new_tokens=2, num_workers=3
    )
    evaluation.evaluate(config, root / "out")
    pool = searching.MeasurerPool([], {}, EngineConfig(), 3)
    assert pool.size == 2
    for worker in range(2):
        pool.start(worker, float(worker + 1))
    pool.start(pool.finished()[0], 3.0)
    for _ in range(2):
        pool.finished()
    pool.close()
finally:
    ray.shutdown()
"""


@pytest.mark.slow
def test_each_engine_has_a_gpu_to_itself(tmp_path: Path, project_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=project_root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{name}.seen").read_text()) for name in "xyz"]
    assert all(len(each) == 1 for each in seen)
    assert len({each[0] for each in seen}) == 2  # three models on two GPUs
    trials = [json.loads((tmp_path / f"{w}.seen").read_text()) for w in (1.0, 2.0, 3.0)]
    assert all(len(gpus) == 1 for gpus, _, _ in trials)
    for (gpu, begin, end), (other, later, _) in combinations(sorted(trials, key=by_begin), 2):
        assert gpu != other or end <= later, (begin, later)  # no GPU has two trials at once
