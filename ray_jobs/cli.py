"""The command `poise`: parse arguments, call one entry point, turn errors into exit statuses."""

import os
import sys
import tempfile
import traceback

import typer

from pipelines.errors import InputError
from ray_jobs.commands import (
    clusters,
    measuring,
    merging,
    searching,
    serving,
    stories,
    training,
)
from ray_jobs.session import log_directory, quiet_environment

INTERRUPTED = 130
app = typer.Typer(
    name="poise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Align, merge, evaluate and serve language models on Ray, to improve one strength without "
    "losing another. Start with `poise demo`.",
)
ROOMS = {  # what `poise --help` puts together
    "Whole runs": stories,
    "Train": training,
    "Merge": merging,
    "Measure": measuring,
    "Search": searching,
    "Serve": serving,
    "On clusters": clusters,
}
for title, room in ROOMS.items():
    for command in room.app.registered_commands:
        command.rich_help_panel = title
        app.registered_commands.append(command)


def main() -> None:
    """Run the command line and exit: 0 for success, 2 for bad input, 130 after Ctrl-C, else 1."""
    quiet_environment()
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer returns this after Ctrl-C
            raise KeyboardInterrupt
        if status:  # of a command that did a part of its work
            sys.exit(status)
    except InputError as error:
        _stop(f"poise: {error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _stop("poise: interrupted; run the same command again to go on", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own usage errors
            error.show()
            sys.exit(error.exit_code)
        place = _write_log(error)
        first = (str(error).strip().splitlines() or [""])[0]
        _stop(f"poise: {type(error).__name__}: {first[:300]}\npoise: log: {place}", 1)


def _stop(message: str, status: int) -> None:
    """Print a message and exit with `status`."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _write_log(error: Exception) -> str:
    """Write the traceback to a file; returns its path, and the folder of Ray's logs if known."""
    ray_logs = log_directory()
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"poise-{os.getpid()}-", suffix=".log", delete=False
    ) as file:
        file.writelines(traceback.format_exception(error))
    return f"{file.name}, Ray's: {ray_logs}" if ray_logs else file.name


if __name__ == "__main__":
    main()
