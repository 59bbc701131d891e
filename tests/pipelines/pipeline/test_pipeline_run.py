"""Runs of pipelines: what stands is left, what belongs together runs together, what fails stops
only what needs it.

Oracle: the calls that toys remember, and the texts that they nest.
"""

import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.pipeline import PipelinePlan, State, run_pipeline
from tests.pipelines.pipeline.toy_stages import FourCores, Heard, Toys


def reading(*names: str, **fields: Any) -> dict[str, Any]:
    return {"config": {"reads": [f"${{stages.{name}}}" for name in names], **fields}}


def run(plan: PipelinePlan, cluster: FourCores | None = None) -> dict[str, str]:
    """Run a plan; what has become of each stage."""
    state = State(plan.storage, plan.name)
    records = run_pipeline(plan, state, cluster or FourCores(), Heard())
    return {name: record.state for name, record in records.items()}


def text(plan: PipelinePlan, name: str) -> str:
    return Path(plan.stages[name].out).read_text()


CHAIN = {"c": reading("b", text="c"), "b": reading("a", text="b"), "a": reading(text="a")}


def test_each_runs_behind_what_it_reads(tmp_path: Path) -> None:
    toys = Toys()
    plan = toys.plan(tmp_path, CHAIN)
    assert run(plan) == {"c": "done", "b": "done", "a": "done"}
    assert toys.calls == [["a"], ["b"], ["c"]]
    assert text(plan, "c") == "(c (b (a )))"


def test_a_second_run_does_nothing_and_starts_no_ray(tmp_path: Path) -> None:
    toys, cluster = Toys(), FourCores()
    run(toys.plan(tmp_path, CHAIN))
    assert set(run(toys.plan(tmp_path, CHAIN), cluster).values()) == {"stands"}
    assert len(toys.calls) == 3
    assert cluster.starts == 0


def test_what_changed_runs_again_with_all_behind_it(tmp_path: Path) -> None:
    toys = Toys()
    run(toys.plan(tmp_path, CHAIN))
    changed = CHAIN | {"b": reading("a", text="B")}
    assert run(toys.plan(tmp_path, changed)) == {"c": "done", "b": "done", "a": "stands"}
    assert toys.calls[3:] == [["b"], ["c"]]


def test_what_is_made_again_with_the_same_bytes_leaves_the_rest(tmp_path: Path) -> None:
    toys = Toys()
    plan = toys.plan(tmp_path, CHAIN)
    run(plan)
    Path(plan.stages["a"].out).unlink()
    assert run(plan) == {"c": "stands", "b": "stands", "a": "done"}


@pytest.mark.parametrize("change", ["config", "input", "lost"])
def test_the_pipeline_keeps_fingerprints_where_the_command_keeps_none(
    tmp_path: Path, change: str
) -> None:
    toys = Toys()
    stages: dict[str, Any] = {"a": reading(text="a"), "b": {"kind": "noted", **reading("a")}}
    plan = toys.plan(tmp_path, stages)
    run(plan)
    assert run(plan) == {"a": "stands", "b": "stands"}
    if change == "lost":
        Path(plan.stages["b"].out).unlink()
    else:
        stages["b" if change == "config" else "a"]["config"]["text"] = "other"
    assert run(toys.plan(tmp_path, stages))["b"] == "done"
    assert toys.calls[-1] == ["b"]


def test_an_old_output_is_not_taken_for_the_new_one_after_a_kill(tmp_path: Path) -> None:
    """The state as a kill leaves it while an output is replaced."""
    toys = Toys()
    run(toys.plan(tmp_path, {"b": {"kind": "noted", **reading(text="old")}}))
    plan = toys.plan(tmp_path, {"b": {"kind": "noted", **reading(text="new")}})
    toys.breaks = {"b"}
    assert run(plan) == {"b": "failed"}
    state = State(plan.storage, plan.name)
    state.set("b", replace(state.stages["b"], state="running"))
    toys.breaks = set()
    assert run(plan) == {"b": "done"}
    assert text(plan, "b") == "(new )"


def test_stages_of_a_group_run_in_one_call(tmp_path: Path) -> None:
    toys = Toys()
    stages = {name: reading(group="g", text=name) for name in "abc"}
    stages |= {"d": reading(group="h"), "e": reading("a", "d", group="g")}
    assert set(run(toys.plan(tmp_path, stages)).values()) == {"done"}
    assert sorted(toys.calls) == [["a", "b", "c"], ["d"], ["e"]]


def test_side_by_side_as_far_as_there_is_room(tmp_path: Path) -> None:
    toys = Toys()
    stages = {f"s{n}": reading(need=1.5, seconds=0.2, text=str(n)) for n in range(4)}
    stages["large"] = reading(need=9, text="alone, though nothing has this room")
    assert set(run(toys.plan(tmp_path, stages)).values()) == {"done"}
    assert toys.most == 9
    assert ["large"] in toys.calls
    small = Toys()
    del stages["large"]
    run(small.plan(tmp_path / "runs", stages))
    assert small.most == 3


def test_what_runs_alone_is_in_the_main_thread(tmp_path: Path) -> None:
    """Where Ctrl-C reaches it, and the libraries that handle it."""
    alone, both = Toys(), Toys()
    run(alone.plan(tmp_path, CHAIN))
    assert alone.threads == {threading.main_thread()}
    run(both.plan(tmp_path / "runs", {"a": reading(seconds=0.2), "b": reading(seconds=0.2)}))
    assert len(both.threads - {threading.main_thread()}) == 2


@pytest.mark.parametrize("num_beside", [0, 1])
def test_an_interrupt_is_raised_and_threads_are_given_up(tmp_path: Path, num_beside: int) -> None:
    cluster = FourCores()
    stages = {f"s{n}": reading(seconds=1, text=str(n)) for n in range(num_beside)}
    stages["last"] = reading(text="interrupt")
    plan = Toys().plan(tmp_path, stages)
    with pytest.raises(KeyboardInterrupt):
        run(plan, cluster)
    assert cluster.is_abandoned == (num_beside > 0)
    assert State(plan.storage, plan.name).stages["last"].state == "running"


def test_what_fails_stops_what_needs_it_alone(tmp_path: Path) -> None:
    toys = Toys()
    stages = {
        "a": reading(fails=True),
        "b": reading("a"),
        "c": reading("b"),
        "d": reading(text="d"),
        "e": reading("d"),
    }
    plan = toys.plan(tmp_path, stages)
    assert list(run(plan).values()) == ["failed", "waiting", "waiting", "done", "done"]
    records = State(plan.storage, plan.name).stages
    assert records["a"].reason == "RuntimeError: a broke"
    assert (records["b"].reason, records["c"].reason) == ("needs a", "needs b")
    log = tmp_path / "runs" / ".pipelines" / "line" / "logs" / "a.log"
    assert "in _make" in log.read_text()
    stages["a"] = reading()
    assert list(run(toys.plan(tmp_path, stages)).values()) == ["done"] * 3 + ["stands"] * 2


def test_a_failure_in_a_group_is_of_one_stage(tmp_path: Path) -> None:
    toys = Toys()
    stages = {name: reading(group="g", text=name, fails=name == "b") for name in "abc"}
    plan = toys.plan(tmp_path, stages)
    assert run(plan) == {"a": "done", "b": "failed", "c": "done"}
    assert toys.calls[0] == ["a", "b", "c"]
    assert sorted(toys.calls[1:]) == [["b"], ["c"]]


def test_seconds_of_a_group_are_those_of_each(tmp_path: Path) -> None:
    stages = {
        name: reading(group="g", text=name, seconds=s) for name, s in (("a", 0.4), ("b", 0.1))
    }
    plan = Toys().plan(tmp_path, stages)
    run(plan)
    found = State(plan.storage, plan.name).stages
    assert found["a"].seconds == pytest.approx(0.4, abs=0.15)
    assert found["b"].seconds == pytest.approx(0.1, abs=0.15)


def test_what_is_told(tmp_path: Path) -> None:
    """The time left is the expected one, then by the pace so far; progress comes from stages."""
    stages = {"a": reading(seconds=0.1) | {"expected_s": 10}, "b": {"expected_s": 100}}
    stages["b"] |= reading("a")
    plan, heard = Toys().plan(tmp_path, stages), Heard()
    run_pipeline(plan, State(plan.storage, plan.name), FourCores(), heard)
    assert heard.ends == {"a": "done", "b": "done"}
    assert heard.parts == ["a toys: 1/1", "b toys: 1/1"]
    assert heard.left[0] == 110
    assert 0.9 < heard.left[1] < 10  # 100 times a pace of a hundredth or somewhat more


def test_the_config_as_it_ran_is_kept(tmp_path: Path) -> None:
    plan = Toys().plan(tmp_path, CHAIN)
    run(plan)
    kept = tmp_path / "runs" / ".pipelines" / "line" / "configs" / "b.yaml"
    assert kept.read_text() == f"reads:\n- {tmp_path}/runs/a\ntext: b\n"


def test_a_config_that_a_stage_makes_is_read_when_it_stands(tmp_path: Path) -> None:
    """Not as it was before the run."""
    toys = Toys()
    for text in ("old", "new"):
        made = {"kind": "toy", "config": {"text": f"text: {text}", "plain": True}}
        plan = toys.plan(tmp_path, {"made": made, "b": {"config": "${stages.made}"}})
        assert set(run(plan).values()) == {"done"}
        assert Path(plan.stages["b"].out).read_text() == f"({text} )"


def run_in_process(folder: Path, stages: dict[str, Any]) -> None:
    run(Toys().plan(folder, stages))


def test_one_run_at_a_time_and_a_killed_one_is_gone_on_with(tmp_path: Path) -> None:
    stages = {"a": reading(text="a"), "b": reading("a", seconds=60)}
    toys = Toys()
    plan = toys.plan(tmp_path, stages)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_in_process, args=(tmp_path, stages))
    process.start()
    while "b" not in (found := State(plan.storage, plan.name).stages):
        assert process.is_alive()
    assert (found["a"].state, found["b"].state) == ("done", "running")
    with pytest.raises(InputError, match="another run is writing this output"):
        run(plan)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    stages["b"] = reading("a")
    assert run(toys.plan(tmp_path, stages)) == {"a": "stands", "b": "done"}
    assert toys.calls == [["b"]]


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "runs" / ".pipelines" / "line"
    place.mkdir(parents=True)
    (place / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state\.json: is no state of a pipeline; remove it"):
        State(str(tmp_path / "runs"), "line")
