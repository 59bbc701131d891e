"""Run a merge: plan, finish the open items, commit."""

import errno
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import DigestMemory, changed_parts
from pipelines.checkpoints.hub import described
from pipelines.commit import commit_directory, lock, make_folder, partial_path, refuse_existing
from pipelines.errors import InputError
from pipelines.merge.card import write_companions
from pipelines.merge.config import MergeConfig
from pipelines.merge.contexts import model_contexts
from pipelines.merge.executors import EXECUTORS
from pipelines.merge.journal import Journal
from pipelines.merge.plan import MergePlan, plan_merge
from pipelines.merge.remote import Destination, merge_to_url
from pipelines.progress import Progress
from pipelines.provenance import read_record
from pipelines.storage import output_place

ExecutorName = Literal["local", "ray"]


def merge(
    config: MergeConfig,
    out: str | Path,
    *,
    force: bool = False,
    executor: ExecutorName = "local",
) -> Path | str:
    """Merge checkpoints into `out`, which gets its name when it is complete.

    An interrupted merge resumes and gives the same bytes. A finished `out` with the same config and
    inputs is kept.

    Args:
        out: a folder, or the address of one in an object store, such as `s3://bucket/name`.
        executor: `local` runs in threads of this process; `ray` in Ray Data actors (Ray must be
            running).

    Raises:
        InputError: inputs that cannot be merged, no room on the disk, another merge into `out`,
            or an `out` with other content while `force` is false.
    """
    return merge_planned(plan_merge(config), out, force=force, executor=executor)


def merge_planned(
    plan: MergePlan,
    out: str | Path,
    *,
    force: bool = False,
    executor: ExecutorName = "local",
    memory: DigestMemory | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path | str:
    """As `merge`, for a plan. Named merges with their own `out` are written first.

    Args:
        memory: known digests of inputs; new ones are added.
        details: further fields of the record, such as why this merge was chosen; not for an
            address.
    """
    memory = memory or DigestMemory()
    for name, named in plan.named.items():
        place = output_place(str(plan.config.merges[name].out), plan.config.storage)
        merge_planned(named, place, force=force, executor=executor, memory=memory)
    if "://" in str(out):
        assert not details, "an address's record has none"
        return merge_to_url(plan, str(out), memory, force=force, executor=executor)
    out = Path(out).absolute()
    refuse_inputs(out, plan.checkpoints, "merge")
    if not force and is_finished(plan, out):
        return out
    refuse_existing(out, force=force)
    folder = partial_path(out)
    make_folder(folder)
    with lock(folder):
        try:
            _fill(plan, folder, executor, memory, details or {})
        except InputError:
            shutil.rmtree(folder)  # the inputs must change, so its content is useless
            raise
        commit_directory(folder, out, force=force)
    return out


def record_of(place: Path | str) -> dict[str, Any] | None:
    """The record of a finished merge in a folder or at an address; None if there is none."""
    if isinstance(place, str) and "://" in place:
        return Destination.open(place).read(RECORD_FILE)
    return read_record(Path(place))


def refuse_inputs(out: Path, inputs: Iterable[str], work: str) -> None:
    """Raise InputError for an output that is or holds an input of the work."""
    for path in inputs:
        if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise InputError(f"{out}: is or holds an input of the {work}; choose another output")


class Planned(Protocol):
    """What identifies finished work."""

    @property
    def key(self) -> str:
        """Of the settings and the very files that are read."""

    @property
    def settings_key(self) -> str:
        """Of the settings alone."""

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """What is read, by path."""


def is_finished(plan: Planned, out: Path) -> bool:
    """Whether `out` is the plan's result; inputs with changed files are read again."""
    record = read_record(out)
    if record is None:
        return False
    if record.get("fingerprint") == plan.key:
        return True
    inputs = record.get("inputs", {})
    checkpoints = {described(each.path): each for each in plan.checkpoints.values()}
    if record.get("settings") != plan.settings_key or inputs.keys() != checkpoints.keys():
        return False
    return not any(changed_parts(checkpoints[name], known) for name, known in inputs.items())


def _fill(
    plan: MergePlan,
    folder: Path,
    executor: ExecutorName,
    memory: DigestMemory,
    details: Mapping[str, Any],
) -> None:
    """Finish the unfinished output."""
    journal = Journal(folder, plan.layout)
    try:
        done = journal.open(plan.key)
        items = [item for item in range(len(plan.items)) if item not in done]
        if items:
            with Progress(len(plan.items), f"merge by {plan.config.merge_method}") as progress:
                progress.update(len(done))
                contexts = model_contexts(plan.tensors, plan.config.num_workers)
                work = EXECUTORS[executor](plan, folder, items, contexts)
                for _ in journal.record(work):
                    progress.advance()
        write_companions(plan, folder, journal.results, memory, details)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise InputError(
            f"{folder.parent}: no room on the disk: the output takes "
            f"{plan.layout.num_bytes} bytes, {free} are free"
        ) from None
    journal.remove()
