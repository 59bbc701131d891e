"""The head of a cluster as `poise submit` sees it: Ray's job server over a connection that may be
cut at any time.

Ray's own client does the talking; here it gets time-outs, repetitions, and errors of one line.
"""

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.errors import InputError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S, ANSWER_S = 5.0, 60.0
PAUSE_S = 1.0
PATIENCE_S = 600.0  # for a head that does not answer; a head is restarted within minutes
BUSY_S = 60.0  # for a head that answers with an error of its own, as one that is starting does
SILENCE_S = 60.0  # after which a quiet log is opened again, since a dead connection is quiet, too

T = TypeVar("T")


class UnreachableError(ConnectionError):
    """The head did not answer for `PATIENCE_S`; its jobs may still run."""


class NoSuchJobError(LookupError):
    """The head knows no job of this name."""


def head_address(given: str | None) -> str:
    """The address of the job server, `http://HOST:PORT`.

    It is the one that is given, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or Ray's default here.

    Raises:
        InputError: an address that is not of HTTP, as RAY_ADDRESS is for a process in a cluster.
    """
    named = {"ADDRESS": given}
    named |= {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    for name, value in named.items():
        if not value:
            continue
        if name == "ADDRESS" and "://" not in value:
            value = f"http://{value}"
        if not re.fullmatch(r"https?://[^/\s]+/*", value):
            raise InputError(
                f"{name}: found {value!r}; allowed: the job server's, as http://HOST:8265 "
                "(give it as ADDRESS)"
            )
        return value.rstrip("/")
    return DEFAULT_ADDRESS


def connect(address: str) -> "Head":
    """The head at an address, which answers and takes our token.

    Raises:
        InputError: nothing answers, something else than Ray does, or the token is refused. No
            message holds the token.
    """
    import requests

    _quiet()
    try:
        return Head(address)
    except InputError:
        raise
    except (ConnectionError, requests.exceptions.ConnectionError, requests.Timeout):
        raise InputError(f"{address}: no Ray head answers there") from None
    except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{address}: no Ray head: {_first_line(error)}") from None


class Head:
    """Ray's job server at `address`; every call is repeated while the connection fails."""

    def __init__(self, address: str) -> None:
        self.address = address
        with _named_in_environment(address):
            self.client = self._refused(lambda: _client_class()(address))

    def call(self, action: Callable[[Any], T]) -> T:
        """The result of an action on Ray's client. It must be harmless to repeat.

        Raises:
            UnreachableError: the connection failed for `PATIENCE_S`.
            NoSuchJobError: the head answers that it does not know the job.
            InputError: the head refuses the token.
            RuntimeError: the head answers with another error.
        """
        began, told = time.monotonic(), False
        while True:
            try:
                result = self._refused(lambda: action(self.client))
            except InputError:
                raise
            except Exception as error:
                patience = _patience_s(error)
                if patience == 0:
                    raise
                if time.monotonic() - began > patience:
                    if patience == BUSY_S:
                        raise
                    raise UnreachableError(
                        f"{self.address}: no answer for {patience:.0f} s"
                    ) from None
            else:
                if told:
                    tell("connected again")
                return result
            if not told and patience == PATIENCE_S:
                tell(f"connection to {self.address} lost; trying again for {PATIENCE_S:.0f} s")
                told = True
            time.sleep(PAUSE_S)

    def _refused(self, action: Callable[[], T]) -> T:
        """The result of an action; Ray's long message of a refused token becomes one line."""
        from ray.exceptions import AuthenticationError

        try:
            return action()
        except AuthenticationError as error:
            asked = "required" in str(error).partition("\n")[0]
            found = "asks for a token, and none was given" if asked else "refuses the token"
            raise InputError(
                f"{self.address}: the head {found}; allowed: RAY_AUTH_MODE=token with the "
                "cluster's token in RAY_AUTH_TOKEN, or in the file of RAY_AUTH_TOKEN_PATH"
            ) from None

    def details(self, job: str) -> "JobDetails":
        """The state of a job; raises as `call`."""
        return self.call(lambda client: client.get_job_info(job))

    def submit(self, job: str, **settings: Any) -> None:
        """Submit a job under a name of ours, so that a repetition cannot start it twice.

        Raises: as `call`.
        """

        def once(client: Any) -> None:
            try:
                client.submit_job(submission_id=job, **settings)
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

        self.call(once)

    def stop(self, job: str) -> bool:
        """Ask a job to stop; False if it does not run. Raises as `call`."""
        return bool(self.call(lambda client: client.stop_job(job)))

    def logs(self, job: str) -> str:
        """All that a job has written; empty where its machine is gone. Raises as `call`."""
        try:
            return str(self.client.get_job_logs(job))
        except RuntimeError:  # the head's answer that the log cannot be read
            return ""
        except Exception:
            return str(self.call(lambda client: client.get_job_logs(job)))

    def tail(self, job: str, write: Callable[[str], None]) -> None:
        """Pass a job's log from its beginning to `write`, as it grows, until the job or the
        connection ends, or the log is silent for `SILENCE_S`: the caller asks for the state.
        """

        async def follow() -> None:
            pieces = self.client.tail_job_logs(job)
            try:
                while (piece := await asyncio.wait_for(anext(pieces, None), SILENCE_S)) is not None:
                    write(piece)
            finally:
                await pieces.aclose()

        try:
            asyncio.run(follow())
        except Exception as error:  # a cut, which the next question about the state tells of
            logging.getLogger(__name__).debug("log of %s: %s", job, error)


def tell(line: str) -> None:
    """Print a line about the job, apart from what the job itself prints on stdout."""
    print(f"poise: {line}", file=sys.stderr, flush=True)


@contextmanager
def _named_in_environment(address: str) -> Iterator[None]:
    """In the block, RAY_API_SERVER_ADDRESS is this address: Ray takes it, or RAY_ADDRESS, before
    any argument.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _quiet() -> None:
    """Take Ray's lines about packing and cuts off the terminal; its modules set their own levels
    when they are loaded.
    """
    from ray._private.runtime_env import packaging, working_dir
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    for module in (packaging, working_dir, dashboard_sdk, sdk):
        logging.getLogger(module.__name__).setLevel(logging.ERROR)


def _client_class() -> Any:
    """Ray's client, which waits for ever, with time-outs."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
            settings.setdefault("timeout", (CONNECT_S, ANSWER_S))
            answer = super()._do_request(method, endpoint, **settings)
            if answer.status_code == 404 and endpoint.startswith("/api/jobs/"):
                raise NoSuchJobError(endpoint.split("/")[3])
            return answer

    return Client


def _patience_s(error: Exception) -> float:
    """How long an action that ended with this error is repeated; 0 if it is not."""
    import requests

    if isinstance(error, requests.RequestException | ConnectionError | TimeoutError):
        return PATIENCE_S
    if re.match(r"Request failed with status code 50[0234]", str(error)):
        return BUSY_S
    return 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
