"""Measurers as actors: errors, lost processes, rest.

Oracle: `Measurer` in this process; Ray's own count of free resources.
"""

import time
from pathlib import Path

import pytest
import ray

from pipelines.engines import EngineConfig
from pipelines.search import Measurement, Measurer
from pipelines.search.pool import Failed, MeasurerPool
from tests.pipelines.search.conftest import evaluation_of, ties


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))


@pytest.mark.slow
def test_actors_measure_rest_and_start_again(
    ray_cluster: None, tasks: Path, models: list[Path], measurer: Measurer
) -> None:
    before, places = free_cpus(), {"third": [0, 3]}
    arguments = {"num_threads": 1, "directory": str(Path.cwd()), "offline": True}
    pool = MeasurerPool([evaluation_of(tasks, models[0])], arguments, EngineConfig(), 1, rest_s=2.0)
    try:
        assert pool.awake == []  # nothing is held before there is work
        good, bad = ties(models, weight=0.5), ties(models, densty=0.5)
        expected = measurer.measure(good, places)
        for _ in range(2):
            for candidate in (bad, good):
                pool.start(0, candidate, places)
                worker, outcome = pool.finished()
                assert (worker, pool.awake) == (0, [0])
                if candidate is bad:
                    assert isinstance(outcome, Failed)
                    assert outcome.state == "refused"
                    assert "densty: unknown parameter" in outcome.reason
                else:
                    assert isinstance(outcome, Measurement)
                    assert (outcome.digest, outcome.samples) == (expected.digest, expected.samples)
            end = time.monotonic() + 30
            while pool.awake or free_cpus() < before:
                assert time.monotonic() < end
                time.sleep(0.1)
        pool.start(0, good, places)
        ray.kill(pool._actors[0])
        _, outcome = pool.finished()
        assert isinstance(outcome, Failed)
        assert outcome.state == "failed"
        pool.start(0, good, places)
        assert isinstance(pool.finished()[1], Measurement)
    finally:
        pool.close()
