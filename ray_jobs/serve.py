"""`poise serve`: answers and rewards of checkpoints over HTTP, with Ray Serve."""

import errno
import io
import json
import logging
import math
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.config import apply_overrides, check, load_config
from pipelines.errors import InputError
from pipelines.serve import ServeConfig, ServerPlan, find_models, needed_resources, plan_server
from pipelines.serve.app import targets
from pipelines.serve.keys import DEPLOY_VARIABLE, keys_in_environment
from ray_jobs.session import quiet_environment, ray_session, worker_environment

# Serve looks at its proxy every ten seconds and waits for three misses, in which nobody is heard.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2"}
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A server on any other host is open to everyone who can reach it.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Libraries with long progress logs; their errors are still shown.
_TALKATIVE = ("ray.serve", "vllm", "httpx")


def run_serve(paths: list[Path], overrides: Sequence[str] = (), *, host: str, port: int) -> None:
    """Serve models until Ctrl-C or SIGTERM; requests under way are answered then.

    When all models answer, one line with the address and a `curl` command goes to stdout. In a
    cluster (`RAY_ADDRESS`) the API listens on the head node, and the models' folders must be
    readable on every node.

    Args:
        paths: checkpoints, which are served under their names; or one config, a YAML file.
        overrides: of the config's fields.

    Raises:
        InputError: an incomplete checkpoint, two with the same name, a taken port, vLLM not
            installed, too little memory, fewer GPUs than engines, or a cluster that already runs
            Ray Serve.
    """
    quiet_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _quiet_loggers()
    with _config_of(paths, overrides) as config:
        keys, deploy_keys = keys_in_environment(), keys_in_environment(DEPLOY_VARIABLE)
        _check_port(host, port)
        plan = plan_server(config)
        if host not in LOOPBACK and not keys and config.keys_file is None:
            _say(f"note: listening on {host} without authentication")
        for note in plan.notes:
            _say(f"note: {note}")
        _serve(plan, keys, deploy_keys, host, port)


def _serve(
    plan: ServerPlan,
    keys: dict[str, bytes],
    deploy_keys: dict[str, bytes],
    host: str,
    port: int,
) -> None:
    """Start everything, wait for the end, stop everything."""
    spare = 0 if plan.config.deploy is None else plan.config.deploy.spare_engines
    needed = needed_resources(plan.groups, spare)
    num_cpus = max(math.ceil(needed["CPU"]), os.cpu_count() or 1)
    stdout = sys.stdout
    # Ray prints its own notices, which do not belong on stdout.
    with (
        redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory(prefix="poise-cores-") as locks,
        ray_session(num_cpus=num_cpus),
        _sigterm_as_interrupt(),
    ):
        _check_resources(needed)
        with _serve_instance(host, port):
            start = time.monotonic()
            names = list(plan.config.models)
            _say(f"loading {', '.join(names)} (about a minute with vLLM on a CPU)")
            gateway = _deploy(targets(plan, keys, deploy_keys, locks, worker_environment()))
            _say(f"ready after {time.monotonic() - start:.0f} s; Ctrl-C stops it")
            ready = f"serving {_url(host, port)}  try: {_curl(host, port, plan)}"
            print(ready, file=stdout, flush=True)
            _wait_for_interrupt()
            _drain(gateway, plan.config.limits.grace_s)


@contextmanager
def _config_of(paths: list[Path], overrides: Sequence[str]) -> Iterator[ServeConfig]:
    """The config that the arguments mean: a file, or checkpoints, whose server keeps nothing."""
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        yield load_config(paths[0], ServeConfig, overrides)
        return
    models = {model.name: {"path": str(model.path)} for model in find_models(paths)}
    with tempfile.TemporaryDirectory(prefix="poise-serve-") as folder:
        values = apply_overrides({"models": models, "state": folder}, overrides)
        yield check(values, ServeConfig, "serve")


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
        # What Ray says of actors that are ended here is of no use.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
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


def _deploy(applications: list[Any]) -> Any:
    """Start the applications and wait until every model answers; returns the gateway's handle."""
    from ray import serve

    *_, gateway = serve.run_many(applications)
    while gateway.without_engine.remote().result(timeout_s=60):
        time.sleep(0.1)
    return gateway


def _drain(gateway: Any, grace_s: float) -> None:
    """Take no new requests and wait until those under way are answered."""
    _say("stopping")
    try:
        left = gateway.drain.remote(grace_s).result(timeout_s=grace_s + 10)
    except KeyboardInterrupt:  # asked for twice: at once
        return
    except Exception as error:  # a gateway that has died has nothing under way
        _say(f"note: the gateway does not answer ({type(error).__name__})")
        return
    if left:
        _say(f"note: {left} requests were not answered within {grace_s:g} s")


def _wait_for_interrupt() -> None:
    """Sleep until Ctrl-C or SIGTERM, the normal end of a server."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _curl(host: str, port: int, plan: ServerPlan) -> str:
    """A request to paste into a shell; answers are greedy, as in `poise evaluate`."""
    [(name, model), *_] = plan.config.models.items()
    messages = [{"role": "user", "content": "hello"}]
    body: dict[str, Any] = {"model": name, "messages": messages}
    route = "rewards"
    if model.kind == "generate":
        body["temperature"] = 0
        route = "chat/completions"
    else:
        messages.append({"role": "assistant", "content": "hello"})
    key = ' -H "Authorization: Bearer $KEY"' if plan.config.keys_file is not None else ""
    return (
        f"curl -s {_url(host, port)}/{route}{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def _say(text: str) -> None:
    print(f"poise serve: {text}", file=sys.stderr, flush=True)
