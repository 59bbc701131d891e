"""`poise jobs`: the jobs of a cluster, and an end to one of them."""

import json
from datetime import datetime
from typing import Any

from rich.table import Table

from pipelines.errors import InputError
from ray_jobs.submission.follow import ending
from ray_jobs.submission.head import Head, NoSuchJobError, UnreachableError, connect, head_address
from ray_jobs.submission.look import LOOKS
from ray_jobs.tables import print_table


def run_jobs(action: str | None, job: str | None, address: str | None, *, as_json: bool) -> None:
    """List the jobs, or stop one.

    Raises:
        InputError: an action that there is not, a job that the head does not know, or no head.
    """
    if action not in (None, "stop") or (action == "stop") != (job is not None):
        given = " ".join(filter(None, (action, job)))
        raise InputError(f"jobs: found {given!r}; allowed: nothing, to list them, or stop ID")
    head = connect(head_address(address))
    try:
        if job is not None:
            _stop(head, job)
        else:
            _list(head, as_json)
    except NoSuchJobError:
        raise InputError(f"{head.address}: knows no job {job}; see `poise jobs`") from None
    except UnreachableError as error:
        raise InputError(str(error)) from None


def _stop(head: Head, job: str) -> None:
    details = head.details(job)
    if details.status.is_terminal():
        print(f"{job}: has ended already: {details.status}")
        return
    head.stop(job)
    waits = details.status == "PENDING"
    print(f"{job}: asked to stop" + (", which it does once it has a place" if waits else ""))


def _list(head: Head, as_json: bool) -> None:
    jobs = head.call(lambda client: client.list_jobs())
    rows = [
        _row(details)
        for details in jobs
        if details.type == "SUBMISSION" and not details.submission_id.startswith(LOOKS)
    ]
    rows.sort(key=lambda row: row["started"] or "")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("job", "state", "exit status", "started", "seconds", "command")
    for row in rows:
        shown = [row[name] for name in ("job", "state", "status", "started", "seconds", "command")]
        table.add_row(*("" if value is None else str(value) for value in shown))
    print_table(table)


def _row(details: Any) -> dict[str, Any]:
    ended = details.status.is_terminal()
    seconds = (details.end_time - details.start_time) / 1000 if details.end_time else None
    start = datetime.fromtimestamp(details.start_time / 1000) if details.start_time else None
    return {
        "job": details.submission_id,
        "state": "WAITING" if details.status == "PENDING" else str(details.status),
        "status": ending(details)[0] if ended else None,
        "started": start.isoformat(sep=" ", timespec="seconds") if start else None,
        "seconds": None if seconds is None else round(seconds),
        "command": details.entrypoint,
    }
