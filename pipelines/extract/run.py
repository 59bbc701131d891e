"""Run an extraction: plan, finish the open items, commit."""

import errno
import shutil
from pathlib import Path
from typing import Any

from pipelines.checkpoints import OutputLayout
from pipelines.checkpoints.digests import DigestMemory
from pipelines.commit import commit_directory, lock, make_folder, partial_path, refuse_existing
from pipelines.errors import InputError
from pipelines.extract.adapter import Outcome, write_adapter
from pipelines.extract.plan import ExtractConfig, ExtractPlan, plan_extraction
from pipelines.extract.worker import FACTORS, ExtractWorker
from pipelines.merge.journal import Journal
from pipelines.merge.run import is_finished, refuse_inputs
from pipelines.progress import Progress
from pipelines.provenance import read_record


def extract(
    config: ExtractConfig, out: str | Path, *, force: bool = False, strict: bool = False
) -> Path:
    """Write the low-rank adapter for the difference of two checkpoints into `out`, which gets its
    name when it is complete.

    An interrupted extraction resumes. A finished `out` with the same config and inputs is kept. The
    same inputs give the same bytes on one machine with the same number of threads.

    Args:
        force: replace an `out` with other content.
        strict: refuse if a tensor changed that the adapter does not hold.

    Raises:
        InputError: models that do not fit together, no changed linear layer, another run into
            `out`, an `out` with other content while `force` is false, or a change that `strict`
            refuses.
    """
    return extract_planned(plan_extraction(config), out, force=force, strict=strict)


def extract_planned(
    plan: ExtractPlan, out: str | Path, *, force: bool = False, strict: bool = False
) -> Path:
    """As `extract`, for a plan."""
    out = Path(out).absolute()
    refuse_inputs(out, plan.checkpoints, "extraction")
    if not force and is_finished(plan, out):
        record = read_record(out) or {}
        if strict:
            _check_strict(record["left_out"], plan)
        return out
    refuse_existing(out, force=force)
    folder = partial_path(out)
    make_folder(folder)
    with lock(folder):
        try:
            _fill(plan, folder, strict=strict)
        except InputError:
            shutil.rmtree(folder)  # the inputs must change, so its content is useless
            raise
        commit_directory(folder, out, force=force)
    return out


def _fill(plan: ExtractPlan, folder: Path, *, strict: bool) -> None:
    """Finish the unfinished output."""
    journal = Journal(folder, OutputLayout({}, {}, {}))  # factors have their own files
    try:
        done = journal.open(plan.key)
        (folder / FACTORS).mkdir(exist_ok=True)
        worker = ExtractWorker(plan, folder)
        matrices = [n for n, item in enumerate(plan.items) if item.role == "factors"]
        streamed = [n for n in range(len(plan.items)) if n not in matrices]
        with Progress(len(plan.items), "extract factors") as progress:
            progress.update(len(done))
            for part in (streamed, matrices):  # left-out changes are known before the slow part
                waiting = [number for number in part if number not in done]
                for _ in journal.record(map(worker.run, waiting)):
                    progress.advance()
                if strict and part is streamed:
                    _check_strict(Outcome.of(plan, journal.results).left_out, plan)
        outcome = Outcome.of(plan, journal.results)
        _check_anything(outcome)
        write_adapter(outcome, folder, DigestMemory())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder.parent}: no room on the disk") from None
    journal.remove()
    shutil.rmtree(folder / FACTORS)


def _check_strict(left_out: dict[str, Any], plan: ExtractPlan) -> None:
    """Raise InputError if the adapter does not hold every change."""
    kinds = [f"{kind} ({found['tensors']})" for kind, found in left_out.items()]
    kinds += [line.replace(": ", " ", 1) for line in plan.unmatched[:1]]
    if kinds:
        raise InputError(
            f"strict: found changes that the adapter leaves out: {', '.join(kinds)}; allowed: "
            "none, or modules named by --whole"
        )


def _check_anything(outcome: Outcome) -> None:
    """Raise InputError if no linear layer changed: PEFT cannot load an adapter without one."""
    if not outcome.modules:
        config = outcome.plan.config
        raise InputError(
            f"{config.tuned}: no linear layer differs from {config.base}; allowed: at least one"
        )
