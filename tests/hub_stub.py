"""A small hub on loopback: the addresses, headers and errors of the real one that a download needs.

The large files (safetensors, Parquet) are stored elsewhere: their address redirects to a second
server.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Request = tuple[str, str, str, str]  # method, path, Range, Authorization
PAGE = 3  # entries of a listing in one answer


@dataclass
class Stub:
    """What the stub has, how it misbehaves, and what it was asked.

    Attributes:
        models: id -> revision -> files; a commit's name is the hash of its files.
        kinds: id -> "datasets" for what is no model.
        renamed: old id -> new id.
        gated, private: ids; a request with `token` may read them.
        refresh_token: what `token` is given for, when a login is renewed.
        cut: file name -> how many answers end in their middle.
        corrupt: names of files whose bytes are not those of the listing.
        status: an answer to everything, if it is set.
        asked: all requests, in order.
    """

    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str = "hf_secret_of_the_test"
    refresh_token: str = "hf_renewal_of_the_test"
    cut: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    status: int | None = None
    asked: list[Request] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""

    def add(self, name: str, folder: Path, revision: str = "main", **more: bytes) -> str:
        """Publish a folder's files as a revision; returns the commit."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        self.models.setdefault(name, {})[revision] = files | more
        return self.commit(name, revision)

    def commit(self, name: str, revision: str) -> str:
        """The commit of a revision."""
        parts = [f"{p}:{hashlib.sha1(b).hexdigest()}" for p, b in self.files(name, revision)]
        return hashlib.sha1("\n".join([name, *parts]).encode()).hexdigest()

    def files(self, name: str, revision: str) -> list[tuple[str, bytes]]:
        """The files of a revision or commit, in order; KeyError if there is none."""
        for each, files in self.models[name].items():
            if revision == each or (len(revision) == 40 and revision == self.commit(name, each)):
                return sorted(files.items())
        raise KeyError(revision)

    def fetched(self) -> list[str]:
        """The files that were asked for at their addresses, in order, without repetitions."""
        paths = [path for _, path, _, _ in self.asked if "/resolve/" in path]
        return list(
            dict.fromkeys(path.partition("/resolve/")[2].partition("/")[2] for path in paths)
        )


def is_large(place: str) -> bool:
    return place.endswith((".safetensors", ".bin", ".parquet"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry(place: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    found = {"type": "file", "path": place, "size": len(content), "oid": git_hash(content)}
    if is_large(place):
        pointer = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        found |= {"oid": git_hash(b"pointer"), "lfs": pointer | {"pointerSize": 134}}
    return found


@contextmanager
def running_hub() -> Iterator[Stub]:
    """A stub that answers during the block."""
    stub = Stub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, stub)) for _ in range(2)]
    stub.endpoint, stub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield stub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request as the stub has it."""

    protocol_version = "HTTP/1.1"

    def __init__(self, stub: Stub, *connection: Any) -> None:
        self.stub = stub
        super().__init__(*connection)  # handles it

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        """A login that is renewed."""
        length = int(self.headers["Content-Length"])
        sent = parse_qs(self.rfile.read(length).decode())
        stub = self.stub
        stub.asked.append(("POST", self.path, "", ""))
        if self.path == "/oauth/token" and sent.get("refresh_token") == [stub.refresh_token]:
            self.send_json({"access_token": stub.token, "expires_in": 30 * 24 * 3600})
        else:
            self.finish_with(400, b'{"error": "invalid_grant"}', {})

    def answer(self) -> None:
        """What is asked of a model or a data set, or of the storage of large files."""
        self.remember()
        if self.stub.status is not None:
            return self.error(self.stub.status, "")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "stored":
            return self.send_bytes(*parts[1:4], "/".join(parts[4:]))
        is_api = parts[0] == "api"
        kind = parts[1] if is_api else "datasets" if parts[0] == "datasets" else "models"
        rest = parts[2:] if is_api else parts[1:] if kind == "datasets" else parts
        if is_api and len(rest) == 2:
            rest = [*rest, "revision", "main"]
        if len(rest) < 4:
            return self.error(404, "")
        return self.answer_about("/".join(rest[:2]), kind, *rest[2:4], "/".join(rest[4:]))

    def remember(self) -> None:
        """Note the request, with the server that was asked."""
        where = f"{self.server.server_address[1]}"
        own = "" if self.stub.endpoint.endswith(where) else "storage:"
        asked_range = self.headers.get("Range", "")
        self.stub.asked.append((self.command, own + self.path, asked_range, self.authorization))

    def answer_about(self, name: str, kind: str, verb: str, revision: str, place: str) -> None:
        """A revision's commit, its listing or one of its files."""
        stub = self.stub
        if name in stub.renamed:
            return self.redirect(self.path.replace(name, stub.renamed[name], 1), 307)
        known = name in stub.models and stub.kinds.get(name, "models") == kind
        if not known or (name in stub.private and not self.may_read()):
            return self.error(404 if self.may_read() else 401, "RepoNotFound")
        try:
            files = dict(stub.files(name, revision))
        except KeyError:
            return self.error(404, "RevisionNotFound")
        if verb == "revision":
            return self.send_json({"id": name, "sha": stub.commit(name, revision)})
        if verb == "tree":
            cursor = parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0]
            return self.send_tree(files, int(cursor))
        if name in stub.gated and not self.may_read():
            return self.error(403 if self.authorization else 401, "GatedRepo")
        if place not in files:
            return self.error(404, "EntryNotFound")
        return self.send_file(name, revision, place, files[place])

    @property
    def authorization(self) -> str:
        """As it was sent; empty without."""
        return self.headers.get("Authorization", "")

    def may_read(self) -> bool:
        return self.authorization == f"Bearer {self.stub.token}"

    def send_tree(self, files: dict[str, bytes], first: int) -> None:
        entries = [entry(place, content) for place, content in files.items()]
        folders = {place.rpartition("/")[0] for place in files} - {""}
        entries += [{"type": "directory", "path": f, "oid": "0", "size": 0} for f in folders]
        more = {}
        if first + PAGE < len(entries):
            address = f"{self.stub.endpoint}{urlsplit(self.path).path}"
            more["Link"] = f'<{address}?recursive=true&cursor={first + PAGE}>; rel="next"'
        self.send_json(entries[first : first + PAGE], more)

    def send_file(self, name: str, revision: str, place: str, content: bytes) -> None:
        common = {"X-Repo-Commit": self.stub.commit(name, revision)}
        if is_large(place):
            digest = hashlib.sha256(content).hexdigest()
            common |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            kind = self.stub.kinds.get(name, "models")
            where = (
                f"{self.stub.storage}/stored/{kind}/{name.replace('/', '--')}/{revision}/{place}"
            )
            return self.redirect(where, 302, common)
        return self.send_range(place, content, common | {"ETag": f'"{git_hash(content)}"'})

    def send_bytes(self, kind: str, name: str, revision: str, place: str) -> None:
        content = dict(self.stub.files(name.replace("--", "/"), revision))[place]
        self.send_range(place, content, {})

    def send_range(self, place: str, content: bytes, headers: dict[str, str]) -> None:
        if place in self.stub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        body = content[begin:]
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            place_of = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", place_of)
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.stub.cut.get(place, 0) > 0:
            self.stub.cut[place] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self.finish_with(200, json.dumps(value).encode(), headers or {})

    def redirect(self, where: str, status: int, headers: dict[str, str] | None = None) -> None:
        self.finish_with(status, b"", {"Location": where, **(headers or {})})

    def error(self, status: int, code: str) -> None:
        self.finish_with(status, b"{}", {"X-Error-Code": code} if code else {})

    def finish_with(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
