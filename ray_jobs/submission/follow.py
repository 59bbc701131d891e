"""Following a job to its end, over cuts of the connection, and the exit status that tells how it
ended.
"""

import sys
import time
from typing import TYPE_CHECKING

from ray_jobs.submission.head import Head, NoSuchJobError, UnreachableError, tell

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

# A command that ends by itself passes its own status on; these say that it could not.
STOPPED = 120  # by `poise jobs stop`, Ctrl-C or Ray's dashboard
LOST = 121  # its machine, or Ray's process beside it, died; or the head has forgotten it
NEVER_STARTED = 122  # no place in time, or its environment could not be made
UNKNOWN = 123  # the head does not answer; the job may still run
LEFT = 130  # Ctrl-C, and the job goes on

POLL_S = 1.0
REMIND_S = 30.0
KILLED_BY = 128  # a shell's status of a command that a signal ended, less the signal's number

DIED = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")


class Log:
    """A job's log on stdout. After a cut it comes again from its beginning; what was printed is
    skipped.
    """

    def __init__(self) -> None:
        self._printed = 0
        self._position = 0

    def rewind(self) -> None:
        """The next piece is the log's first."""
        self._position = 0

    def write(self, piece: str) -> None:
        """Print what is new of the log's next piece."""
        new = piece[max(0, self._printed - self._position) :]
        self._position += len(piece)
        self._printed = max(self._printed, self._position)
        sys.stdout.write(new)
        sys.stdout.flush()


def follow(head: Head, job: str, log: Log | None = None) -> int:
    """Print a job's log until it ends; returns the exit status, after a line that explains it
    unless it is 0.
    """
    log = log or Log()
    known = False
    waits = _Waits(job)
    try:
        while True:
            details = head.details(job)
            known = True
            if details.status == "PENDING":
                waits.tell(details.message or "")
                time.sleep(POLL_S)
                continue
            waits.over()
            log.rewind()
            if details.status.is_terminal():
                log.write(head.logs(job))
                status, line = ending(details)
                if line:
                    tell(f"{job}: {line}; exit status {status}")
                return status
            began = time.monotonic()
            head.tail(job, log.write)
            if time.monotonic() - began < POLL_S:  # a log that cannot be read ends at once
                time.sleep(POLL_S)
    except NoSuchJobError:
        if not known:
            raise
        tell(f"{job}: lost: the head no longer knows it; exit status {LOST}")
        return LOST
    except UnreachableError as error:
        tell(f"{error}; the job may still run; exit status {UNKNOWN}")
        tell_how(head, job, stop=False)
        return UNKNOWN


def ending(details: "JobDetails") -> tuple[int, str]:
    """The exit status of a job that has ended, and what it means, empty for success."""
    if details.status == "SUCCEEDED":
        return 0, ""
    if details.status == "STOPPED":
        return STOPPED, "stopped"
    code = details.driver_exit_code
    if code is not None and details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        if code < 0:
            return KILLED_BY - code, f"failed: the command was ended by signal {-code}"
        return code, "failed: the command's own status"
    why = (details.message or "no reason given").strip().splitlines()[0][:300]
    if details.error_type in DIED or details.driver_node_id is not None:
        return LOST, f"lost: {why}"
    return NEVER_STARTED, f"never started: {why}"


def tell_how(head: Head, job: str, *, stop: bool = True) -> None:
    """Print how to come back to a job, and how to stop it."""
    tell(f"to follow it: poise submit {head.address} --attach {job}")
    if stop:
        tell(f"to stop it: poise jobs stop {job} --address {head.address}")


class _Waits:
    """Says that a job waits, at first and every `REMIND_S`."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._began = time.monotonic()
        self._told: float | None = None

    def tell(self, message: str) -> None:
        """Call this as often as the job is seen to wait."""
        now = time.monotonic()
        if self._told is None or now - self._told > REMIND_S:
            self._told = now
            why = message.replace("Job has not started yet.", "").strip()
            tell(f"{self._job}: waiting, {now - self._began:.0f} s now. {why}".rstrip())

    def over(self) -> None:
        """The job runs."""
        if self._told is not None:
            tell(f"{self._job}: started after {time.monotonic() - self._began:.0f} s")
            self._told = None
