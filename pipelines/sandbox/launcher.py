"""The process that makes a sandbox and runs a program in it.

It leaves the machine's namespaces of mounts, processes, network, IPC and names (and of users, where
it is not root), and becomes process 1 of new ones. There it builds a root of its own: Python's
files, read-only, three devices and a folder in memory. The program's process and the tests' have no
capabilities, a root below that root (so that no new user namespace can be made), limits, and a
filter of calls. They cannot reach process 1, with which the kernel ends them all.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipelines.sandbox.calls import is_known, refuse_calls
from pipelines.sandbox.sides import judge, serve
from pipelines.sandbox.wire import Channel

# Numbers of the kernel's interface (sched.h, mount.h, prctl.h).
_NEW_MOUNTS, _NEW_NAMES, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USERS, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 32, 4096, 16384, 1 << 18
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048  # of a mount, which a remount may not take away
_DETACH = 2
_DEATH_SIGNAL, _DUMPABLE, _NO_NEW_PRIVILEGES = 1, 4, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPABILITIES_V3 = 0x20080522
_FIRST_USER = 2_000_000_000  # users that nobody else has: their processes can be counted

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library.

    Raises:
        OSError: it failed; the text begins with its name.
    """
    values = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(_libc, name)(*values) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    _call("mount", source, str(target), kind, ctypes.c_ulong(flags), data or None)


def _leave_namespaces(is_root: bool) -> None:
    """Leave the machine's namespaces; the next child is process 1."""
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS | _NEW_NAMES | _NEW_IPC | _NEW_PROCESSES | _NEW_NETWORK
    _call("unshare", flags | (0 if is_root else _NEW_USERS))
    if not is_root:
        for file, line in (
            ("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")
        ):  # fmt: skip
            Path("/proc/self", file).write_text(line)


def _build_root(base: Path, shown: list[str], files_mb: int) -> None:
    """Make `base` the root of this process: `/jail` for programs, `/proc` for process 1."""
    _mount("none", Path("/"), None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", base, "tmpfs", _NO_SUID | _NO_DEVICES, "size=4m,mode=755")
    jail = base / "jail"
    for folder in (jail / "program", jail / "dev", base / "proc", base / "old"):
        folder.mkdir(parents=True)
    for path in map(Path, shown):
        _show(path, jail)
    for device in ("null", "zero", "urandom"):
        (jail / "dev" / device).touch()
        _mount(f"/dev/{device}", jail / "dev" / device, None, _BIND)
    size = f"size={files_mb}m,nr_inodes=4096,mode=1777"
    _mount("tmpfs", jail / "program", "tmpfs", _NO_SUID | _NO_DEVICES, size)
    if not (jail / "tmp").exists():
        (jail / "tmp").symlink_to("program")
    _mount("proc", base / "proc", "proc", _NO_SUID | _NO_DEVICES | _NO_EXEC)
    _mount(None, base, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chdir(base)
    _call("syscall", _PIVOT_ROOT[os.uname().machine], ".", "old")
    os.chdir("/")
    _call("umount2", "/old", _DETACH)


def _show(path: Path, jail: Path) -> None:
    """Let a path of the machine be read in the jail, at the same place."""
    target = jail / path.relative_to("/")
    if target.exists() or not path.exists():  # a part of what is there already
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir()
    else:
        target.touch()
    _mount(str(path), target, None, _BIND | _RECURSIVE)
    kept = os.statvfs(target).f_flag & _KEPT_FLAGS
    _mount(None, target, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES | kept)


def _own_user(number: int) -> int:
    """A user that no other process has: its processes are counted."""
    lines = Path("/proc/1/uid_map").read_text().splitlines()
    end = max(int(start) + int(count) for start, _, count in map(str.split, lines))
    own = _FIRST_USER + number
    return own if own < end else end - 1 - number % 1000  # in a container with few users


def _confine(user: int | None, limits: dict[str, int], kept: list[int], dumpable: int) -> None:
    """Give up everything: files, descriptors, rights."""
    os.chroot("/jail")
    os.chdir("/program")
    os.environ.clear()
    os.environ.update({"HOME": "/program", "TMPDIR": "/program", "OPENBLAS_NUM_THREADS": "1"})
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for number in range(3, 1024):
        if number not in kept:
            with contextlib.suppress(OSError):
                os.close(number)
    os.setsid()
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = struct.pack("Ii", _CAPABILITIES_V3, 0)
    _call("capset", header, bytes(24))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("prctl", _DUMPABLE, dumpable, 0, 0, 0)
    refuse_calls(_libc)
    ours = 2 if user is not None else 4  # both sides; the launcher and process 1 with the same user
    memory, size = limits["memory_mb"] * 2**20, limits["files_mb"] * 2**20
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_NPROC, limits["processes"] + ours),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CPU, limits["seconds"] + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _start(work: Callable[[], None]) -> int:
    """Run `work` in a child that then ends."""
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def _read(size: int) -> bytes:
    """The next bytes of stdin, and no further one, which a child would have in memory."""
    parts = b""
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            os._exit(1)
        parts += part
    return parts


def _read_message() -> Any:
    (size,) = struct.unpack("!I", _read(4))
    return json.loads(_read(size))


def _first_process(task: dict[str, Any], is_root: bool, parent: int) -> dict[str, str]:
    """What process 1 does: build the root, start both sides, watch them, and end them."""
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    limits = task["limits"]
    _build_root(Path(task["folder"]), task["shown"], limits["files_mb"])
    os.write(1, b"\n")  # from here on what goes wrong is the program's
    user = _own_user(parent) if is_root else None
    tests_end, program_end = socket.socketpair()
    verdict, report = os.pipe()

    def program() -> None:
        end = program_end.fileno()
        _confine(user, limits, [end], dumpable=1)
        serve(task["solution"], Channel(program_end))

    def tests() -> None:
        _confine(user, limits, [tests_end.fileno(), report], dumpable=0)
        found = judge(checks["before"], checks["tests"], checks["functions"], Channel(tests_end))
        os.write(report, json.dumps(found).encode())

    _start(program)
    # Only now do the tests come into this process; the program waits for theirs.
    checks = _read_message()
    _start(tests)
    tests_end.close()
    program_end.close()
    os.close(report)
    return _watch(verdict, limits)


def _watch(verdict: int, limits: dict[str, int]) -> dict[str, str]:
    """Wait for the verdict, as long as time and memory allow, then end everything."""
    deadline = time.monotonic() + limits["seconds"]
    most = limits["memory_mb"] * 2**20
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([verdict], [], [], max(0.0, min(0.02, left)))
        if ready:
            text = os.read(verdict, 2**16)
            found = json.loads(text) if text else {"status": "error", "detail": "no verdict"}
            break
        if left <= 0:
            found = {"status": "time", "detail": f"longer than {limits['seconds']} s"}
            break
        if _memory_used() > most:
            found = {"status": "memory", "detail": f"more than {limits['memory_mb']} MB"}
            break
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    return found


def _memory_used() -> int:
    """Bytes in memory of all other processes of the sandbox."""
    pages = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and entry.name != "1":
            with contextlib.suppress(OSError, IndexError):  # it has ended
                pages += int(Path(entry.path, "statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> NoReturn:
    """Read the program and its tests from stdin, write what came of them to stdout."""
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    task = _read_message()
    is_root = os.geteuid() == 0
    try:
        if not is_known(os.uname().machine):
            raise OSError(f"no support for {os.uname().machine}")
        _leave_namespaces(is_root)
        parent = os.getpid()
        child = os.fork()
        if child:
            os.close(1)
            os.waitpid(child, 0)
            os._exit(0)
        found = _first_process(task, is_root, parent)
    except OSError as error:
        found = {"status": "refused", "detail": error.strerror or str(error)}
    os.write(1, json.dumps(found).encode())
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
