"""What engines ask of a cluster; whether evaluations and sweeps ask for it.

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
from pipelines.sweep import SweepConfig
from pipelines.sweep.run import trial_need

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


def test_what_a_trial_needs(tmp_path: Path) -> None:
    config = SweepConfig(merge=tmp_path, search={"x": [1]}, tasks=tmp_path, cpus_per_trial=2.0)
    assert trial_need(config, CPUS) == {"CPU": 2.0}
    assert trial_need(config, GPUS) == {"CPU": 2.0, "GPU": 1}


def by_begin(trial: list) -> float:
    """When a trial began."""
    return trial[1]


SCRIPT = """
import json, sys
from pathlib import Path
import ray, yaml
from pipelines.evaluate import run as evaluation
from pipelines.evaluate import pools
from pipelines.evaluate.workers import Worker
from pipelines.sweep import run as sweeping
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
merge = {"merge_method": "linear", "models": [{"model": str(root / n)} for n in "xy"]}
merge["parameters"] = {"weight": 1.0}
(root / "merge.yaml").write_text(yaml.safe_dump(merge))

class Spy(Worker):
    def measure(self, block):
        (root / f"{block.model.name}.seen").write_text(json.dumps(ray.get_gpu_ids()))
        return super().measure(block)

def trial(parameters, **unused):
    import time
    from ray import tune
    begin, name = time.time(), parameters["parameters.weight"]
    time.sleep(1)
    seen = [ray.get_gpu_ids(), begin, time.time()]
    (root / f"{name}.seen").write_text(json.dumps(seen))
    tune.report({"trial": {"parameters": parameters, "value": 0.0}})

pools.Worker, sweeping._trial = Spy, trial
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={"env_vars": worker_environment()})
try:
    models = {name: root / name for name in "xyz"}
    config = evaluation.EvaluateConfig(
        models=models, tasks=root / "tasks.yaml", max_new_tokens=2, num_workers=3
    )
    evaluation.evaluate(config, root / "out")
    search = {"parameters.weight": [1.0, 2.0, 3.0]}
    swept = sweeping.SweepConfig(
        merge=root / "merge.yaml", tasks=root / "tasks.yaml", search=search,
        max_concurrent_trials=3,
    )
    sweeping.sweep(swept, root / "swept")
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
