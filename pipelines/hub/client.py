"""Requests to the hub. They are the only ones that Poise makes: libraries stay offline.

A download goes on where an earlier one ended, and its bytes are compared with the hub's hash before
anyone sees the file.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token

from pipelines.errors import InputError
from pipelines.hub.cache import HubFile, HubName, Listing
from pipelines.versions import versions

CONNECT_S = 3.0  # for each address of the host
CHUNK_BYTES = 1 << 20
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
PAUSES_S = (0.1, 1.0, 3.0)


class HubError(Exception):
    """The hub did not give what it was asked for; the message says why, in one line."""


class UnreachableError(HubError):
    """No answer, or one that may be another later."""


class UnknownRevisionError(HubError):
    """The hub has the model, but not this revision."""


class HubClient:
    """The hub at `HF_ENDPOINT`, asked with the token of the user's login, if there is one."""

    def __init__(self) -> None:
        self.endpoint = constants.ENDPOINT
        agent = f"poise/{versions().get('poise', '0')}"
        headers = {"User-Agent": agent, "Accept-Encoding": "identity"}
        self._token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else _login()
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=CONNECT_S)
        # A redirect to another host, such as the one that stores the files, gets no token.
        self._client = httpx2.Client(headers=headers, follow_redirects=True, timeout=timeout)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look_up(self, name: HubName) -> tuple[str, str]:
        """The commit of a revision, and the id, which is a new one if the model was renamed.

        Raises:
            HubError: the hub cannot be reached, or does not give it.
        """
        revision = quote(name.revision, safe="")
        found = self._json(name, f"{self._api(name)}/revision/{revision}")[0]
        return str(found["sha"]), str(found.get("id", name.id))

    def listing(self, name: HubName) -> Listing:
        """All files of a commit.

        Raises:
            HubError: the hub cannot be reached, or does not give it.
        """
        url: str | None = f"{self._api(name)}/tree/{name.revision}?recursive=true"
        files = {}
        while url is not None:
            entries, url = self._json(name, url)
            for entry in entries:
                if entry["type"] == "file":
                    large = entry.get("lfs")
                    digest = large["oid"] if large else entry["oid"]
                    files[_safe(entry["path"])] = HubFile(int(entry["size"]), _safe(digest))
        return files

    def download(
        self,
        name: HubName,
        place: str,
        file: HubFile,
        target: Path,
        stop: Event,
        told: Callable[[int], object],
    ) -> None:
        """Fetch a file's bytes into `target`, whose beginning may be there from an earlier attempt.

        Args:
            stop: when it is set, the download ends; what came so far stays.
            told: called with the number of bytes that came, negative where some were lost.

        Raises:
            HubError: the hub does not answer any more, or not with the file.
            InputError: the bytes are not those that the hub describes; they are removed.
        """
        prefix = "" if name.kind == "model" else "datasets/"
        url = f"{self.endpoint}/{prefix}{name.id}/resolve/{name.revision}/{quote(place)}"
        target.touch()
        pauses = iter(PAUSES_S)
        while (begin := target.stat().st_size) != file.size and not stop.is_set():
            try:
                self._append(name, url, target, file.size, stop, told)
            except (httpx2.HTTPError, UnreachableError) as error:
                if target.stat().st_size > begin:
                    pauses = iter(PAUSES_S)
                pause = next(pauses, None)
                if pause is None:
                    raise UnreachableError(f"{place}: {_reason(error)}") from None
                time.sleep(pause)
        if not stop.is_set():
            _check(name, place, file, target)

    def _append(
        self,
        name: HubName,
        url: str,
        target: Path,
        size: int,
        stop: Event,
        told: Callable[[int], object],
    ) -> None:
        """One request for the bytes that `target` lacks."""
        begin = target.stat().st_size
        if begin > size:  # of something else
            begin = 0
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        with self._client.stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()
            self._check_status(name, response)
            is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
            if begin and not (response.status_code == 206 and is_rest):
                told(-begin)
                begin = 0
            with target.open("r+b") as out:
                out.truncate(begin)
                out.seek(begin)
                for chunk in response.iter_raw():
                    if stop.is_set():
                        return
                    if out.tell() + len(chunk) > size:
                        raise UnreachableError(f"sent more than {size} bytes")
                    out.write(chunk)
                    told(len(chunk))

    def _api(self, name: HubName) -> str:
        return f"{self.endpoint}/api/{name.kind}s/{name.id}"

    def _json(self, name: HubName, url: str) -> tuple[Any, str | None]:
        """The content of an answer, and the address of its next page."""
        response = self._get(name, url)
        try:
            return response.json(), response.links.get("next", {}).get("url")
        except ValueError:
            raise UnreachableError(f"{self.endpoint} does not answer as a hub") from None

    def _get(self, name: HubName, url: str) -> httpx2.Response:
        """An answer; once more after a pause where it may be another one then."""
        for is_last in (False, True):
            try:
                response = self._client.get(url)
                self._check_status(name, response)
                return response
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
                raise UnreachableError(self._unreachable(error)) from None
            except (httpx2.HTTPError, httpx2.InvalidURL, UnreachableError) as error:
                if is_last or isinstance(error, httpx2.InvalidURL):
                    raise UnreachableError(self._unreachable(error)) from None
            time.sleep(PAUSES_S[1])
        raise AssertionError("unreachable")

    def _unreachable(self, error: Exception) -> str:
        return f"{self.endpoint} cannot be reached ({_reason(error)})"

    def _check_status(self, name: HubName, response: httpx2.Response) -> None:
        """Raise HubError unless an answer is a good one."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status < 400:
            return
        page = f"{self.endpoint}/{'' if name.kind == 'model' else 'datasets/'}{name.id}"
        login = "hf auth login, or HF_TOKEN" if self._token is None else "a token that may read it"
        if status in PASSING_STATUS:
            raise UnreachableError(f"it answers with status {status}")
        if code == "RevisionNotFound":
            raise UnknownRevisionError(
                f"the hub has no revision {name.revision!r} of it; allowed: a branch, a tag or a "
                "commit"
            )
        if code == "GatedRepo":
            raise HubError(f"is gated: {page} says how to get access; then it needs {login}")
        if code == "EntryNotFound":
            raise HubError(f"the hub lacks a file that it lists: {response.url.path}")
        if status == 401 or code == "RepoNotFound":
            raise HubError(
                f"the hub does not know it ({page}), or a private {name.kind} needs {login}"
            )
        said = response.headers.get("X-Error-Message", "which is perhaps a proxy's")
        raise UnreachableError(f"it answers with status {status}, {said}")


def _login() -> str | None:
    """The token of the user's login. One from a browser ends after some days; huggingface_hub
    renews it in its last day, by a request that its being offline would forbid.
    """
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        return get_token()
    finally:
        constants.HF_HUB_OFFLINE = before


def _safe(part: str) -> str:
    """A place or digest from the hub, which must stay below the folder that it is for.

    Raises:
        HubError: it would not.
    """
    path = PurePosixPath(part)
    if path.is_absolute() or ".." in path.parts or "\\" in part or not path.parts:
        raise HubError(f"the hub lists a file {part!r}, which leads out of its folder")
    return part


def _check(name: HubName, place: str, file: HubFile, target: Path) -> None:
    """Compare a file with the hub's hash, and remove it if it is another one.

    Raises:
        InputError: it is another one.
    """
    if len(file.digest) == 64:
        hasher = hashlib.sha256()
    else:  # as git hashes a file
        hasher = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with target.open("rb") as content:
        for chunk in _chunks(content):
            hasher.update(chunk)
        os.fsync(content.fileno())
    if hasher.hexdigest() != file.digest:
        target.unlink()
        raise InputError(
            f"{name.kind} {name}: {place}: came with hash {hasher.hexdigest()}; allowed: "
            f"{file.digest}, as the hub describes it; run the same command again to fetch it anew"
        )


def _chunks(content: Any) -> Iterator[bytes]:
    while chunk := content.read(CHUNK_BYTES):
        yield chunk


def _reason(error: Exception) -> str:
    """An error's first line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
