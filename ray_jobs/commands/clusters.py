"""Jobs on clusters."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import InputError
from ray_jobs.commands.options import AFTER_DASHES, Address, AsJson, CommandAfterDashes

app = typer.Typer()


@app.command(
    cls=CommandAfterDashes,
    epilog="Example: `poise submit http://head:8265 -- poise merge /shared/ties.yaml ties "
    "storage=/shared/runs`",
)
def submit(
    context: typer.Context,
    address: Address = None,
    attach: Annotated[
        str | None, typer.Option(metavar="ID", help="follow this job instead of submitting one")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="that the command itself needs")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="that the command itself needs")] = 0,
    memory: Annotated[float, typer.Option(min=0, help="GB that the command itself needs")] = 0,
    resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="of your own; repeatable")
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="to await for its workers, as GPU=8; repeatable"),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="submit although no node could run it now")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job")] = False,
    working_dir: Annotated[Path, typer.Option(help="what the job takes along")] = Path(),
    limit_mb: Annotated[int, typer.Option(min=1, max=500, help="of what it takes along")] = 100,
) -> None:
    """Run a command, after `--`, on a cluster as a Ray job; ends with the command's own status."""
    from ray_jobs.submission.look import Asked
    from ray_jobs.submit import Manner, amounts, run_attach, run_submit, whole_amounts

    command = context.meta[AFTER_DASHES]
    if (attach is None) == (not command):
        raise InputError("submit: give either -- COMMAND... or --attach ID")
    if attach is not None:
        sys.exit(run_attach(address, attach))  # typer would take 130 for a Ctrl-C of its own
    asked = Asked(cpus, gpus, memory, amounts("--resource", resource or []))
    needed = whole_amounts("--workers", workers or [])
    manner = Manner(working_dir, limit_mb, needed, wait=wait, detach=detach)
    sys.exit(run_submit(address, command, asked, manner))


@app.command(epilog="Example: `poise jobs` or `poise jobs stop poise-12ab`")
def jobs(
    action: Annotated[str | None, typer.Argument(metavar="[stop]")] = None,
    job: Annotated[str | None, typer.Argument(metavar="[ID]")] = None,
    address: Annotated[str | None, typer.Option(help="of the head, as http://HOST:8265")] = None,
    as_json: AsJson = False,
) -> None:
    """The jobs of a cluster; `stop ID` ends one."""
    from ray_jobs.jobs import run_jobs

    run_jobs(action, job, address, as_json=as_json)
