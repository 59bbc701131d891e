"""`poise serve`: checkpoints through an OpenAI-compatible API with Ray Serve and vLLM."""

import errno
import json
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.errors import InputError
from pipelines.serve import (
    ServedModel,
    build_app,
    check_servable,
    engine_device,
    find_models,
    needed_resources,
)
from ray_jobs.session import quiet_environment, ray_session, worker_environment

APPLICATION = "poise"
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A server on any other host is open to everyone who can reach it.
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Libraries with long progress logs; their errors are still shown.
_TALKATIVE = ("ray.serve", "vllm", "httpx")


def run_serve(paths: list[Path], *, host: str, port: int) -> None:
    """Serve the models until Ctrl-C or SIGTERM.

    When all models answer, one line with the address and a `curl` command goes to stdout. In a
    cluster (`RAY_ADDRESS`) the API listens on the head node, and the models' folders must be
    readable on every node.

    Raises:
        InputError: an incomplete chat checkpoint, two with the same name, a taken port, vLLM not
            installed, fewer GPUs than models, or a cluster that already runs Ray Serve.
    """
    quiet_environment()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    _quiet_loggers()
    models = find_models(paths)
    device = engine_device()
    _check_port(host, port)
    if host not in _LOOPBACK:
        _say(f"note: listening on {host} without authentication")
    check_servable(models, device)
    needed = needed_resources(models, device)
    num_cpus = max(math.ceil(needed["CPU"]), os.cpu_count() or 1)
    stdout = sys.stdout
    # Ray prints its own notices, which do not belong on stdout.
    with redirect_stdout(sys.stderr), ray_session(num_cpus=num_cpus), _sigterm_as_interrupt():
        _check_resources(needed)
        with _serve_instance(host, port):
            start = time.monotonic()
            _say(f"loading {', '.join(m.name for m in models)} (about a minute on a CPU)")
            _deploy(build_app(models, device, worker_environment()))
            _say(f"ready after {time.monotonic() - start:.0f} s; Ctrl-C stops it")
            ready = f"serving {_url(host, port)}  try: {_curl(host, port, models[0])}"
            print(ready, file=stdout, flush=True)
            _wait_for_interrupt()
            _say("stopping")


def _quiet_loggers() -> None:
    """Call it before and after the libraries are imported: importing Serve resets its log level."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_port(host: str, port: int) -> None:
    """Bind the port for a moment, so that a problem is found now, not after a minute of loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise InputError(f"--host {host}: {error.strerror}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"--port {port}: taken on {host}; choose another") from None
            raise InputError(f"--host {host} --port {port}: {error.strerror}") from None


def _check_resources(needed: dict[str, float]) -> None:
    """Check Ray's resources, because a request for missing ones waits forever. In a cluster, which
    may grow, a note is printed.

    Raises:
        InputError: this machine has fewer GPUs than models.
    """
    import ray

    there = ray.cluster_resources()
    for name, amount in needed.items():
        if there.get(name, 0) >= amount:
            continue
        text = f"needs {amount:g} {name}, Ray has {there.get(name, 0):g}"
        if os.environ.get("RAY_ADDRESS"):
            _say(f"note: {text}; waiting for the cluster to grow")
        else:
            raise InputError(f"serve: {text}; serve fewer models together")


@contextmanager
def _serve_instance(host: str, port: int) -> Iterator[None]:
    """Ray Serve with its HTTP proxy on the head node; it is shut down completely at the end.

    Raises:
        InputError: the cluster already runs Ray Serve, whose address cannot be changed.
    """
    from ray import serve

    _quiet_loggers()
    if serve.status().proxies:
        raise InputError("serve: Ray Serve already runs in this cluster; stop it first")
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        yield
    finally:
        # A second Ctrl-C must not interrupt the shutdown and leave actors behind.
        handlers = {name: signal.signal(name, signal.SIG_IGN) for name in _ENDING_SIGNALS}
        serve.shutdown()
        for name, handler in handlers.items():
            signal.signal(name, handler)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """In the block, SIGTERM acts like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _deploy(app: Any) -> None:
    """Start the application and wait until every model answers."""
    from ray import serve

    serve.run(app, name=APPLICATION, route_prefix="/")


def _wait_for_interrupt() -> None:
    """Sleep until Ctrl-C or SIGTERM, the normal end of a server."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _curl(host: str, port: int, model: ServedModel) -> str:
    """A request to paste into a shell; greedy, as in `poise evaluate`."""
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": model.name, "messages": messages, "temperature": 0}
    return (
        f"curl -s {_url(host, port)}/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def _say(text: str) -> None:
    print(f"poise serve: {text}", file=sys.stderr, flush=True)
