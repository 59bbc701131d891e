"""One Ray session for a command: join the user's cluster, or start a local one and stop it."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipelines.errors import InputError

POLL_S = 0.5
PROJECT_ROOT = Path(__file__).resolve().parent.parent  # of a checkout; site-packages once installed

# Nothing phones home, and nothing waits for a network that may not be there.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOGGING_CONFIG": str(PROJECT_ROOT / "ray_jobs" / "ray_data_logging.yaml"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

# One machine is not taken away in parts, and the process that would watch for it costs seconds.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def quiet_environment() -> None:
    """Set the variables that keep libraries quiet and offline, where the user has not set them."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # transformers loads DeepSpeed on saving, which then warns of every machine without a GPU.
    logging.getLogger("DeepSpeed").disabled = True


@contextmanager
def ray_session(num_cpus: int | None = None, *, log_to_driver: bool = False) -> Iterator[None]:
    """Ray for the length of the block.

    Joins the cluster in `RAY_ADDRESS` if there is one, or the session that already runs in this
    process; else starts a local one with `num_cpus` (default: this machine's cores, at least 2)
    and stops it at the end, also after Ctrl-C. Workers import this project from where the driver
    does.

    Raises:
        InputError: `RAY_ADDRESS` names a head that does not answer.
    """
    quiet_environment()
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if joins:
        check_head(os.environ["RAY_ADDRESS"])
    with _native_logs_off_the_terminal():
        ray.init(
            address=None if joins else "local",
            num_cpus=None if joins else num_cpus or max(2, os.cpu_count() or 1),
            include_dashboard=None if joins else False,
            runtime_env=None if joins else {"env_vars": worker_environment() | LOCAL_ENVIRONMENT},
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
            configure_logging=False,
        )
    try:
        with nullcontext() if joins else told_of_a_loss():
            yield
    finally:
        ray.shutdown()


@contextmanager
def told_of_a_loss() -> Iterator[None]:
    """Say so where one of the processes that Ray has started here dies in the block: seconds later
    Ray ends this process, with status 1 and without a word that says what to do.
    """
    ended = threading.Event()
    dead_processes = getattr(_local_node(), "dead_processes", list)

    def watch() -> None:
        while not ended.wait(POLL_S):
            for name, process in dead_processes():
                print(
                    f"poise: Ray's own process {name} (pid {process.pid}) has died; if this "
                    "command ends, the same command again goes on",
                    file=sys.stderr,
                )
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_head(address: str) -> None:
    """Raise InputError if nobody listens at host:port; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"RAY_ADDRESS: {address}: no Ray head answers there: {reason}") from None


@contextmanager
def _native_logs_off_the_terminal() -> Iterator[None]:
    """Start Ray's native part so that only fatal errors of it reach the terminal.

    It calls every actor of Ray Data an error; and it announces the level it was asked for, on the
    file descriptor itself. Errors that stop Ray come as exceptions all the same.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def worker_environment() -> dict[str, str]:
    """Environment of the workers: quiet, and able to import the project and what it uses."""
    paths = [str(PROJECT_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    quiet = {name: os.environ.get(name, value) for name, value in QUIET_ENVIRONMENT.items()}
    return {**quiet, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def log_directory() -> str:
    """Where the running Ray session writes its logs; empty when there is none, or none is told."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    path_of_session = getattr(_local_node(), "get_session_dir_path", None)
    return str(Path(path_of_session()) / "logs") if path_of_session else ""


def _local_node() -> Any:
    """Ray's own object for its processes on this machine, which no public name leads to.

    None where a release of Ray keeps it elsewhere: its users then go without what it tells.
    """
    import ray

    worker = getattr(getattr(ray, "_private", None), "worker", None)
    return getattr(worker, "_global_node", None)
