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
from pipelines.hub.offline import ASKED_OFFLINE, is_offline
from ray_jobs.submission.workers import await_workers

POLL_S = 0.5
PROJECT_ROOT = Path(__file__).resolve().parent.parent  # the checkout, or site-packages

# No library sends usage data or waits for a network that may be missing. Models of the hub are
# fetched by Poise alone (pipelines/checkpoints/hub.py), unless the user's HF_HUB_OFFLINE forbids
# it.
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

# A single machine is not preempted, and the watcher process would cost seconds.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
STARTS = 3  # of a local Ray
SLOW_START = "timed out during startup"


def quiet_environment() -> None:
    """Set the variables that keep libraries quiet and offline, unless the user has set them."""
    os.environ.setdefault(ASKED_OFFLINE, "1" if is_offline() else "0")
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # When transformers saves, it loads DeepSpeed, which warns on machines without a GPU.
    logging.getLogger("DeepSpeed").disabled = True


def _started(**options: Any) -> None:
    """`ray.init`, again where a node was not up in Ray's 30 s, as on a busy machine."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises no narrower one
            if SLOW_START not in str(error) or not left:
                raise
            ray.shutdown()


@contextmanager
def ray_session(num_cpus: int | None = None, *, log_to_driver: bool = False) -> Iterator[None]:
    """Ray during the block.

    Uses the Ray that already runs in this process, or the cluster in `RAY_ADDRESS`; else it starts
    a local Ray with `num_cpus` (default: this machine's cores, at least 2) and stops it at the end,
    also after Ctrl-C. Workers import this project from the driver's path.

    Raises:
        InputError: the head in `RAY_ADDRESS` does not answer, or POISE_WORKERS is no JSON.
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
        _started(
            address=None if joins else "local",
            num_cpus=None if joins else num_cpus or max(2, os.cpu_count() or 1),
            include_dashboard=None if joins else False,
            runtime_env=None if joins else {"env_vars": worker_environment() | LOCAL_ENVIRONMENT},
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
            configure_logging=False,
        )
    try:
        if joins:
            await_workers()
        with nullcontext() if joins else told_of_a_loss():
            yield
    finally:
        ray.shutdown()


def kill_local_ray() -> None:
    """End the processes of the Ray that this process has started, without their leave."""
    kill = getattr(_local_node(), "kill_all_processes", None)
    if kill is not None and not os.environ.get("RAY_ADDRESS"):
        kill(check_alive=False, allow_graceful=False)


@contextmanager
def told_of_a_loss() -> Iterator[None]:
    """Print a message if one of Ray's local processes dies in the block, because seconds later Ray
    ends this process with status 1 and without advice.
    """
    ended = threading.Event()
    dead_processes = getattr(_local_node(), "dead_processes", list)

    def watch() -> None:
        while not ended.wait(POLL_S):
            for name, process in dead_processes():
                print(
                    f"poise: Ray's own process {name} (pid {process.pid}) has died; if this "
                    "command ends, run it again to continue",
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
    """Raise InputError if nothing listens at host:port; Ray itself would wait for minutes."""
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
    """In the block, Ray's native code starts without writing to the terminal (except fatal errors).

    It logs every actor of Ray Data as an error, and writes its log level directly to the file
    descriptor. Errors that stop Ray still raise exceptions.
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
    """Environment of the workers: quiet, and with the import paths of the project."""
    paths = [str(PROJECT_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    quiet = {name: os.environ.get(name, value) for name, value in QUIET_ENVIRONMENT.items()}
    quiet[ASKED_OFFLINE] = "1" if is_offline() else "0"
    return {**quiet, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def log_directory() -> str:
    """The folder of the running Ray's logs; empty if it is unknown."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    path_of_session = getattr(_local_node(), "get_session_dir_path", None)
    return str(Path(path_of_session()) / "logs") if path_of_session else ""


def _local_node() -> Any:
    """Ray's private object for its processes on this machine; None if a release of Ray keeps it
    elsewhere (callers must work without it).
    """
    import ray

    worker = getattr(getattr(ray, "_private", None), "worker", None)
    return getattr(worker, "_global_node", None)
