"""Joining and starting Ray.

Oracle: Ray itself, by its session and its logs.
"""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from ray_jobs.session import (
    check_head,
    log_directory,
    ray_session,
    told_of_a_loss,
    worker_environment,
)


def test_a_head_that_does_not_answer_is_named_at_once() -> None:
    with pytest.raises(
        InputError, match=r"^RAY_ADDRESS: 127\.0\.0\.1:1: no Ray head answers there"
    ):
        check_head("127.0.0.1:1")


def test_a_session_inside_a_session_is_the_same_one(ray_cluster: None) -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    with ray_session():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()  # what did not start it does not stop it


def test_workers_import_the_project_and_phone_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = worker_environment()
    assert environment["PYTHONPATH"].endswith(":/somewhere")
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_logs_are_found(ray_cluster: None) -> None:
    """Where the raylet, which every session has, writes."""
    assert (Path(log_directory()) / "raylet.out").is_file()


def test_a_ray_that_keeps_its_node_elsewhere_costs_its_words_alone(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No log's place and no word of a lost process, but the work in the block goes on."""
    monkeypatch.delattr("ray._private.worker._global_node")
    assert log_directory() == ""
    with told_of_a_loss():
        done = True
    assert done


@pytest.mark.parametrize(("slow", "starts"), [(2, 3), (3, 3)])
def test_a_slow_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, slow: int, starts: int
) -> None:
    """Ray's own words where a node was not up in time; at most three starts."""
    tried = []

    def init(**_: object) -> None:
        tried.append(1)
        if len(tried) <= slow:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if slow < starts:
        with ray_session():
            pass
    else:
        with pytest.raises(Exception, match="timed out during startup"), ray_session():
            pass
    assert len(tried) == starts
