"""Joining and starting Ray."""

import pytest

from pipelines.errors import InputError
from ray_jobs.session import check_head, ray_session, worker_environment


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
