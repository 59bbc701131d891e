"""`poise submit`: run a command on a cluster as a Ray job, and follow it to its end."""

import json
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import InputError
from pipelines.versions import versions
from ray_jobs.submission import workers
from ray_jobs.submission.follow import LEFT, UNKNOWN, Log, follow, tell_how
from ray_jobs.submission.head import (
    Head,
    NoSuchJobError,
    UnreachableError,
    connect,
    head_address,
    tell,
)
from ray_jobs.submission.look import (
    Asked,
    as_run_there,
    check_command,
    check_room,
    check_workers,
    look,
)
from ray_jobs.submission.package import measure


@dataclass(frozen=True, slots=True)
class Manner:
    """How a command is submitted.

    Args:
        folder: the job's working directory, here.
        limit_mb: the largest size of what is sent of it, in MB.
        workers: resources that the cluster shall have before the command begins.
        wait: submit although no node could run the command now.
        detach: end once the job is submitted.
    """

    folder: Path
    limit_mb: int
    workers: Mapping[str, int] = field(default_factory=dict)
    wait: bool = False
    detach: bool = False


def amounts(option: str, given: list[str]) -> dict[str, float]:
    """Resources by name, of `NAME=N` each.

    Raises:
        InputError: another form; it names the option.
    """
    found = {}
    for text in given:
        name, _, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise InputError(f"{option}: found {text!r}; allowed: NAME=N, as accelerator:L4=1")
    return found


def whole_amounts(option: str, given: list[str]) -> dict[str, int]:
    """The same in whole numbers.

    Raises:
        InputError: as `amounts`, or a fraction.
    """
    found = amounts(option, given)
    for name, amount in found.items():
        if amount != int(amount):
            raise InputError(f"{option}: found {name}={amount:g}; allowed: whole numbers")
    return {name: int(amount) for name, amount in found.items()}


def run_submit(address: str | None, command: list[str], asked: Asked, manner: Manner) -> int:
    """Submit a command; returns the exit status that `follow` tells of, 0 if detached.

    Raises:
        InputError: nothing was submitted, for a reason in the message.
    """
    head = connect(head_address(address))
    package = measure(manner.folder, manner.limit_mb)
    tell(
        f"sending {len(package.sizes)} files, {package.num_bytes / 1e6:.1f} MB, of {package.folder}"
    )
    environment = package.environment()
    try:
        found = look(head, environment)
    except UnreachableError as error:
        raise InputError(f"{error}; nothing was submitted") from None
    check_command(command, found)
    waits_for = check_room(asked, found, wait=manner.wait)
    check_workers(manner.workers, found, wait=manner.wait)
    line, variables = as_run_there(command, found)
    if manner.workers:
        variables[workers.VARIABLE] = json.dumps(dict(manner.workers))
    if waits_for:
        tell(waits_for)
    job = f"poise-{secrets.token_hex(6)}"
    settings = {
        "entrypoint": line,
        "runtime_env": environment | ({"env_vars": variables} if variables else {}),
        "metadata": {"poise": versions().get("poise", "unknown")},
        **asked.settings(),
    }
    try:
        head.submit(job, **settings)
    except KeyboardInterrupt:
        tell(f"{job}: interrupted while it was submitted")
        tell_how(head, job)
        return LEFT
    except UnreachableError as error:
        tell(f"{error}; the job may have been submitted")
        tell_how(head, job)
        return UNKNOWN
    tell(f"{job}: submitted")
    if manner.detach:
        tell_how(head, job)
        return 0
    return _followed(head, job)


def run_attach(address: str | None, job: str) -> int:
    """Follow a job that was submitted before, from the beginning of its log.

    Raises:
        InputError: the head does not know it.
    """
    head = connect(head_address(address))
    try:
        return _followed(head, job)
    except NoSuchJobError:
        raise InputError(
            f"--attach: found {job}, which {head.address} does not know; allowed: a job of "
            "`poise jobs`"
        ) from None


def _followed(head: Head, job: str) -> int:
    """Follow a job; Ctrl-C asks what to do with it, where there is somebody to ask."""
    log = Log()
    while True:
        try:
            return follow(head, job, log)
        except KeyboardInterrupt:
            answer = _asked_what_to_do(job)
        if answer == "leave":
            tell(f"{job}: goes on; exit status {LEFT}")
            tell_how(head, job)
            return LEFT
        if answer == "stop":
            with suppress(UnreachableError):  # which `follow` tells of
                head.stop(job)
            tell(f"{job}: asked to stop")


def _asked_what_to_do(job: str) -> str:
    """`stop`, `leave` or `follow`; without a terminal, and after a second Ctrl-C, `leave`."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "leave"
    try:
        print(f"\npoise: {job}: [s]top it, [l]eave it running, or [f]ollow on? ", file=sys.stderr)
        answer = sys.stdin.readline().strip().lower()
    except KeyboardInterrupt:
        return "leave"
    return {"s": "stop", "f": "follow"}.get(answer[:1], "leave")
