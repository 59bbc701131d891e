"""What kinds of stages take of a cluster, and which stages belong together.

Oracle: numbers and pairs written by hand.
"""

from typing import Any

import pytest

from pipelines.config import check
from pipelines.pipeline.run import DRIVER
from ray_jobs.stages import KINDS

CPUS = {"CPU": 8.0}
ALIGN = {"model": "m", "data": "d", "num_steps": 1, "optimizer": {"learning_rate": 1e-3}}
MATRIX = {"models": {"a": "m"}, "tasks": "tasks.yaml"}
STUDY = {"space": {"seed": [0, 1]}, "sampler": {"name": "grid"}, "evaluation": {"tasks": "t.yaml"}}
SOUP = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def config(kind: str, **fields: Any) -> Any:
    values = {"align": ALIGN, "evaluate": MATRIX, "merge": SOUP, "command": {"argv": ["true"]}}
    values |= {"sweep": STUDY}
    return check(values[kind] | fields, KINDS[kind].config, kind)


NEEDS: list[tuple[str, dict[str, Any], dict[str, float]]] = [
    ("align", {"num_workers": 2, "strategy": "ddp"}, {"CPU": 1.8}),
    ("evaluate", {"num_workers": 3}, {"CPU": 2.7}),
    ("merge", {"num_workers": 2, "executor": "ray"}, {"CPU": 1.8}),
    ("merge", {"num_workers": 2, "executor": "local"}, {DRIVER: 1.0, "CPU": 2.0}),
    ("sweep", {"merge": "m.yaml"}, {DRIVER: 1.0}),
    ("sweep", {"merge": "m.yaml", "max_concurrent_trials": 3}, {"CPU": 2.7}),
    ("sweep", {"merge": "m.yaml", "max_concurrent_trials": "auto"}, CPUS),
    ("sweep", {"align": "a.yaml"}, CPUS),
    ("command", {"cpus": 0.5}, {"CPU": 0.5}),
]


@pytest.mark.parametrize(("kind", "fields", "need"), NEEDS)
def test_needs(kind: str, fields: dict[str, Any], need: dict[str, float]) -> None:
    assert KINDS[kind].need(config(kind, **fields), CPUS) == pytest.approx(need)


def test_evaluations_take_gpus_where_there_are_some() -> None:
    found = KINDS["evaluate"].need(config("evaluate", num_workers=2), CPUS | {"GPU": 4.0})
    assert found == pytest.approx({"CPU": 1.8, "GPU": 2.0})


def test_ray_starts_for_what_runs_on_it() -> None:
    assert KINDS["align"].on_ray(config("align"))
    assert KINDS["merge"].on_ray(config("merge", executor="ray"))
    assert not KINDS["merge"].on_ray(config("merge", executor="local"))
    assert KINDS["sweep"].on_ray(config("sweep", align="a.yaml"))
    assert not KINDS["sweep"].on_ray(config("sweep", merge="m.yaml"))
    assert not KINDS["command"].on_ray(config("command"))


def test_what_belongs_together() -> None:
    """Alignments by their workers, evaluations by their engine; merges and commands never."""

    def group(kind: str, **fields: Any) -> Any:
        return KINDS[kind].group(config(kind, **fields))

    two = {"num_workers": 2, "strategy": "ddp"}
    assert group("align", **two) == group("align", **two | {"strategy": "fsdp2", "seed": 4})
    assert group("align", **two) != group("align", **two | {"num_workers": 4})
    assert group("align", **two) != group("align", **two, max_failures=0)
    assert group("evaluate") == group("evaluate", split="development")
    assert group("evaluate") != group("evaluate", engine={"batch_size": 3})
    assert group("merge") is None
    assert group("command") is None
