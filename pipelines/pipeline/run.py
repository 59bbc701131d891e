"""Run a pipeline: what stands is left, what belongs together runs in one call, and what is
independent runs side by side as far as the cluster has room.

A run that is killed leaves nothing to repair: results appear whole, unfinished ones are gone on
with by their own commands, and what stands is found by fingerprints.
"""

import queue
import re
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import yaml

from pipelines.errors import InputError
from pipelines.pipeline.fingerprints import key_of
from pipelines.pipeline.plan import PipelinePlan, Stage
from pipelines.pipeline.state import StageRecord, StageState, State
from pipelines.progress import Progress, heard_by
from pipelines.storage import is_address

Resources = dict[str, float]
DRIVER = "driver"  # this process, in which one call at a time may compute
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in messages of Ray
LOGS = "logs"  # in the pipeline's place: why stages failed
CONFIGS = "configs"  # in the pipeline's place: each stage's config as it ran


class Listener(Protocol):
    """Who shows a run."""

    def began(self, names: Sequence[str], left_s: float | None) -> None:
        """Stages begin, in one call; `left_s` seconds may be left for the pipeline."""

    def progress(self, names: Sequence[str], progress: Progress, note: str) -> None:
        """Stages that began have done a part of their work. Comes from their threads."""

    def ended(self, name: str, record: StageRecord) -> None:
        """A stage stands, is done or has failed."""


class Cluster(Protocol):
    """The Ray session of a run, which starts when a stage needs it."""

    def session(self) -> AbstractContextManager[None]:
        """Ray in the block."""

    def resources(self) -> Resources:
        """What the running Ray has, by name."""

    def abandon(self) -> None:
        """Called after Ctrl-C where threads are in the midst of calls, which nothing can stop."""


def run_pipeline(
    plan: PipelinePlan,
    state: State,
    cluster: Cluster,
    listener: Listener,
    *,
    force: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, StageRecord]:
    """Make all outputs; stages behind a failed one wait, and the others go on.

    Args:
        force: replace results of another config or of other inputs.
        on_start: is called when Ray has started.

    Returns:
        what has become of each stage.

    Raises:
        InputError: another run of the pipeline is under way.
    """
    with state.writing(), ExitStack() as stack:
        state.keep(list(plan.stages))
        run = _Run(plan, state, cluster, listener, force, stack, on_start)
        try:
            return run.run()
        except KeyboardInterrupt:
            if run.has_threads:
                cluster.abandon()
            raise


def is_standing(stage: Stage, state: State) -> bool:
    """Whether a stage's output is the finished result of its config and inputs. All stages before
    it must stand.
    """
    if stage.kind.stands is not None:
        return stage.kind.stands(stage.config, stage.out)
    record = state.stages.get(stage.name)
    if record is None or record.key != key_of(stage.settings.kind, stage.job()):
        return False
    if not stage.kind.makes_output(stage.config):
        return record.state in ("stands", "done")
    return Path(stage.out).exists()


class _Run:
    """One run: which stages wait, which run, and what they take.

    Attributes:
        has_threads: whether calls run in threads of their own now.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        state: State,
        cluster: Cluster,
        listener: Listener,
        force: bool,
        stack: ExitStack,
        on_start: Callable[[], None],
    ) -> None:
        self._plan, self._state, self._cluster, self._listener = plan, state, cluster, listener
        self._force, self._stack, self._on_start = force, stack, on_start
        self._outcomes: dict[str, StageRecord] = {}
        self._taken: dict[tuple[str, ...], Resources] = {}  # by the stages of a call
        self._ends: queue.SimpleQueue[tuple[list[Stage], float, Exception | None]]
        self._ends = queue.SimpleQueue()
        self._keys: dict[str, str] = {}
        self._open: set[str] = set()  # stages that do not stand
        self._alone: set[str] = set()  # of a call that failed
        self._has_ray = False
        self.has_threads = False
        self._spent = self._expected = 0.0

    def run(self) -> dict[str, StageRecord]:
        """Run until no stage can begin."""
        while True:
            while any(self._left_alone(stage) for stage in self._ready()):
                pass  # others may be ready now
            begun = [call for call in self._calls(self._ready()) if self._begin(call)]
            if not self._taken:
                break
            if len(begun) == len(self._taken) == 1:
                self._work(begun[0])  # in the main thread, which Ctrl-C interrupts as it should
            else:
                self.has_threads = True
                for call in begun:
                    threading.Thread(target=self._work, args=(call,), daemon=True).start()
            self._end(*self._ends.get())
            self.has_threads &= bool(self._taken)
        for name, stage in self._plan.stages.items():
            if name not in self._outcomes:
                missing = [each for each in stage.after if not self._stands(each)]
                self._settle(stage, "waiting", reason=f"needs {', '.join(missing)}")
        return {name: self._outcomes[name] for name in self._plan.stages}

    def _ready(self) -> list[Stage]:
        """The stages that may begin."""
        running = {name for names in self._taken for name in names}
        return [
            stage
            for name, stage in self._plan.stages.items()
            if name not in self._outcomes
            and name not in running
            and all(map(self._stands, stage.after))
        ]

    def _stands(self, name: str) -> bool:
        return name in self._outcomes and self._outcomes[name].state in ("stands", "done")

    def _left_alone(self, stage: Stage) -> bool:
        """Whether nothing is to be done: the stage stands, or cannot begin."""
        if stage.name in self._open:
            return False
        try:
            if is_standing(stage, self._state):
                self._settle(stage, "stands")
                return True
        except Exception as error:
            self._fail(stage, error)
            return True
        self._open.add(stage.name)
        return False

    def _calls(self, ready: Sequence[Stage]) -> list[list[Stage]]:
        """Stages that run in one call, in the plan's order."""
        calls: dict[Hashable, list[Stage]] = {}
        for stage in ready:
            group = None if stage.name in self._alone else stage.kind.group(stage.config)
            key = stage.name if group is None else (stage.settings.kind, group)
            calls.setdefault(key, []).append(stage)
        return list(calls.values())

    def _begin(self, call: list[Stage]) -> bool:
        """Take what a call needs, if the cluster has room for it; whether it may run."""
        if any(stage.kind.on_ray(stage.config) for stage in call) and not self._has_ray:
            self._stack.enter_context(self._cluster.session())
            self._has_ray = True
            self._on_start()
        has = self._cluster.resources() if self._has_ray else {}
        try:
            need = call[0].kind.need(call[0].config, has)
        except InputError as error:
            for stage in call:
                self._fail(stage, error)
            return False
        if self._taken and not self._has_room(need, has):
            return False
        names = tuple(stage.name for stage in call)
        self._taken[names] = need
        for stage in call:
            if stage.kind.stands is None:
                self._keys[stage.name] = key_of(stage.settings.kind, stage.job())
            # Of an output that is replaced, the old one must not count as finished after a kill.
            is_new = is_address(stage.out) or not Path(stage.out).exists()
            key = self._keys.get(stage.name, "") if is_new else ""
            text = yaml.safe_dump(stage.values, sort_keys=False)
            self._state.place.write(f"{CONFIGS}/{stage.name}.yaml", text)
            self._state.set(stage.name, self._record(stage, "running", key=key))
        self._listener.began(names, self._seconds_left())
        return True

    def _has_room(self, need: Resources, has: Resources) -> bool:
        """Whether the cluster has what a call needs beside those that run."""
        for kind, amount in need.items():
            taken = sum(each.get(kind, 0.0) for each in self._taken.values())
            if taken + amount > has.get(kind, 1.0 if kind == DRIVER else 0.0):
                return False
        return True

    def _work(self, call: list[Stage]) -> None:
        """Run a call, in this thread or in its own."""
        names = tuple(stage.name for stage in call)
        start = time.time()
        error: Exception | None = None
        try:
            with heard_by(lambda progress, note: self._listener.progress(names, progress, note)):
                jobs = [stage.job(self._force or stage.kind.always_replaces) for stage in call]
                call[0].kind.run(jobs)
        except Exception as found:
            error = found
        except SystemExit as found:  # of a library
            error = RuntimeError(f"ended with status {found.code}")
        self._ends.put((call, start, error))

    def _end(self, call: list[Stage], start: float, error: Exception | None) -> None:
        """Settle the stages of a call; those that another one of it stopped begin again alone."""
        del self._taken[tuple(stage.name for stage in call)]
        seconds = _seconds(call, start, time.time())
        for stage in call:
            if error is None or (len(call) > 1 and self._stands_now(stage)):
                self._settle(stage, "done", seconds=round(seconds[stage.name], 2))
                if stage.settings.expected_s:
                    self._spent += seconds[stage.name]
                    self._expected += stage.settings.expected_s
            elif len(call) > 1:
                self._alone.add(stage.name)
            else:
                assert error is not None
                self._fail(stage, error)

    def _stands_now(self, stage: Stage) -> bool:
        try:
            return is_standing(stage, self._state)
        except Exception:  # it says so again when it begins alone
            return False

    def _settle(
        self, stage: Stage, state: StageState, *, seconds: float | None = None, reason: str = ""
    ) -> None:
        before = self._state.stages.get(stage.name)
        key = before.key if before else ""
        if state == "done":
            key = self._keys.get(stage.name, "")
        if seconds is None and before:
            seconds = before.seconds
        record = self._record(stage, state, key=key, seconds=seconds, reason=reason)
        self._outcomes[stage.name] = record
        self._state.set(stage.name, record)
        if state != "waiting":
            self._listener.ended(stage.name, record)

    def _fail(self, stage: Stage, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        self._state.place.write(f"{LOGS}/{stage.name}.log", text)
        line = _COLOURS.sub("", (str(error).strip().splitlines() or [""])[0])[:300]
        if not isinstance(error, InputError):
            line = f"{type(error).__name__}: {line}"
        self._settle(stage, "failed", reason=line)

    def _record(self, stage: Stage, state: StageState, **fields: Any) -> StageRecord:
        return StageRecord(stage.settings.kind, stage.out, state, **fields)

    def _seconds_left(self) -> float | None:
        """By the seconds that stages are expected to take, and this machine's pace so far; None if
        they are not known.
        """
        open_stages = [s for name, s in self._plan.stages.items() if not self._stands(name)]
        expected = [stage.settings.expected_s for stage in open_stages]
        known = [each for each in expected if each is not None]
        if len(known) < len(expected):
            return None
        return sum(known) * (self._spent / self._expected if self._expected else 1.0)


def _seconds(call: Sequence[Stage], start: float, end: float) -> Mapping[str, float]:
    """The seconds of each stage of a call: those between its output and the one before it."""
    if len(call) == 1:
        return {call[0].name: end - start}
    found, last = {}, start
    for stage in call:
        path = Path(stage.out)
        there = path.stat().st_mtime if not is_address(stage.out) and path.exists() else end
        found[stage.name] = max(0.0, min(there, end) - last)
        last = max(last, min(there, end))
    found[call[-1].name] += end - last
    return found
